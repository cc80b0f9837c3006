"""The part of a picture that inpainting keeps, and how a user says which it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastldm.checks import described
from fastldm.errors import InputError
from fastldm.pictures import as_pictures, check_range, from_pil


@dataclass(frozen=True)
class Known:
    """image: (B, C, H, W) in [-1, 1]; mask: bool (B, 1, H, W), True where it is known. B = 1: all alike."""

    image: Tensor
    mask: Tensor

    def into(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) with the known part in its place."""
        return torch.where(self.mask, self.image.to(x.dtype), x)

    def shrunk(self, size: int) -> Known:
        """At a smaller side: means over the pixels of each place, known where all of them are."""
        unknown = F.adaptive_max_pool2d((~self.mask).float(), size)
        return Known(F.interpolate(self.image, (size, size), mode="area"), unknown == 0)

    def repeated(self, count: int) -> Known:
        """Each `count` times, one after another; what is alike for all stays one."""
        image, mask = (
            value.repeat_interleave(count, dim=0) if len(value) > 1 else value
            for value in (self.image, self.mask)
        )
        return Known(image, mask)


def read_known(image: Any, mask: Any, shape: tuple[int, int, int], sizes: Sequence[int], count: int) -> Known:
    """What a user gives to inpaint, on the CPU.

    Args:
        image: PIL image(s), made squares; or float (B, *shape) in [-1, 1]. B is 1 or `count`.
        mask: where to paint: white in a PIL image of any size, or True or 1 in a tensor (H, W) or
            (B, 1, H, W) whose side is one of `sizes`.
        shape: (C, H, W) of the pictures that come out.
        count: of prompts.

    Raises:
        InputError: for anything else.
    """
    channels, size, _ = shape
    if not isinstance(image, Tensor):
        image = pictures_of("image", image, size)
    if image.shape[1:] != shape or len(image) not in (1, count) or not image.is_floating_point():
        raise InputError(
            f"image is {described(image)}: give float ({_one_or(count)}, {channels}, {size}, {size}) in "
            "[-1, 1], or PIL images"
        )
    check_range("the pixels of the image", image)
    painted = _to_paint(mask, size, sizes, count)
    if not bool(painted.any()):
        warnings.warn("the mask is black everywhere: nothing is painted; paint white where to", stacklevel=5)
    return Known(image.float(), ~painted)


def pictures_of(name: str, given: Any, size: int | None = None) -> Tensor:
    """PIL image(s) as float32 (B, 3, size, size) in [-1, 1]; InputError for anything else.

    size: None = the width of the first one.
    """
    pictures = as_pictures(name, given)
    return from_pil(pictures, size or pictures[0].width)


def _to_paint(mask: Any, size: int, sizes: Sequence[int], count: int) -> Tensor:
    """bool (B, 1, size, size)."""
    if isinstance(mask, Image.Image):
        (mask,) = as_pictures("mask", mask)
        white = mask.convert("L").resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(white) >= 128)[None, None]
    given = described(mask)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask[None, None]
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1 and len(mask) in (1, count)
    if not fits or mask.shape[2] != mask.shape[3] or mask.shape[2] not in sizes:
        wanted = " or ".join(f"({side}, {side})" for side in sorted(set(sizes)))
        raise InputError(
            f"mask is {given}: give a PIL image, or a tensor {wanted}, or ({_one_or(count)}, 1, ...) of that "
            "size, with 1 where to paint and 0 elsewhere"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("the mask has values other than 0 and 1; give 1 where to paint and 0 elsewhere")
    return F.interpolate(mask.float(), (size, size), mode="nearest") == 1


def _one_or(count: int) -> str:
    return "1" if count == 1 else f"1 or {count}"
