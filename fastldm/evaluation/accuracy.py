"""How often a model draws what the caption says, on captions of the built-in shapes.

Three kinds of pictures are graded for the same scenes: fresh renders (which measures the grader itself),
their reconstructions by the first stage (the best the diffusion can reach) and what the model draws from the
captions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fastldm.errors import InputError
from fastldm.evaluation.shapes_grader import matches
from fastldm.evaluation.statistics import Score
from fastldm.io import atomic_write
from fastldm.models.conditioners import TextConditioner
from fastldm.pictures import grid, png_bytes, to_pil
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.text import as_table
from fastldm.training.data import derive_seed
from fastldm.training.datasets.shapes import CaptionedShapes, Kind, Split

SETS: tuple[tuple[Kind, Split], ...] = (
    ("one", "seen"),
    ("one", "held-out"),
    ("two", "seen"),
    ("two", "held-out"),
)
ATTRIBUTES = ("count", "colour", "shape", "size", "place", "relation", "all")
_EXAMPLES = 8


@dataclass(frozen=True)
class Row:
    """The scores of one set of captions.

    `pictures` is "renders", "reconstructions" or "samples"; `guidance_scale` is None except for samples.
    """

    pictures: str
    kind: Kind
    split: Split
    guidance_scale: float | None
    scores: dict[str, Score]


@dataclass(frozen=True)
class Example:
    """A sample, the caption it was made for and the attributes that came out wrong."""

    picture: Image.Image
    caption: str
    wrong: tuple[str, ...]


@dataclass
class AccuracyReport:
    """What `evaluate` found; `str()` gives the table, `to_dict()` plain values for JSON."""

    num_captions: int
    num_inference_steps: int
    seed: int
    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def to_dict(self) -> dict:
        return {
            "num_captions": self.num_captions,
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "rows": [
                {
                    "pictures": row.pictures,
                    "kind": row.kind,
                    "split": row.split,
                    "guidance_scale": row.guidance_scale,
                    "scores": {
                        name: {
                            "accuracy": score.accuracy,
                            "interval": list(score.interval),
                            "right": score.right,
                            "total": score.total,
                        }
                        for name, score in row.scores.items()
                    },
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        header = ["pictures", "captions", "guidance", *ATTRIBUTES, "95% interval of all"]
        lines = [header]
        for row in self.rows:
            guidance = "" if row.guidance_scale is None else f"{row.guidance_scale:g}"
            cells = [_percent(row.scores[name].accuracy) if name in row.scores else "" for name in ATTRIBUTES]
            low, high = row.scores["all"].interval
            interval = f"{_percent(low)} to {_percent(high)}"
            lines.append([row.pictures, f"{row.kind}, {row.split}", guidance, *cells, interval])
        about = f"{self.num_captions} captions each, {self.num_inference_steps} steps, seed {self.seed}; in %"
        return f"{about}\n{as_table(lines)}"

    def save_examples(self, path: str | os.PathLike) -> None:
        """A PNG with some samples of every set, captions below; what came out wrong is named in brackets."""
        captions = [e.caption + (f" [wrong: {', '.join(e.wrong)}]" if e.wrong else "") for e in self.examples]
        atomic_write(path, png_bytes(grid([e.picture for e in self.examples], captions, columns=_EXAMPLES)))


def evaluate(
    pipeline: LatentDiffusionPipeline,
    *,
    num_captions: int = 512,
    sets: Sequence[tuple[Kind, Split]] = SETS,
    guidance_scales: Sequence[float] | None = None,
    num_inference_steps: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> AccuracyReport:
    """Grades a text-conditioned pipeline on fresh canonical captions of the built-in shapes.

    All noise of a picture depends on `seed` and its caption's number only, not on the guidance scale or the
    batch size.

    Args:
        num_captions: of each set.
        sets: (kind, split) pairs of `CaptionedShapes`; split "train" would not be fresh and is refused.
        guidance_scales: each is evaluated; None = the model's own default.
        num_inference_steps: None = the model's own default.

    Raises:
        InputError: an argument cannot be used.
    """
    for name, value in (("num_captions", num_captions), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    for kind, split in sets:
        if (kind, split) not in SETS:
            known = "; ".join(map(", ".join, SETS))
            raise InputError(f"captions '{kind}, {split}' are not offered for evaluation; known are {known}")
    if not isinstance(pipeline.conditioner, TextConditioner):
        raise InputError(
            f"{type(pipeline.conditioner).__name__} takes no captions; evaluate a model with text"
        )
    scales = [pipeline.defaults["guidance_scale"]] if guidance_scales is None else guidance_scales
    steps = pipeline.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    report = AccuracyReport(num_captions, steps, seed)
    with tqdm(
        total=len(sets) * num_captions * (2 + len(scales)), disable=not progress, unit="picture"
    ) as bar:
        for kind, split in sets:
            data = CaptionedShapes(split, kind, _picture_size(pipeline), num_captions, seed)
            scenes, captions, renders = zip(*(data.draw(index) for index in range(num_captions)))
            seeds = [derive_seed(seed, SETS.index((kind, split)), index) for index in range(num_captions)]
            groups = [
                ("renders", None, renders),
                ("reconstructions", None, _reconstruct(pipeline, renders, batch_size)),
            ]
            groups += [
                ("samples", s, _sample(pipeline, captions, s, steps, batch_size, seeds)) for s in scales
            ]
            for pictures, scale, images in groups:
                bar.set_description(f"{pictures}, {kind}, {split}")
                results = []
                for scene, caption, image in zip(scenes, captions, images):
                    result = matches(scene, image)
                    if pictures == "samples" and len(results) < _EXAMPLES:
                        wrong = tuple(name for name, right in result.items() if not right and name != "all")
                        report.examples.append(Example(image, caption, wrong))
                    results.append(result)
                    bar.update()
                report.rows.append(Row(pictures, kind, split, scale, _tally(results)))
    return report


def _picture_size(pipeline: LatentDiffusionPipeline) -> int:
    latent = pipeline.unet.config.sample_size
    if not isinstance(latent, int):
        raise InputError(f"the model draws no square pictures (sample_size {latent}); the shapes are square")
    return latent * pipeline.downsample_factor


def _reconstruct(
    pipeline: LatentDiffusionPipeline, pictures: Sequence[Image.Image], batch_size: int
) -> Iterator[Image.Image]:
    for start in range(0, len(pictures), batch_size):
        pixels = np.stack([np.asarray(p, np.float32) for p in pictures[start : start + batch_size]])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        yield from to_pil(pipeline.decode(pipeline.encode(images)))


def _sample(
    pipeline: LatentDiffusionPipeline,
    captions: Sequence[str],
    guidance_scale: float,
    steps: int,
    batch_size: int,
    seeds: Sequence[int],
) -> Iterator[Image.Image]:
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        images = pipeline(
            prompt=list(captions[batch]),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds[batch]],
            output_type="np",
            progress=False,
        ).images
        pixels = (np.nan_to_num(images) * 255).round().clip(0, 255).astype(np.uint8)
        yield from map(Image.fromarray, pixels)


def _tally(results: Sequence[dict[str, bool]]) -> dict[str, Score]:
    right = Counter(name for result in results for name, value in result.items() if value)
    return {name: Score(right[name], len(results)) for name in ATTRIBUTES if name in results[0]}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
