"""The pictures and numbers of these pages that no claim makes: `python docs/measure.py RUNS`.

RUNS holds the runs that the pages' training commands make: shapes-glide, shapes-glide-upsampler,
glide-inpainting, shapes-classifier, shapes-clip. Writes results/systems.json and images/*.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastldm.evaluation.statistics import Score
from fastldm.pictures import grid
from fastldm.reproduce import pairs
from fastldm.systems import ClassifierGuide, CLIPScorer, GlidePipeline, LatentDiffusionPipeline
from fastldm.training.datasets.shapes import HELD_OUT_PAIRS, PAIRS, PLACES, SEEN_PAIRS, SIZES, CaptionedShapes

HERE = Path(__file__).resolve().parent
PICTURES = 168
SETS = {"seen": SEEN_PAIRS, "held-out": HELD_OUT_PAIRS}
COLUMNS = 8
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)


def measure_glide(runs: Path) -> list[dict]:
    """Captions that the base has seen and pairs that it has not, at both sizes."""
    glide = GlidePipeline.from_parts(runs / "shapes-glide/model", runs / "shapes-glide-upsampler/model")
    base = GlidePipeline(glide.tokenizer, glide.base, defaults=glide.defaults)
    rows, shown = [], []
    for split, known in SETS.items():
        wanted = pairs.repeated(known, PICTURES // len(known))
        for stage, pipeline in (("base", base), ("upsampler", glide)):
            samples = drawn(
                pipeline, wanted, lambda some: {"prompt": [pairs.words(pair) for pair in some]}, stage
            )
            rows += scored("glide", samples, stage=stage, pairs=split)
            shown += samples[:COLUMNS]
    small = [s.picture.resize((64, 64), Image.Resampling.NEAREST) for s in shown]
    save("glide", grid(small, [pairs.words(s.pair) for s in shown], columns=COLUMNS))
    return rows


def measure_inpainting(runs: Path) -> list[dict]:
    """A corner with an object is painted anew: another colour and shape."""
    glide = GlidePipeline.from_parts(runs / "glide-inpainting/model", runs / "shapes-glide-upsampler/model")
    data = CaptionedShapes("seen", "one", glide.size, PICTURES)
    drawings = [data.draw(index) for index in range(PICTURES)]
    pictures = [picture for _, _, picture in drawings]
    masks = [corner(scene.objects[0].place, glide.size) for scene, _, _ in drawings]
    wanted = pairs.repeated(SEEN_PAIRS, PICTURES // len(SEEN_PAIRS))
    given = iter(zip(pictures, masks))

    def call(some: Sequence[pairs.Pair]) -> Mapping[str, Any]:
        images, erase = zip(*islice(given, len(some)))
        return {
            "prompt": [pairs.words(pair) for pair in some],
            "image": images,
            "mask": torch.from_numpy(np.stack(erase))[:, None],
        }

    samples = drawn(glide, wanted, call, "inpainting")
    erased = [
        Image.fromarray(np.where(mask[..., None], 128, np.asarray(picture)).astype(np.uint8))
        for picture, mask in zip(pictures, masks)
    ]
    rows = [pictures[:COLUMNS], erased[:COLUMNS], [s.picture for s in samples[:COLUMNS]]]
    captions = ["given"] * COLUMNS + ["erased"] * COLUMNS + [pairs.words(s.pair) for s in samples[:COLUMNS]]
    save("glide-inpainting", grid([picture for row in rows for picture in row], captions, columns=COLUMNS))
    return scored("inpainting", samples, pairs="seen")


def measure_classifier(runs: Path) -> list[dict]:
    """The shipped model, told nothing and led by the classifier."""
    pipeline = LatentDiffusionPipeline.from_pretrained("shapes")
    guide = ClassifierGuide.from_pretrained(runs / "shapes-classifier/model")
    wanted = pairs.repeated(SEEN_PAIRS, PICTURES // len(SEEN_PAIRS))
    rows, shown = [], []
    for scale in CLASSIFIER_SCALES:

        def call(some: Sequence[pairs.Pair], scale: float = scale) -> Mapping[str, Any]:
            return {
                "prompt": [""] * len(some),
                "guidance_scale": 1.0,
                "gradient": guide.gradient([" ".join(pair) for pair in some]),
                "gradient_scale": scale,
            }

        samples = drawn(pipeline, wanted, call, f"classifier, scale {scale:g}")
        rows += scored("classifier", samples, scale=scale)
        shown += [(f"scale {scale:g}: {' '.join(s.pair)}", s.picture) for s in samples[:COLUMNS]]
    captions, pictures = zip(*shown)
    save("classifier-guidance", grid(pictures, captions, columns=COLUMNS))
    return rows


def measure_clip(runs: Path) -> list[dict]:
    """Zero-shot: which of the 24 pairs a picture shows, by captions with every size and place."""
    clip = CLIPScorer.from_pretrained(runs / "shapes-clip/model")
    templates = [f"a {size} {{}} at the {place}" for size in SIZES for place in PLACES]
    rows = []
    for split in SETS:
        data = CaptionedShapes(split, "one", 64, PICTURES)
        drawings = [data.draw(index) for index in range(PICTURES)]
        found = clip.classify(
            [picture for _, _, picture in drawings], [" ".join(pair) for pair in PAIRS], templates=templates
        ).argmax(dim=1)
        truth = torch.tensor([PAIRS.index((s.objects[0].colour, s.objects[0].shape)) for s, _, _ in drawings])
        rows.append(row("clip", Score(int((found == truth).sum()), PICTURES), pairs=split))
    return rows


def drawn(pipeline: Any, wanted: Sequence[pairs.Pair], call: Any, description: str) -> list[pairs.Sample]:
    def with_own_steps(some: Sequence[pairs.Pair]) -> Mapping[str, Any]:
        return {**call(some), "num_inference_steps": None}

    return pairs.sample(pipeline, wanted, with_own_steps, seed=0, description=description, progress=True)


def scored(system: str, samples: Sequence[pairs.Sample], **about: Any) -> list[dict]:
    """Colour, shape and both right; of the pictures with one object."""
    return [
        row(system, pairs.score(samples, attribute), **about, attribute=attribute)
        for attribute in ("count", "colour", "shape", "all")
    ]


def row(system: str, score: Score, **about: Any) -> dict:
    return {
        "system": system,
        **about,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "right": score.right,
        "total": score.total,
    }


def corner(place: str, size: int) -> np.ndarray:
    """bool (size, size): the quarter of a picture that an object at this place is in, and a margin."""
    vertical, horizontal = place.split()
    mask = np.zeros((size, size), bool)
    reach = size * 5 // 8
    rows = slice(0, reach) if vertical == "top" else slice(size - reach, size)
    columns = slice(0, reach) if horizontal == "left" else slice(size - reach, size)
    mask[rows, columns] = True
    return mask


def save(name: str, picture: Image.Image) -> None:
    path = HERE / "images" / f"{name}.png"
    picture.save(path, optimize=True)
    print(path)


SYSTEMS = {
    "glide": measure_glide,
    "inpainting": measure_inpainting,
    "classifier": measure_classifier,
    "clip": measure_clip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", choices=SYSTEMS, nargs="+", default=list(SYSTEMS))
    arguments = parser.parse_args()
    results = HERE / "results" / "systems.json"
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    for system in arguments.only:
        rows = [r for r in rows if r["system"] != system] + SYSTEMS[system](arguments.runs)
        results.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    for r in rows:
        about = " ".join(str(v) for k, v in r.items() if k not in ("accuracy", "interval", "right", "total"))
        print(f"{about}: {100 * r['accuracy']:.1f}% ({r['right']} of {r['total']})")


if __name__ == "__main__":
    main()
