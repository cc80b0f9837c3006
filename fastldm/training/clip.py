"""Training CLIP on captioned pictures (Radford et al. 2021): each batch is B pairs, of which every picture
must find its text among B texts and every text its picture.

Noised CLIP (Nichol et al. 2022, section 2.4) is trained on x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps at a
uniform t, of which the image tower is told, so that its gradient can guide diffusion at every step. To guide
latent diffusion, x are the latents of its first stage.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError
from fastldm.models.clip import CLIPModel
from fastldm.models.clip_tokenizer import CLIPTokenizer
from fastldm.pictures import grid, to_pil
from fastldm.systems.clip import CLIPScorer, clip_loss
from fastldm.training.config import CLIPTrainingConfig
from fastldm.training.data import build_dataset, captions_of, warn_of_long_captions
from fastldm.training.frozen_first_stage import FrozenFirstStage, noised

_SHOWN = 8
# Pictures in [-1, 1], as data sets give them and diffusion noises them, go into the tower as they are.
_MEAN = _STD = (0.5, 0.5, 0.5)


class CLIPModule(nn.Module):
    """The towers with their loss, so that one data-parallel wrapper covers both."""

    def __init__(self, model: CLIPModel, schedule: NoiseSchedule | None) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule

    def forward(
        self, batch: dict, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.clamp_logit_scale()
        images, timesteps = batch["x"], None
        if self.schedule is not None:
            images, timesteps = noised(images, self.schedule, generator)
        output = self.model(batch["input_ids"], images, timestep=timesteps)
        embeds = (across_processes(x) for x in (output.image_embeds, output.text_embeds))
        loss, accuracy = clip_loss(*embeds, self.model.logit_scale)
        return loss, {"accuracy": accuracy, "logit_scale": self.model.logit_scale.detach().exp()}


def across_processes(x: Tensor) -> Tensor:
    """The x (B, D) of all processes, (processes * B, D): every pair of the whole batch is a negative.

    Data-parallel training averages the gradients of the processes, each of which has only that of its own
    rows. These are scaled so that the average is the gradient of the loss over the whole batch.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return x
    count, rank = distributed.get_world_size(), distributed.get_rank()
    parts = [torch.empty_like(x) for _ in range(count)]
    distributed.all_gather(parts, x.detach().contiguous())
    parts[rank] = count * x - (count - 1) * x.detach()
    return torch.cat(parts)


class CLIPTask:
    """See fastldm.training.loop.Task."""

    def __init__(self, config: CLIPTrainingConfig) -> None:
        self.config = config
        self.pictures = build_dataset(config.data, config.seed)
        self.dataset: Any = self.pictures
        if "caption" not in self.pictures[0]:
            raise ConfigError(
                f"CLIP needs a caption for each picture, and {config.data.path} has none: add metadata.jsonl"
            )
        check_pairs(config, self.pictures)
        self.first_stage = FrozenFirstStage(config.first_stage, config.data.size, config.seed)
        self.schedule = self.first_stage.noise(config.schedule) if config.noised else None
        self.tokenizer = build_tokenizer(config, self.pictures)
        warn_of_long_captions(self.pictures, self.tokenizer, "see max_length")
        fields = model_config(config, self.tokenizer, self.first_stage.shape)
        model = CLIPModel.from_config(fields)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile()
        self.module = CLIPModule(model, self.schedule)
        # Whatever does not fit is said now, not at the export.
        self.scorer()
        self.averaged = model
        self.adversary = None
        self.every_step_trains_all = True

    def to(self, device: torch.device) -> None:
        self.device = device
        self.first_stage.to(device)
        if self.config.cache_latents:
            self.dataset = self.first_stage.cached(self.pictures, self._ids, self.config.data.num_workers)

    def start(self, batch: dict) -> None:
        self.first_stage.start(batch)

    def state(self) -> dict[str, Any]:
        return self.first_stage.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.first_stage.load_state(state)

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        ids = batch["condition"] if "condition" in batch else self._ids(batch)
        return {"x": self.first_stage.scaled(batch, generator), "input_ids": ids.to(self.device)}

    def picture(self, seed: int) -> Image.Image:
        """The first pictures, each over the caption that the model finds for it among theirs."""
        x, batch = self.first_stage.shown(self.pictures, _SHOWN, seed)
        timestep = 0 if self.config.noised else None
        found = self.scorer().scores(x, batch["caption"], timestep).argmax(dim=1).tolist()
        return grid(to_pil(batch["image"]), [batch["caption"][i] for i in found], columns=4)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.module.model.clamp_logit_scale()
        self.scorer().save_pretrained(folder, dtype=dtype)

    def scorer(self) -> CLIPScorer:
        """The model as it is now, shared, not copied."""
        latents = self.first_stage.record()
        return CLIPScorer(self.module.model, self.tokenizer, _MEAN, _STD, self.schedule, latents)

    def _ids(self, batch: dict) -> Tensor:
        return self.tokenizer(batch["caption"])


def check_pairs(config: CLIPTrainingConfig, pictures: Any) -> None:
    """Whether the pairs of a batch can be told apart.

    Warns where all captions of a folder are the same.

    Raises:
        ConfigError: a batch is larger than the folder, so that pictures would stand against themselves.
    """
    if config.data.source == "shapes":
        return
    captions = captions_of(pictures)
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if config.batch_size * processes > len(captions):
        across = f" in each of {processes} processes" if processes > 1 else ""
        most = len(captions) // processes
        lower = f"set batch_size to at most {most}, or " if most >= 2 else ""
        raise ConfigError(
            f"batch_size={config.batch_size}{across} for the {len(captions)} pictures of {config.data.path}: "
            f"pictures would be negatives of themselves; {lower}add pictures"
        )
    if len(set(captions)) == 1:
        warnings.warn(
            f"all {len(captions)} captions of {config.data.path} are {captions[0]!r}: no picture can be told "
            "from another by its text, and CLIP learns nothing; write captions that differ",
            stacklevel=2,
        )


def build_tokenizer(config: CLIPTrainingConfig, pictures: Any) -> CLIPTokenizer:
    """The tokenizer of a configuration; the same captions give the same one."""
    if config.tokenizer is not None:
        return CLIPTokenizer.from_pretrained(config.tokenizer, max_length=config.max_length)
    return CLIPTokenizer.from_captions(captions_of(pictures), config.max_length, merges=config.merges)


def model_config(
    config: CLIPTrainingConfig, tokenizer: CLIPTokenizer, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """config.json of the model; what the configuration leaves out follows from the tokenizer and from the
    shape (C, side, side) of what the image tower sees."""
    for tower in ("text_config", "vision_config"):
        if not isinstance(config.model.get(tower, {}), dict):
            raise ConfigError(f"model.{tower} needs keys of its own, got {config.model[tower]!r}")
    text = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": tokenizer.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.model.get("text_config", {}),
    }
    channels, side, _ = shape
    vision = {
        "image_size": side,
        "num_channels": channels,
        "timestep_conditioning": config.noised,
        **config.model.get("vision_config", {}),
    }
    for key, value in (("image_size", side), ("num_channels", channels)):
        if vision[key] != value:
            raise ConfigError(
                f"model.vision_config.{key}={vision[key]} for data.size={config.data.size} and "
                f"first_stage.path={config.first_stage.path}, which give {value}; leave it out"
            )
    if vision["timestep_conditioning"] != config.noised:
        raise ConfigError("model.vision_config.timestep_conditioning follows from noised; leave it out")
    return {**config.model, "text_config": text, "vision_config": vision}
