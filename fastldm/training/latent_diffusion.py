"""Training latent diffusion (Rombach et al. 2022), the three steps of each batch:

1. the frozen first stage encodes the pictures x to latents z, which are scaled to about unit variance;
2. tau_theta encodes the condition y, with probability p the null condition (for classifier-free guidance);
3. the UNet predicts the noise (or x0, or v) of z_t at a uniform t, and the mean squared error trains UNet and
   tau_theta together:  E ||eps - eps_theta(z_t, t, tau_theta(y))||^2. With schedule.variance_type
   "learned_range" the UNet also gives the variance, and the variational bound trains that half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastldm.diffusion import NoiseSchedule, drop_condition, hybrid_loss, noise_levels, simple_loss
from fastldm.errors import ConfigError, InputError
from fastldm.models.conditioners import ClassConditioner, SpatialConditioner, TextConditioner, predict
from fastldm.models.text_transformer import LDMBertModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet2DConditionModel
from fastldm.pictures import grid
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.config import LatentDiffusionConfig
from fastldm.training.data import build_dataset, captions_of, classes_of, warn_of_long_captions
from fastldm.training.frozen_first_stage import FrozenFirstStage

# Which entry of a data set's item a conditioner takes. A condition picture is the picture itself, which
# SpatialConditioner makes small: super-resolution, as in section 4.4 of the paper.
_CONDITION_KEYS = {"text": "caption", "class": "label", "image": "image"}


def latent_diffusion_loss(
    unet: nn.Module,
    conditioner: nn.Module,
    schedule: NoiseSchedule,
    latents: Tensor,
    condition: Tensor,
    *,
    generator: torch.Generator,
    condition_dropout: float = 0.1,
    snr_gamma: float | None = None,
) -> Tensor:
    """Steps 2 and 3 for one batch: the loss, a float32 scalar.

    Args:
        unet: the denoiser.
        conditioner: tau_theta.
        schedule: noise schedule; its prediction_type says what the UNet predicts, and its variance_type
            whether it gives a variance too, which `hybrid_loss` trains.
        latents: scaled z (B, C, h, w), float32.
        condition: prepared conditions (B, ...), see the conditioner's `prepare`.
        generator: on the latents' device; draws t, the noise and the dropped conditions.
        condition_dropout: probability p of the null condition, per sample.
        snr_gamma: gamma of the Min-SNR weights (Hang et al. 2023), or None.
    """
    timesteps = torch.randint(
        schedule.num_train_timesteps, (len(latents),), generator=generator, device=latents.device
    )
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    condition = drop_condition(condition, conditioner.null_like(condition), condition_dropout, generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    predicted = predict(unet, noisy, timesteps, *conditioner(condition))
    loss = hybrid_loss if schedule.variance_type == "learned_range" else simple_loss
    return loss(predicted, latents, noise, timesteps, schedule, snr_gamma=snr_gamma).mean()


class LatentDiffusionModule(nn.Module):
    """All that latent diffusion trains: the denoiser and tau_theta."""

    def __init__(
        self, unet: nn.Module, conditioner: nn.Module, schedule: NoiseSchedule, config: LatentDiffusionConfig
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.schedule = schedule
        self.condition_dropout = config.condition_dropout
        self.snr_gamma = config.snr_gamma

    def forward(
        self, batch: dict, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = latent_diffusion_loss(
            self.unet,
            self.conditioner,
            self.schedule,
            batch["latents"],
            batch["condition"],
            generator=generator,
            condition_dropout=self.condition_dropout,
            snr_gamma=self.snr_gamma,
        )
        return loss, {}


class LatentDiffusionTask:
    """See fastldm.training.loop.Task."""

    def __init__(self, config: LatentDiffusionConfig) -> None:
        self.config = config
        self.pictures = build_dataset(config.data, config.seed)
        self._check_condition()
        self.first_stage = FrozenFirstStage(config.first_stage, config.data.size, config.seed)
        self.schedule = NoiseSchedule.from_config(
            {"clip_sample": False, **config.schedule, "prediction_type": config.prediction_type}
        )
        conditioner = build_conditioner(config, self.pictures)
        unet = build_unet(config, self.first_stage, conditioner, self.schedule)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if config.compile:
            unet.compile()
            conditioner.compile()
        self.module = LatentDiffusionModule(unet, conditioner, self.schedule, config)
        self.averaged = self.module
        self.adversary = None
        self.every_step_trains_all = True
        self.dataset: Any = self.pictures
        self._check_sampling()

    def to(self, device: torch.device) -> None:
        self.device = device
        self.first_stage.to(device)
        if self.config.cache_latents:
            self.dataset = self.first_stage.cached(
                self.pictures, self._condition, self.config.data.num_workers
            )

    def start(self, batch: dict) -> None:
        self.first_stage.start(batch)

    def state(self) -> dict[str, Any]:
        return self.first_stage.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.first_stage.load_state(state)

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        condition = batch["condition"] if "condition" in batch else self._condition(batch)
        return {
            "latents": self.first_stage.scaled(batch, generator),
            "condition": condition.to(self.device),
        }

    def picture(self, seed: int) -> Image.Image:
        sampling = self.config.sampling
        if sampling.prompts:
            raw, captions = sampling.prompts, [str(prompt) for prompt in sampling.prompts]
        else:
            items = [self.pictures[i] for i in range(min(sampling.num_images, len(self.pictures)))]
            raw = self._raw(default_collate(items))
            captions = [str(item.get("caption", item.get("label", ""))) for item in items]
        generator = torch.Generator().manual_seed(seed)
        images = self.pipeline()(raw, generator=generator, progress=False).images
        return grid(images, captions, columns=4)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.pipeline().save_pretrained(folder, dtype=dtype)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The trained parts and the first stage as a pipeline; they are shared, not copied."""
        sampling = self.config.sampling
        return LatentDiffusionPipeline(
            self.first_stage.model,
            self.module.conditioner,
            self.module.unet,
            self.schedule,
            self.first_stage.scaling_factor,
            sampler=sampling.sampler,
            defaults={
                "num_inference_steps": sampling.num_inference_steps,
                "guidance_scale": sampling.guidance_scale,
            },
        )

    def _check_condition(self) -> None:
        kind = self.config.conditioner.kind
        if _CONDITION_KEYS[kind] not in self.pictures[0]:
            raise ConfigError(
                f"conditioner.kind={kind} needs a {_CONDITION_KEYS[kind]} for each picture, and "
                f"{self.config.data.path} has none: add metadata.jsonl for captions, class folders for labels"
            )

        if kind == "class":
            # Refuses data without a single class.
            classes_of(self.pictures)

    def _raw(self, batch: dict) -> Any:
        """The part of a batch that the conditioner's `prepare` takes."""
        return batch[_CONDITION_KEYS[self.config.conditioner.kind]]

    def _condition(self, batch: dict) -> Tensor:
        """Prepared conditions of a batch of pictures."""
        return self.module.conditioner.prepare(self._raw(batch))

    def _check_sampling(self) -> None:
        """Whatever would only fail at the first picture grid: parts that do not fit, prompts, steps."""
        sampling = self.config.sampling
        if sampling.prompts and self.config.conditioner.kind == "image":
            raise ConfigError("sampling.prompts has no meaning for conditioner.kind=image; leave it empty")
        pipeline = self.pipeline()
        if sampling.prompts:
            try:
                pipeline.conditioner.prepare(sampling.prompts)
            except InputError as error:
                raise ConfigError(
                    f"sampling.prompts do not fit the data: {error}; set sampling.prompts=[] to show the "
                    "first conditions of the data, or give others"
                ) from error
        noise_levels(self.schedule, sampling.sampler, sampling.num_inference_steps)


def build_conditioner(config: LatentDiffusionConfig, pictures: Any) -> nn.Module:
    """tau_theta of a configuration, with fresh weights."""
    settings = config.conditioner
    if settings.kind == "class":
        return ClassConditioner.from_config(settings.config)
    if settings.kind == "image":
        return SpatialConditioner.from_config(settings.config)
    if settings.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(settings.tokenizer)
    else:
        tokenizer = Tokenizer.from_captions(captions_of(pictures), settings.max_length)
    window = "max_length" if settings.tokenizer is None else "tokenizer"
    warn_of_long_captions(pictures, tokenizer, f"see conditioner.{window}")
    text_encoder = LDMBertModel.from_config(
        {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": tokenizer.max_length,
            **settings.config,
        }
    )
    return TextConditioner(text_encoder, tokenizer)


def build_unet(
    config: LatentDiffusionConfig,
    first_stage: FrozenFirstStage,
    conditioner: nn.Module,
    schedule: NoiseSchedule,
) -> UNet2DConditionModel:
    """The denoiser; channels that the configuration leaves out follow from the other parts."""
    channels, side, _ = first_stage.shape
    derived = {
        "sample_size": side,
        "in_channels": channels + conditioner.concat_channels,
        "out_channels": schedule.output_channels(channels),
    }
    if conditioner.context_dim is not None:
        derived["cross_attention_dim"] = conditioner.context_dim
    return UNet2DConditionModel.from_config({**derived, **config.unet})
