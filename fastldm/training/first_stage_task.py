"""Training a first stage: a VQModel or an AutoencoderKL on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.vq_model import VQModel
from fastldm.pictures import grid, to_pil
from fastldm.training.config import FirstStageConfig, checked_arguments
from fastldm.training.data import build_dataset
from fastldm.training.first_stage import (
    FirstStageLoss,
    first_stage_forward,
    first_stage_step,
    initialize_codebook,
)

_SHOWN = 8


class FirstStageModule(nn.Module):
    """A first stage with its loss, so that one data-parallel wrapper covers both."""

    def __init__(self, model: nn.Module, loss: FirstStageLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(
        self, batch: dict, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"]
        output = first_stage_forward(self.model, images)
        loss, logs = first_stage_step(self.model, self.loss, images, step=step, output=output)
        if self.loss.adversarial(step):
            # The two losses share no gradient, so one backward pass and one optimiser serve both networks
            # (the loop clips `FirstStageTask.adversary` by itself).
            discriminator_loss, more = self.loss.discriminator_loss(output, images)
            loss, logs = loss + discriminator_loss, {**logs, **more}
        logs.pop("loss", None)
        return loss, logs


class FirstStageTask:
    """See fastldm.training.loop.Task."""

    def __init__(self, config: FirstStageConfig) -> None:
        self.config = config
        self.dataset = build_dataset(config.data, config.seed)
        model = (VQModel if config.model.kind == "vq" else AutoencoderKL).from_config(config.model.config)
        if config.model.kind == "vq" and config.model.ema_codebook_decay is not None:
            model.quantize.enable_ema(config.model.ema_codebook_decay, revive_below=config.model.revive_below)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile()
        loss = FirstStageLoss(**checked_arguments(FirstStageLoss, config.loss, "loss"))
        self.module = FirstStageModule(model, loss)
        self.averaged = model
        self.adversary = loss.discriminator
        self.every_step_trains_all = loss.discriminator is None

    def to(self, device: torch.device) -> None:
        self.device = device

    def start(self, batch: dict) -> None:
        if self.config.model.kind == "vq" and self.config.init_codebook:
            initialize_codebook(self.module.model, batch["image"])

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        return batch

    def picture(self, seed: int) -> Image.Image:
        """The first pictures above their reconstructions."""
        images = torch.stack([self.dataset[i]["image"] for i in range(min(_SHOWN, len(self.dataset)))])
        images = images.to(self.device)
        model = self.module.model
        if self.config.model.kind == "vq":
            latents = model.encode(images).latents
        else:
            latents = model.encode(images).latent_dist.mode()
        decoded = model.decode(latents).sample
        captions = ["picture"] * len(images) + ["reconstruction"] * len(images)
        return grid(to_pil(torch.cat([images, decoded])), captions, columns=len(images))

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.module.model.save_pretrained(folder, dtype=dtype)
