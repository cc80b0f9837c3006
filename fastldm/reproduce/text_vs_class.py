"""Text conditioning composes what class labels cannot.

Two models of one size see the same pictures of 21 pairs of a colour and a shape, as often. One is told the
pair in words ("a purple circle"), the other by a label per pair. Then both are asked for the three pairs that
neither has seen; each word of them was in other captions, while their labels never came up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastldm.evaluation.statistics import difference
from fastldm.reproduce import pairs
from fastldm.reproduce.finding import Finding, Measurement, judge, says
from fastldm.reproduce.workspace import Workspace
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.config import LatentDiffusionConfig
from fastldm.training.datasets.shapes import HELD_OUT_PAIRS, PAIRS, SEEN_PAIRS
from fastldm.training.latent_diffusion import LatentDiffusionTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "text-vs-class"
STATEMENT = "Text conditioning draws combinations that were never in the training data; class labels cannot."

_PICTURES = 252
_SCALE = 2.0
_CLASS = (
    "name=pairs-class",
    f"conditioner={{kind: class, config: {{num_classes: {len(PAIRS)}, embed_dim: 128}}}}",
    "sampling.prompts=[0, 1, 2, 3]",
)
_SETS = {"seen": SEEN_PAIRS, "held-out": HELD_OUT_PAIRS}


def run(workspace: Workspace) -> tuple[Finding, Image.Image]:
    text, text_seconds = pairs.text_model(workspace)
    labels, class_seconds = workspace.trained(
        LatentDiffusionConfig, LatentDiffusionTask, "pairs-text", _CLASS
    )
    models = {
        "text": (LatentDiffusionPipeline.from_pretrained(text), pairs.by_caption(_SCALE)),
        "class": (LatentDiffusionPipeline.from_pretrained(labels), _by_label),
    }
    measurements, scores, groups = [], {}, []
    for split, known in _SETS.items():
        wanted = pairs.repeated(known, _PICTURES // len(known))
        for name, (pipeline, call) in models.items():
            samples = pairs.sample(
                pipeline,
                wanted,
                call,
                seed=workspace.draw_seed(0),
                description=f"{name}, {split}",
                progress=workspace.progress,
            )
            for attribute in ("colour", "shape", "all"):
                score = pairs.score(samples, attribute)
                measurements.append(
                    Measurement.of_score("accuracy", score, model=name, split=split, attribute=attribute)
                )
            scores[name, split] = pairs.score(samples)
            groups.append((name, samples))
    value, interval = difference(scores["text", "held-out"], scores["class", "held-out"])
    measurements.append(Measurement("difference", {"split": "held-out"}, value, interval, _PICTURES))
    holds = judge(interval)
    percent = {key: f"{100 * score.accuracy:.1f}%" for key, score in scores.items()}
    verdict = (
        f"{says(holds)}. On pairs of colour and shape that were never shown, colour and shape are both "
        f"right in {percent['text', 'held-out']} of the pictures with text and "
        f"{percent['class', 'held-out']} with class labels: a difference of {100 * value:.1f} points (95% "
        f"interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}). On pairs from the training data it "
        f"is {percent['text', 'seen']} and {percent['class', 'seen']}."
    )
    settings = {
        "pictures per model and set": _PICTURES,
        "guidance scale": _SCALE,
        "sampling steps": pairs.STEPS,
        "training seconds": {"text": text_seconds, "class": class_seconds},
        "configuration": "pairs-text",
    }
    finding = Finding(NAME, STATEMENT, holds, verdict, measurements, settings, workspace.seed)
    return finding, pairs.pictures(groups, columns=8)


def _by_label(some: Sequence[pairs.Pair]) -> Mapping[str, Any]:
    return {"prompt": [pairs.label(pair) for pair in some], "guidance_scale": _SCALE}


def plot(finding: Finding) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for offset, model in ((-0.18, "text"), (0.18, "class")):
        rows = [finding.select("accuracy", model=model, split=split, attribute="all")[0] for split in _SETS]
        heights = [100 * row.value for row in rows]
        errors = [
            [max(0.0, 100 * (row.value - row.interval[0])) for row in rows],
            [max(0.0, 100 * (row.interval[1] - row.value)) for row in rows],
        ]
        places = [i + offset for i in range(len(rows))]
        axes.bar(places, heights, width=0.34, yerr=errors, capsize=4, label=f"{model} conditioning")
    axes.set_xticks(range(len(_SETS)), [f"{split} pairs" for split in _SETS])
    axes.set_ylabel("colour and shape right, %")
    axes.set_ylim(0, 105)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
