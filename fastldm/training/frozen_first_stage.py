"""Where diffusion, CLIP and classifiers are trained: on the latents of a frozen first stage, or in pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from fastldm.checks import with_article
from fastldm.diffusion import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.autoencoder_kl import AutoencoderKL, DiagonalGaussianDistribution
from fastldm.models.pixel_space import PixelSpace
from fastldm.models.vq_model import VQModel
from fastldm.models.weights import find_weights, sha256
from fastldm.systems import folders
from fastldm.systems.guides import Latents, fingerprint
from fastldm.systems.latent_diffusion import FIRST_STAGE_PARTS, FIRST_STAGES, FirstStage, scale_from_batch
from fastldm.training.config import FrozenFirstStageConfig

PIXELS = "pixels"
_OTHERWISE = f"or set first_stage.path=shapes for the shipped one, or first_stage.path={PIXELS} for none"
_ENCODE_BATCH = 64


class CachedLatents(Dataset):
    """Moments of the latents (N, C', h, w) and prepared conditions (N, ...), encoded once."""

    def __init__(self, moments: Tensor, conditions: Tensor) -> None:
        self.moments = moments
        self.conditions = conditions

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"moments": self.moments[index], "condition": self.conditions[index]}


class FrozenFirstStage:
    """A first stage that is not trained, and the factor that its latents are multiplied by.

    Args:
        config: where it is.
        size: side of the square pictures, in pixels.
        seed: of the latents that the factor is measured on.

    Attributes:
        model: in evaluation mode, without gradients.
        shape: (C, h, w) of the latents.
        scaling_factor: None until `start`, where it is measured.

    Raises:
        ConfigError: no path, the folder holds another kind of model, or pictures of this size do not fit it.
        CheckpointError: nothing can be read there.
    """

    def __init__(self, config: FrozenFirstStageConfig, size: int, seed: int) -> None:
        self.path, self.seed = config.path, seed
        self._pipeline: Path | None = None
        self.sha256: str | None = None
        known = self._load(config.path)
        self.model.requires_grad_(False).eval()
        factor = self.model.downsample_factor
        if size % factor:
            raise ConfigError(
                f"data.size={size} for first_stage.path={config.path}: use a multiple of {factor}"
            )
        self.shape = (self.model.latent_channels, size // factor, size // factor)
        scaling = known if config.scaling_factor is None else config.scaling_factor
        self.scaling_factor: float | None = None if scaling == "std" else scaling

    def _load(self, path: str) -> float | None:
        """Set `model` and what comes with it; the factor of its latents, if that is known."""
        if path == PIXELS:
            self.model: FirstStage = PixelSpace()
            return 1.0
        if not path:
            raise ConfigError(
                "first_stage.path is not set; give the `model` folder that `fastldm train vq` exported, "
                f"{_OTHERWISE}"
            )
        folder = Path(path)
        if not (folder / "config.json").is_file() and (
            (folder / folders.INDEX).is_file() or path in folders.shipped_models()
        ):
            return self._load_of_pipeline(folders.find_pipeline(path))
        try:
            name = json.loads((folder / "config.json").read_text("utf-8")).get("_class_name")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the first stage {path}/config.json: {error}; train one with `fastldm train "
                f"vq`, {_OTHERWISE}"
            ) from error
        if name not in FIRST_STAGES:
            found = with_article(str(name))
            raise ConfigError(f"first_stage.path={path} holds {found}; give a VQModel or an AutoencoderKL")
        self.model = FIRST_STAGES[name].from_pretrained(folder)
        self.sha256 = _hash(folder)
        return None

    def _load_of_pipeline(self, folder: Path) -> float:
        index = folders.read_index(folder)
        self.model = folders.load_part(folder, index, FIRST_STAGE_PARTS, FIRST_STAGES)
        part = next(name for name in FIRST_STAGE_PARTS if folders.part_class(index, name))
        self.sha256 = _hash(folder / part)
        self._pipeline = folder
        return self.model.config.scaling_factor

    @property
    def schedule(self) -> NoiseSchedule | None:
        """Of the pipeline that `config.path` names; None for a first stage alone."""
        if self._pipeline is None:
            return None
        return folders.read_scheduler(self._pipeline, folders.read_index(self._pipeline))[0]

    def noise(self, schedule: dict[str, Any]) -> NoiseSchedule:
        """Of a model that guides diffusion here: from a configuration, else the pipeline's, else defaults."""
        own = None if schedule else self.schedule
        return NoiseSchedule.from_config({"clip_sample": False, **schedule}) if own is None else own

    def to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device)

    def start(self, batch: dict) -> None:
        """Measure the factor on the first batch, where it is not known."""
        if self.scaling_factor is None:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            self.scaling_factor = scale_from_batch(self._latents(batch, generator))

    def state(self) -> dict[str, Any]:
        return {"scaling_factor": self.scaling_factor, "first_stage_sha256": self.sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave; ConfigError where the weights are others."""
        if state["first_stage_sha256"] != self.sha256:
            raise ConfigError(
                f"first_stage.path={self.path} holds other weights than when this run "
                f"began (sha256 {self.sha256[:12]}, not {state['first_stage_sha256'][:12]}); "
                "put those back or begin another run"
            )
        self.scaling_factor = state["scaling_factor"]

    def record(self) -> Latents | None:
        """What a model that was trained here takes; None for pictures."""
        if isinstance(self.model, PixelSpace) and self.scaling_factor == 1:
            return None
        return Latents(self.scaling_factor, self.sha256, fingerprint(self.model))

    def scaled(self, batch: dict, generator: torch.Generator) -> Tensor:
        """Scaled latents (B, C, h, w) of a batch, encoded or cached; `generator` draws those of KL."""
        return self._latents(batch, generator) * self.scaling_factor

    def cached(self, pictures: Any, condition: Callable[[dict], Tensor], num_workers: int) -> Dataset:
        """The data passed through the first stage once; in pixels, where there is nothing to pass, as it is.

        Args:
            pictures: data set of "image" and the rest.
            condition: of a batch of it, the tensor (B, ...) that is kept beside the latents.
            num_workers: processes that read pictures.
        """
        if isinstance(self.model, PixelSpace):
            return pictures
        loader = DataLoader(pictures, batch_size=_ENCODE_BATCH, num_workers=num_workers)
        moments, conditions = [], []
        for batch in tqdm(loader, desc="encode", unit="batch", disable=None, leave=False):
            moments.append(self._moments(batch["image"].to(self.device)).cpu())
            conditions.append(condition(batch).cpu())
        return CachedLatents(torch.cat(moments), torch.cat(conditions))

    def shown(self, pictures: Any, count: int, seed: int) -> tuple[Tensor, dict]:
        """The first `count` items: their scaled latents (B, C, h, w), drawn with the seed, and the batch."""
        batch = default_collate([pictures[i] for i in range(min(count, len(pictures)))])
        moved = {"image": batch["image"].to(self.device)}
        return self.scaled(moved, torch.Generator(self.device).manual_seed(seed)), batch

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Tensor:
        """What the first stage says of the latents: z itself, or its mean and log-variance (KL)."""
        encoded = self.model.encode(images)
        return encoded.latent_dist.parameters if isinstance(self.model, AutoencoderKL) else encoded.latents

    def _latents(self, batch: dict, generator: torch.Generator) -> Tensor:
        moments = batch["moments"] if "moments" in batch else self._moments(batch["image"])
        if isinstance(self.model, AutoencoderKL):
            return DiagonalGaussianDistribution(moments).sample(generator)
        return moments


def noised(images: Tensor, schedule: NoiseSchedule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t (B, C, H, W) of pictures or scaled latents (B, C, H, W), and its uniform t, int64 (B,)."""
    steps = schedule.num_train_timesteps
    t = torch.randint(steps, (len(images),), generator=generator, device=images.device)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return schedule.add_noise(images, noise, t), t


def _hash(folder: Path) -> str:
    """SHA-256 of the weights in the folder of a first stage."""
    return sha256(find_weights(folder, (VQModel.weights_name, VQModel.pickled_weights_name), None))
