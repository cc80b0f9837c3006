"""Folders of pictures in the Hugging Face `imagefolder` layout.

Three layouts are read:

    folder/metadata.jsonl + pictures
        captions: one JSON object a line, {"file_name": "0001.png", "text": "..."}
    folder/<class>/pictures
        labels: the index of the class folder's name in sorted order
    folder/pictures
        neither

Everything that can be checked without decoding a picture is checked when the data set is made, so that a typo
ends a training before it starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fastldm.errors import InputError
from fastldm.io import atomic_folder
from fastldm.pictures import as_square, to_pil

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = "metadata.jsonl"
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageFolder(torch.utils.data.Dataset):
    """Pictures of a folder, scaled so that the shorter side is `size` and cropped around the centre.

    Args:
        folder: one of the layouts of this module.
        size: side of the square pictures in pixels. Pictures are never enlarged.
        caption_column: key of the caption in the lines of metadata.jsonl.
        random_flip: every picture also occurs mirrored, as item `len // 2 + index`, so that a shuffled epoch
            shows both and an item remains a function of its index.

    Items are {"image": float32 (3, size, size) in [-1, 1]}, with "caption" (str) or "label" (int) where the
    folder has captions or classes. `classes` lists the class names.

    Raises:
        InputError: the folder is missing or empty, a line of the metadata is malformed, lacks the caption or
            names no file, a picture has no line, cannot be read, or is smaller than `size`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        size: int,
        *,
        caption_column: str = "text",
        random_flip: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.size = size
        self.random_flip = random_flip
        self.classes: list[str] = []
        self._conditions: list[dict[str, str | int]]
        if self.folder.is_file():
            raise InputError(f"{self.folder} is a file; give the folder that the pictures lie in")
        if not self.folder.is_dir():
            raise InputError(f"image folder {self.folder} does not exist; give a folder of pictures")
        if (self.folder / METADATA).is_file():
            self._paths, self._conditions = _read_metadata(self.folder, caption_column)
        elif (self.folder / "metadata.csv").is_file():
            raise InputError(f"{self.folder / 'metadata.csv'} is not read; write the captions as {METADATA}")
        else:
            self._paths, self._conditions, self.classes = _read_classes(self.folder)
        shorter = [_check_header(path) for path in self._paths]
        small = [side for side in shorter if side < size]
        if small:
            first = self._paths[shorter.index(small[0])]
            raise InputError(
                f"{first} is {small[0]} pixels on its shorter side; the training size is {size} "
                f"({len(small)} of {len(shorter)} pictures are smaller); set data.size to at most "
                f"{min(small)}, or enlarge or remove them"
            )

    def __len__(self) -> int:
        return len(self._paths) * (2 if self.random_flip else 1)

    @property
    def captions(self) -> list[str]:
        """The caption of every picture; empty where the folder has none."""
        return [condition["caption"] for condition in self._conditions if "caption" in condition]

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again: the number of pictures, and the SHA-256 of their names with
        captions or labels, in order. The pictures themselves are not read."""
        digest = hashlib.sha256()
        for path, condition in zip(self._paths, self._conditions):
            name = path.relative_to(self.folder).as_posix()
            digest.update(json.dumps([name, *condition.values()]).encode() + b"\n")
        return {"pictures": len(self._paths), "sha256": digest.hexdigest()}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} items")
        mirror, place = divmod(index, len(self._paths))
        picture = _load(self._paths[place], self.size)
        if mirror:
            picture = ImageOps.mirror(picture)
        pixels = np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1
        return {"image": torch.from_numpy(np.ascontiguousarray(pixels)), **self._conditions[place]}


def export_image_folder(dataset: torch.utils.data.Dataset, folder: str | os.PathLike) -> None:
    """Writes {"image", "caption"} items as PNG files with metadata.jsonl, all or nothing.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; give a new folder")
    digits = max(5, len(str(len(dataset) - 1)))
    with atomic_folder(folder) as target, open(target / METADATA, "w", encoding="utf-8") as metadata:
        for index in range(len(dataset)):
            item = dataset[index]
            name = f"{index:0{digits}d}.png"
            to_pil(item["image"][None])[0].save(target / name)
            metadata.write(
                json.dumps({"file_name": name, "text": item["caption"]}, ensure_ascii=False) + "\n"
            )


def _read_metadata(folder: Path, column: str) -> tuple[list[Path], list[dict[str, str | int]]]:
    source = folder / METADATA
    paths, conditions = [], []
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(
                f'{where} does not name a picture; write {{"file_name": "...", "{column}": "..."}}'
            )
        if row.get(column) is None:
            others = ", ".join(key for key in row if key not in ("file_name", column)) or "none"
            raise InputError(
                f"{where} has no caption {column!r} for {row['file_name']} (other keys: {others})"
            )
        if not isinstance(row[column], str):
            raise InputError(
                f"{where}: the caption {column!r} of {row['file_name']} is {json.dumps(row[column])}, which "
                "is not text; write it in quotes"
            )
        path = folder / row["file_name"]
        if not path.is_file():
            raise InputError(f"{where} names {row['file_name']}, which does not exist in {folder}")
        paths.append(path)
        conditions.append({"caption": row[column]})
    if not paths:
        raise InputError(f"{source} is empty; write one line a picture")
    named = {path.resolve() for path in paths}
    unnamed = [path for path in _pictures(folder) if path.resolve() not in named]
    if unnamed:
        raise InputError(f"{unnamed[0]} has no line in {source} ({len(unnamed)} such pictures in all)")
    return paths, conditions


def _read_classes(folder: Path) -> tuple[list[Path], list[dict[str, str | int]], list[str]]:
    paths = _pictures(folder)
    if not paths:
        raise InputError(f"{folder} has no pictures ({', '.join(sorted(EXTENSIONS))})")
    within = [path.relative_to(folder).parts for path in paths]
    classes = sorted({parts[0] for parts in within if len(parts) > 1})
    loose = [path for path, parts in zip(paths, within) if len(parts) == 1]
    if classes and loose:
        beside = f"{loose[0]} lies beside the class folder {classes[0]}"
        raise InputError(f"{beside}; move all pictures into class folders, or none")
    return paths, [{"label": classes.index(parts[0])} if classes else {} for parts in within], classes


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def _check_header(path: Path) -> int:
    """The shorter side of a picture that can be trained on, in pixels."""
    try:
        with Image.open(path) as picture:
            shorter, mode = min(picture.size), picture.mode
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if mode not in _MODES:
        raise InputError(f"{path} has pixels of type {mode}; save it with 8 bits per channel")
    return shorter


def _load(path: Path, size: int) -> Image.Image:
    try:
        with Image.open(path) as file:
            return as_square(ImageOps.exif_transpose(file), size)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    # A run is resumed only on the names that it began with.
    return InputError(
        f"{path} cannot be read as a picture ({' '.join(str(error).split())}); replace it (a run can then be "
        f"resumed), or remove it, and its line in {METADATA} if it has one"
    )
