"""Training the classifier of classifier guidance (Dhariwal and Nichol 2021, section 4): the cross-entropy of
labels given x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps at a uniform t, of which the classifier is told.

x are pictures, or the latents of the first stage in which diffusion will be guided.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError
from fastldm.pictures import grid, to_pil
from fastldm.systems.classifier import ClassifierGuide, build_classifier
from fastldm.systems.guides import GuideSpace
from fastldm.training.config import ClassifierConfig
from fastldm.training.data import build_dataset, classes_of
from fastldm.training.frozen_first_stage import FrozenFirstStage, noised

_SHOWN = 8


class ClassifierModule(nn.Module):
    """The classifier with its loss, so that one data-parallel wrapper covers both."""

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule

    def forward(
        self, batch: dict, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, t = noised(batch["x"], self.schedule, generator)
        logits, labels = self.model(x, t).logits.float(), batch["label"]
        right = (logits.detach().argmax(dim=1) == labels).float()
        low = t < self.schedule.num_train_timesteps / 2
        accuracy = right.mean()
        logs = {
            "accuracy": accuracy,
            "accuracy_low_noise": _mean_of(right, low, accuracy),
            "accuracy_high_noise": _mean_of(right, ~low, accuracy),
        }
        return F.cross_entropy(logits, labels), logs


def _mean_of(values: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of the chosen values; a small batch may have none."""
    count = chosen.sum()
    return torch.where(count > 0, (values * chosen).sum() / count.clamp(min=1), otherwise)


class ClassifierTask:
    """See fastldm.training.loop.Task."""

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config
        self.pictures = build_dataset(config.data, config.seed)
        self.dataset: Any = self.pictures
        self.classes = classes_of(self.pictures)
        if not self.classes:
            raise ConfigError(
                f"a classifier needs a label for each picture, and {config.data.path} has none: put the "
                "pictures into one folder per class"
            )
        self.first_stage = FrozenFirstStage(config.first_stage, config.data.size, config.seed)
        self.schedule = self.first_stage.noise(config.schedule)
        model = build_classifier(config.model, self.first_stage.shape, len(self.classes))
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile()
        self.module = ClassifierModule(model, self.schedule)
        self.averaged = model
        self.adversary = None
        self.every_step_trains_all = True

    def to(self, device: torch.device) -> None:
        self.device = device
        self.first_stage.to(device)
        if self.config.cache_latents:
            self.dataset = self.first_stage.cached(self.pictures, _labels, self.config.data.num_workers)

    def start(self, batch: dict) -> None:
        self.first_stage.start(batch)

    def state(self) -> dict[str, Any]:
        return self.first_stage.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.first_stage.load_state(state)

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        labels = batch["condition"] if "condition" in batch else _labels(batch)
        return {"x": self.first_stage.scaled(batch, generator), "label": labels.to(self.device)}

    def picture(self, seed: int) -> Image.Image:
        """The first pictures, each over the class that the model finds in it without noise."""
        x, batch = self.first_stage.shown(self.pictures, _SHOWN, seed)
        found = self.guide().classify(x).argmax(dim=1).tolist()
        return grid(to_pil(batch["image"]), [self.classes[i] for i in found], columns=4)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        self.guide().save_pretrained(folder, dtype=dtype)

    def guide(self) -> ClassifierGuide:
        """The model as it is now, shared, not copied."""
        space = GuideSpace(self.first_stage.shape, self.first_stage.record(), self.schedule)
        return ClassifierGuide(self.module.model, self.classes, space)


def _labels(batch: dict) -> Tensor:
    return batch["label"]
