"""Which picture comes when: an endless stream of batches, a function of the seed and the position alone."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastldm.errors import ConfigError
from fastldm.models.captions import CutCaptionWarning
from fastldm.training.config import DataConfig
from fastldm.training.datasets import CaptionedShapes, ImageFolder
from fastldm.training.datasets.shapes import PAIRS, vocabulary

_CAPTIONS_AT_ONCE = 1024
_WORKERS_PER_CORE = 8


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, such as (seed, step, micro-step, process)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class StreamSampler(Sampler[list[int]]):
    """Batches of an endless walk through shuffled epochs, from any position on.

    The walk is one permutation of the data set per epoch, drawn from (seed, epoch). Micro-step m takes the
    next `batch_size * processes` entries of the walk, of which process r gets the r-th run of `batch_size`.
    A batch may span two epochs, so no picture is left out.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, process: int = 0, processes: int = 1, start: int = 0
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self.processes = processes
        self.start = start

    def batch(self, micro_step: int) -> list[int]:
        first = (micro_step * self.processes + self.process) * self.batch_size
        positions = range(first, first + self.batch_size)
        return [
            int(_permutation(self.length, self.seed, p // self.length)[p % self.length]) for p in positions
        ]

    def __iter__(self) -> Iterator[list[int]]:
        micro_step = self.start
        while True:
            yield self.batch(micro_step)
            micro_step += 1


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def batches(dataset: Dataset, sampler: StreamSampler, *, num_workers: int = 0) -> Iterator[dict]:
    """Collated batches in the sampler's order: tensors stacked, captions as lists of str."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=default_collate,
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but training needs its readers for one more step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_dataset(data: DataConfig, seed: int) -> Dataset:
    """The data set of a configuration; its items hold "image", and "caption" or "label".

    Raises:
        ConfigError: no path of a folder, or more reading processes than this machine can run.
        InputError: the folder cannot be trained on, see `ImageFolder`.
    """
    most = _WORKERS_PER_CORE * (os.cpu_count() or 1)
    if data.num_workers > most:
        raise ConfigError(
            f"data.num_workers={data.num_workers} for {os.cpu_count()} cores; give at most {most}, or 0 to "
            "read in the training process"
        )
    if data.source == "shapes":
        return CaptionedShapes("train", data.kind, data.size, data.length, seed, data.attributes)
    if data.path is None:
        raise ConfigError(
            "data.source=image_folder needs data.path, a folder of pictures with metadata.jsonl"
        )

    return ImageFolder(data.path, data.size, random_flip=data.random_flip)


def captions_of(pictures: Any) -> Sequence[str]:
    """Captions that between them hold every word of a data set."""
    if isinstance(pictures, CaptionedShapes):
        return [" ".join(vocabulary())]
    return pictures.captions


def warn_of_long_captions(pictures: Any, tokenizer: Callable[[Sequence[str]], Any], remedy: str) -> None:
    """Say once how many captions of a data set are longer than the tokenizer's window; of the shapes, which
    are drawn as they are asked for, of a hundred.

    Args:
        remedy: what sets the window, and whether that can be changed.
    """
    if isinstance(pictures, CaptionedShapes):
        captions = [pictures.draw(index)[1] for index in range(min(len(pictures), 100))]
    else:
        captions = pictures.captions
    cut = 0
    for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", CutCaptionWarning)
            tokenizer(captions[start : start + _CAPTIONS_AT_ONCE])
        cut += len(said)
    if cut:
        warnings.warn(
            f"{cut} of {len(captions)} captions are longer than the text window, and their ends are not "
            f"read; {remedy}",
            stacklevel=2,
        )


def classes_of(pictures: Any) -> list[str]:
    """The name of every label of a data set, in their order; empty where it has none.

    Raises:
        ConfigError: for pictures of two objects, which have no single class.
    """
    if isinstance(pictures, CaptionedShapes):
        if pictures.kind != "one":
            raise ConfigError(
                f"data.kind={pictures.kind} has pictures of two objects, which have no single class; use "
                "data.kind=one"
            )
        return [" ".join(pair) for pair in PAIRS]
    return pictures.classes
