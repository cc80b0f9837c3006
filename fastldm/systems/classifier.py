"""A classifier of noisy pictures or latents at work (Dhariwal and Nichol 2021, section 4): what x_t shows,
and the gradient that guides diffusion to a class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastldm.diffusion.guidance import Gradient, classifier_gradient
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.io import write_json
from fastldm.models.base import Model
from fastldm.models.classifier import ADMClassifier
from fastldm.models.weights import read_json, resolve_folder
from fastldm.pictures import as_pictures, as_square, as_tensor
from fastldm.systems.guides import Guide, GuideSpace, read_latents, read_schedule

_CLASSES = "classes.json"


def build_classifier(config: Mapping[str, Any], shape: tuple[int, int, int], num_classes: int) -> Model:
    """The network with fresh weights.

    Args:
        config: its own config.json fields; those that follow from the other two are left out.
        shape: (C, side, side) of its x.

    Raises:
        ConfigError: for fields that do not fit together.
    """
    derived = {"image_size": shape[-1], "in_channels": shape[0], "out_channels": num_classes}
    for key, value in derived.items():
        if config.get(key, value) != value:
            raise ConfigError(f"model.{key}={config[key]!r} for data with {value}; leave it out")
    return ADMClassifier.from_config({**config, **derived})


class ClassifierGuide:
    """Classes of x_t, and gradients towards them.

    Args:
        model: (x, t) -> `.logits` (B, classes), told t.
        classes: the name of every class, in the order of the logits.
        space: what the model was trained on; its schedule is that of the noise.

    Raises:
        ConfigError: if there is no schedule, or there are two classes of one name.
    """

    def __init__(self, model: Model, classes: Sequence[str], space: GuideSpace) -> None:
        if space.schedule is None:
            raise ConfigError("a classifier of noisy x needs the noise schedule it was trained on")
        if len(set(classes)) != len(classes):
            raise ConfigError(f"the classes {list(classes)} must have different names")
        self.model, self.classes, self.space = model, tuple(classes), space

    @property
    def schedule(self) -> NoiseSchedule:
        return self.space.schedule

    def to(self, *args: Any, **kwargs: Any) -> ClassifierGuide:
        """Move the model, as `nn.Module.to`; returns the guide."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def classify(self, x: Tensor | Image.Image | Sequence[Image.Image], timestep: Tensor | int = 0) -> Tensor:
        """Probabilities of the classes, float32 (B, classes).

        Args:
            x: (B, C, H, W), pictures in [-1, 1], or scaled latents as `LatentDiffusionPipeline.encode` gives
                them, with the noise of `timestep`; or PIL images of any size, whose shorter side is made the
                model's (bicubic) and whose centre is cut out, as for training. These have no noise.
            timestep: one number, or (B,).

        Raises:
            InputError: for x of another shape, for PIL images where the model takes latents, or a timestep
                outside the schedule.
        """
        x = self._from_pil(x)
        self.space.check_x(x)
        return self._logits(x, self.space.checked_timestep(timestep, len(x))).softmax(dim=-1)

    def gradient(self, labels: int | str | Sequence[int | str] | Tensor) -> Guide:
        """The gradient of log p(label | x_t), to guide diffusion (`classifier_gradient`).

        Args:
            labels: names or numbers of classes, one, or one per prompt.

        Raises:
            InputError: for a label that the classifier does not know.
        """

        def bind(labels: Tensor) -> Gradient:
            return classifier_gradient(self._logits, labels)

        return Guide(bind, self._indices(labels), self.space)

    def _from_pil(self, x: Any) -> Any:
        """PIL images as a tensor; anything else as it is."""
        listed = x if isinstance(x, list | tuple) else [x]
        if not any(isinstance(picture, Image.Image) for picture in listed):
            return x
        self.space.check_takes_pictures("classifier")
        return as_tensor([as_square(p, self.space.shape[-1]) for p in as_pictures("pictures", x)])

    def _logits(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x.to(self.model.device, self.model.dtype), t.to(self.model.device)).logits.float()

    def _indices(self, labels: int | str | Sequence[int | str] | Tensor) -> Tensor:
        """int64 (B,)."""
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.tolist()
        single = isinstance(labels, str) or not isinstance(labels, Sequence)
        labels = [labels] if single else list(labels)
        if not labels:
            raise InputError(f"there is no label; give at least one of {len(self.classes)} classes")
        known = {name: i for i, name in enumerate(self.classes)}
        indices = []
        for label in labels:
            index = known.get(label) if isinstance(label, str) else label
            whole = isinstance(index, Integral) and not isinstance(index, bool)
            if not whole or not 0 <= index < len(self.classes):
                names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
                raise InputError(
                    f"label {label!r} is no class; give 0 to {len(self.classes) - 1}, or a name ({names})"
                )
            indices.append(int(index))
        return torch.tensor(indices, dtype=torch.int64)

    def save_pretrained(self, path: str | os.PathLike, *, dtype: torch.dtype | None = None) -> None:
        """Write the folder: the model, `classes.json`, `scheduler_config.json`, and for one of latents
        `latents.json`."""
        folder = Path(path)
        self.model.save_pretrained(folder, dtype=dtype)
        try:
            write_json(folder / _CLASSES, {"classes": list(self.classes)})
            self.space.save(folder)
        except OSError as error:
            raise CheckpointError(f"cannot save the classifier to {folder}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> ClassifierGuide:
        """Load a folder that `save_pretrained` wrote. Arguments: see `Model.from_pretrained`.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        folder = resolve_folder(path, None, _CLASSES)
        model = ADMClassifier.from_pretrained(folder, torch_dtype=torch_dtype, variant=variant)
        classes, config = read_json(folder / _CLASSES).get("classes"), model.config
        if not isinstance(classes, list) or len(classes) != config.out_channels:
            raise CheckpointError(f"{folder / _CLASSES} must name the model's {config.out_channels} classes")
        shape = (config.in_channels, config.image_size, config.image_size)
        try:
            return cls(model, classes, GuideSpace(shape, read_latents(folder), read_schedule(folder)))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
