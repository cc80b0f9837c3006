"""What the claims share: models of pictures that are named by a colour and a shape, and their grades."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from fastldm.evaluation.shapes_grader import Grade, compare, grade
from fastldm.evaluation.statistics import Score, mean
from fastldm.pictures import grid
from fastldm.reproduce.workspace import Workspace
from fastldm.systems.glide import GlidePipeline
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.config import LatentDiffusionConfig
from fastldm.training.data import derive_seed
from fastldm.training.datasets.shapes import PAIRS, PLACES, SIZES, Object, Scene, caption
from fastldm.training.latent_diffusion import LatentDiffusionTask

Pair = tuple[str, str]
STEPS = 20
_BATCH = 64


@dataclass(frozen=True)
class Sample:
    """A picture, the pair that was asked for, and what the picture shows."""

    pair: Pair
    picture: Image.Image
    shown: Grade

    @property
    def right(self) -> dict[str, bool]:
        """Attribute by attribute, then "all": one object, of this colour and this shape."""
        return compare(scene_of(self.pair), self.shown)

    @property
    def cell(self) -> tuple[str | None, str | None]:
        """The size and the place that the picture has chosen."""
        (thing,) = self.shown.scene.objects
        return thing.size, thing.place


def scene_of(pair: Pair) -> Scene:
    colour, shape = pair
    return Scene((Object(shape=shape, colour=colour),))


def words(pair: Pair) -> str:
    """The caption: "a red circle"."""
    return caption(scene_of(pair))


def label(pair: Pair) -> int:
    """The class: its place in `PAIRS`."""
    return PAIRS.index(pair)


def text_model(workspace: Workspace) -> tuple[Path, float]:
    """The folder of latent diffusion on captions, and the seconds it trained."""
    return workspace.trained(LatentDiffusionConfig, LatentDiffusionTask, "pairs-text")


def repeated(pairs: Sequence[Pair], times: int) -> list[Pair]:
    """Every pair `times` times, in rounds."""
    return [pair for _ in range(times) for pair in pairs]


def sample(
    pipeline: LatentDiffusionPipeline | GlidePipeline,
    wanted: Sequence[Pair],
    call: Callable[[Sequence[Pair]], Mapping[str, Any]],
    *,
    seed: int,
    description: str,
    progress: bool,
) -> list[Sample]:
    """One picture per pair, from noise that depends on `seed` and the pair's place in `wanted` only.

    Args:
        call: the arguments of the pipeline for some of the pairs, its `prompt` among them. They may set the
            number of steps, which is `STEPS`.
    """
    samples = []
    with tqdm(total=len(wanted), desc=description, unit="picture", disable=None if progress else True) as bar:
        for start in range(0, len(wanted), _BATCH):
            some = wanted[start : start + _BATCH]
            seeds = [derive_seed(seed, start + i) for i in range(len(some))]
            images = pipeline(
                **{"num_inference_steps": STEPS, **call(some)},
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                progress=False,
            ).images
            samples += [Sample(pair, image, grade(image)) for pair, image in zip(some, images)]
            bar.update(len(some))
    return samples


def by_caption(scale: float) -> Callable[[Sequence[Pair]], Mapping[str, Any]]:
    """`sample`'s call: the captions, at a scale of classifier-free guidance (1 = none)."""
    return lambda some: {"prompt": [words(pair) for pair in some], "guidance_scale": scale}


def score(samples: Sequence[Sample], attribute: str = "all") -> Score:
    return Score(sum(s.right[attribute] for s in samples), len(samples))


def diversity(samples: Sequence[Sample]) -> tuple[float | None, tuple[float, float]]:
    """The probability that two right pictures of one pair differ in size or place, and its 95% interval.

    Simpson's index without its bias (1949), the mean over pairs; what the caption leaves open is 1 - 1/8 =
    0.875 where all eight combinations are equally likely. The interval comes from the spread over pairs.
    Where every pair says the same, there is none, and the interval is Wilson's, of pictures taken two by two;
    with two right pictures of fewer than two pairs nothing is known, and the value is None.
    """
    cells: dict[Pair, list[int]] = {}
    for s in samples:
        if s.right["all"] and None not in s.cell:
            size, place = s.cell
            cells.setdefault(s.pair, []).append(SIZES.index(size) * len(PLACES) + PLACES.index(place))
    several = [found for found in cells.values() if len(found) > 1]
    values = [_simpson(found) for found in several]
    if len(values) < 2:
        return None, (0.0, 1.0)
    value, (low, high) = mean(values)
    if len(set(values)) == 1:
        twos = sum(len(found) // 2 for found in several)
        low, high = Score(round(value * twos), twos).interval
    return value, (min(value, max(0.0, low)), max(value, min(1.0, high)))


def _simpson(cells: Sequence[int]) -> float:
    n = len(cells)
    same = sum(cells.count(cell) - 1 for cell in cells)
    return 1 - same / (n * (n - 1))


def pictures(groups: Sequence[tuple[str, Sequence[Sample]]], columns: int) -> Image.Image:
    """The first samples of each group in a row; what is wrong is named in brackets."""
    shown = [(name, s) for name, samples in groups for s in samples[:columns]]
    captions = [f"{name}: {words(s.pair)}{_wrong(s)}" for name, s in shown]
    return grid([s.picture for _, s in shown], captions, columns=columns)


def _wrong(s: Sample) -> str:
    wrong = [name for name, right in s.right.items() if not right and name != "all"]
    return f" [wrong: {', '.join(wrong)}]" if wrong else ""
