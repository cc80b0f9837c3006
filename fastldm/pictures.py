"""Tensors to pictures, pictures to captioned grids and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from fastldm.checks import described
from fastldm.errors import InputError

_INK = (30, 30, 30)
_PAPER = (255, 255, 255)
_LINE = 11
_LETTER = 6


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Float pictures (B, 3, H, W) in [-1, 1] to 8-bit RGB."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).cpu().contiguous()]


def as_pictures(name: str, given: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """PIL image(s) as a list; InputError for anything else, for none, for one without pixels, and for one of
    whole numbers of 16 or 32 bits or of floats, which PIL cuts off at 255 on the way to 8 bits."""
    pictures: Any = [given] if isinstance(given, Image.Image) else given
    listed = isinstance(pictures, Sequence) and not isinstance(pictures, str)
    if not listed or not pictures or not all(isinstance(p, Image.Image) for p in pictures):
        what = f"a {type(given).__name__} of {len(given)}" if listed else described(given)
        raise InputError(f"{name} must be a PIL image, a list of them, or a tensor (B, C, H, W), not {what}")
    for picture in pictures:
        if 0 in picture.size:
            raise InputError(f"{name}: a picture of {picture.width}x{picture.height} pixels shows nothing")
        if picture.mode[0] in "IF":
            raise InputError(
                f"{name}: a picture of mode {picture.mode} has no known range; give one of 8 bits, such as "
                "of mode RGB or L"
            )
    return list(pictures)


def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent stands on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*_PAPER, 255)), picture)
    return picture.convert("RGB")


def check_range(name: str, pictures: torch.Tensor) -> torch.Tensor:
    """The float pictures if they can be in [-1, 1]: InputError for NaN, infinity, and for numbers from 2 on,
    farther out than any resizing of such pictures takes them."""
    largest = pictures.detach().abs().amax().item() if pictures.numel() else 0.0
    if not largest < 2:
        what = f"numbers up to {largest:.3g}" if math.isfinite(largest) else "NaN or infinity"
        raise InputError(f"{name} hold {what}: give pictures in [-1, 1]")
    return pictures


def from_pil(pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures as RGB, squeezed or stretched to squares (bicubic), float32 (B, 3, size, size) in [-1, 1]."""
    return as_tensor([as_rgb(p).resize((size, size), Image.Resampling.BICUBIC) for p in pictures])


def as_square(picture: Image.Image, size: int) -> Image.Image:
    """The picture as RGB, its shorter side made `size` (bicubic), and its centre cut out."""
    return ImageOps.fit(as_rgb(picture), (size, size), Image.Resampling.BICUBIC)


def as_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size, float32 (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures]))
    return pixels.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Pictures of one size in rows, each with its caption below, wrapped to the picture's width.

    Args:
        pictures: at least one.
        captions: one per picture, or None.
        columns: pictures per row; None makes the grid about square.
        scale: integer magnification without smoothing; None = 2 below 128 pixels, else 1.
    """
    width, height = pictures[0].size
    scale = scale or (2 if width < 128 else 1)
    width, height = width * scale, height * scale
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    texts = [_wrap(text, width // _LETTER) for text in captions] if captions is not None else []
    band = _LINE * max((len(lines) for lines in texts), default=0) + (4 if texts else 0)
    gap = 4
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + band + gap) + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + band + gap)
        canvas.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        for j, line in enumerate(texts[i] if texts else ()):
            draw.text((x, y + height + 2 + j * _LINE), line, fill=_INK)
    return canvas


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _wrap(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if len(joined) <= letters or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines
