"""Classifier-free guidance against CLIP guidance, of one text-conditioned model: accuracy and diversity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from fastldm.evaluation.statistics import difference
from fastldm.reproduce import pairs
from fastldm.reproduce.finding import Finding, Measurement, judge, says
from fastldm.reproduce.guidance import MEASURED, Arm, clip_guided, clip_model, compare, settings
from fastldm.reproduce.workspace import Workspace
from fastldm.training.datasets.shapes import SEEN_PAIRS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "cfg-vs-clip"
STATEMENT = "Classifier-free guidance by captions beats CLIP guidance."

_NONE, _CLIP, _FREE = "none", "CLIP", "classifier-free"
_FREE_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)


def run(workspace: Workspace) -> tuple[Finding, Image.Image]:
    guided, seconds = pairs.text_model(workspace)
    clip, clip_seconds = clip_model(workspace, guided, noised=True)
    arms = [
        Arm(_NONE, (1.0,), lambda some, scale: pairs.by_caption(scale)(some)),
        clip_guided(_CLIP, clip, captioned=True),
        Arm(_FREE, _FREE_SCALES, lambda some, scale: pairs.by_caption(scale)(some)),
    ]
    outcomes, measurements = compare(guided, arms, workspace)
    value, interval = difference(outcomes[_FREE].score, outcomes[_CLIP].score)
    measurements.append(Measurement("difference", {}, value, interval, MEASURED * len(SEEN_PAIRS)))
    holds = judge(interval)
    said = {}
    for name, outcome in outcomes.items():
        diversity, (low, high) = pairs.diversity(outcome.samples)
        even = (
            "unknown diversity"
            if diversity is None
            else f"diversity {diversity:.3f} ({low:.3f} to {high:.3f})"
        )
        said[name] = f"{100 * outcome.score.accuracy:.1f}% at {even}"
    verdict = (
        f"{says(holds)}. Colour and shape are both right in {said[_NONE]} of the pictures without "
        f"guidance, in {said[_CLIP]} with CLIP guidance (scale {outcomes[_CLIP].scale:g}) and in "
        f"{said[_FREE]} with classifier-free guidance (scale {outcomes[_FREE].scale:g}). Against CLIP "
        f"guidance that is {100 * value:+.1f} points (95% interval {100 * interval[0]:.1f} to "
        f"{100 * interval[1]:.1f}). Diversity is the probability that two right pictures of a caption "
        "differ in size or place; 0.875 is even."
    )
    about = settings(
        **{
            "training seconds": {"diffusion": seconds, "noised CLIP": clip_seconds},
            "configurations": ["pairs-text", "pairs-clip"],
        }
    )
    finding = Finding(NAME, STATEMENT, holds, verdict, measurements, about, workspace.seed)
    return finding, pairs.pictures([(name, o.samples) for name, o in outcomes.items()], columns=8)


def plot(finding: Finding) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name in (_CLIP, _FREE, _NONE):
        accuracy = finding.select("accuracy", guidance=name, stage="tried")
        diversity = finding.select("diversity", guidance=name, stage="tried")
        known = [(a, d) for a, d in zip(accuracy, diversity) if d.value is not None]
        x, y = [d.value for _, d in known], [100 * a.value for a, _ in known]
        (line,) = axes.plot(x, y, marker="o", label=f"guidance: {name}")
        for (row, _), at in zip(known, zip(x, y)):
            axes.annotate(
                f"{row.setting['scale']:g}",
                at,
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=line.get_color(),
            )
    axes.set_xlabel("diversity: two right pictures differ in size or place")
    axes.set_ylabel("colour and shape right, %")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
