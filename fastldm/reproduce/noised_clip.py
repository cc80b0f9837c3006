"""CLIP guidance needs a CLIP that was trained on noised images.

Two CLIPs of one size see the same pairs of picture and caption, as often: one the clean latents, the other
latents noised as in diffusion, with the timestep. Each alone has to make the model, which is not told the
caption, draw what the caption says.
"""

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

NAME = "noised-clip"
STATEMENT = "CLIP guidance needs a CLIP retrained on noised images."

_CLEAN, _NOISED, _NONE = "clean CLIP", "noised CLIP", "none"


def run(workspace: Workspace) -> tuple[Finding, Image.Image]:
    guided, seconds = pairs.text_model(workspace)
    clean, clean_seconds = clip_model(workspace, guided, noised=False)
    noised, noised_seconds = clip_model(workspace, guided, noised=True)
    arms = [
        Arm(_NONE, (1.0,), lambda some, scale: {"prompt": [""] * len(some), "guidance_scale": scale}),
        clip_guided(_CLEAN, clean, captioned=False),
        clip_guided(_NOISED, noised, captioned=False),
    ]
    outcomes, measurements = compare(guided, arms, workspace)
    value, interval = difference(outcomes[_NOISED].score, outcomes[_CLEAN].score)
    measurements.append(Measurement("difference", {}, value, interval, MEASURED * len(SEEN_PAIRS)))
    holds = judge(interval)
    percent = {name: f"{100 * outcome.score.accuracy:.1f}%" for name, outcome in outcomes.items()}
    verdict = (
        f"{says(holds)}. A model that is not told the caption draws its colour and shape in "
        f"{percent[_NONE]} of "
        f"the pictures by chance; guided by a CLIP that knows clean images only in {percent[_CLEAN]} "
        f"(at its best "
        f"scale, {outcomes[_CLEAN].scale:g}), by one trained on noised images in {percent[_NOISED]} (scale "
        f"{outcomes[_NOISED].scale:g}): {100 * value:.1f} points more (95% interval "
        f"{100 * interval[0]:.1f} to "
        f"{100 * interval[1]:.1f})."
    )
    about = settings(
        **{
            "training seconds": {
                "diffusion": seconds,
                _CLEAN: clean_seconds,
                _NOISED: noised_seconds,
            },
            "configurations": ["pairs-text", "pairs-clip"],
        }
    )
    finding = Finding(NAME, STATEMENT, holds, verdict, measurements, about)
    return finding, pairs.pictures([(name, o.samples) for name, o in outcomes.items()], columns=8)


def plot(finding: Finding) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name in (_CLEAN, _NOISED):
        rows = finding.select("accuracy", guidance=name, stage="tried")
        scales = [row.setting["scale"] for row in rows]
        axes.plot(scales, [100 * row.value for row in rows], marker="o", label=f"guided by {name}")
        low, high = ([100 * row.interval[i] for row in rows] for i in (0, 1))
        axes.fill_between(scales, low, high, alpha=0.2)
    (chance,) = finding.select("accuracy", guidance=_NONE, stage="tried")
    axes.axhline(100 * chance.value, linestyle=":", color="grey", label="not guided")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("scale of the gradient")
    axes.set_ylabel("colour and shape right, %")
    axes.set_ylim(0, 105)
    axes.legend()
    return figure
