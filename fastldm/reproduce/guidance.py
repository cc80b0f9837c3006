"""What the two claims about guidance share: guidance of one text-to-image model in several ways, compared.

The model draws one object from captions that name a colour and a shape; size and place are left to it, and
how evenly it chooses them is its diversity. CLIP reads latents, in which that model diffuses. Scales are
compared on some captions and noise, and the best of each kind is measured on others, so that the choice does
not flatter it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastldm.evaluation.statistics import Score
from fastldm.reproduce import pairs
from fastldm.reproduce.finding import Measurement
from fastldm.reproduce.workspace import Workspace
from fastldm.systems.clip import CLIPScorer
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.clip import CLIPTask
from fastldm.training.config import CLIPTrainingConfig
from fastldm.training.datasets.shapes import SEEN_PAIRS

TRIED, MEASURED = 4, 12
CLIP_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Arm:
    """A kind of guidance: the pipeline's arguments for some pairs at a scale, and the scales to try."""

    name: str
    scales: Sequence[float]
    call: Callable[[Sequence[pairs.Pair], float], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The best scale of an arm and the fresh pictures made with it."""

    scale: float
    samples: list[pairs.Sample]

    @property
    def score(self) -> Score:
        return pairs.score(self.samples)


def clip_model(workspace: Workspace, guided: Path, *, noised: bool) -> tuple[CLIPScorer, float]:
    """CLIP on the latents of the pipeline in the folder `guided`, and the seconds it trained.

    Args:
        noised: train on latents noised as that pipeline's are, with the timestep; else on clean ones.
    """
    overrides = [f"first_stage.path={guided}"]
    overrides += ["name=pairs-clip-noised", "noised=true"] if noised else []
    folder, seconds = workspace.trained(CLIPTrainingConfig, CLIPTask, "pairs-clip", overrides)
    return CLIPScorer.from_pretrained(folder), seconds


def clip_guided(name: str, clip: CLIPScorer, *, captioned: bool) -> Arm:
    """CLIP's gradient; the model itself is told the caption too (`captioned`) or nothing."""

    def call(some: Sequence[pairs.Pair], scale: float) -> Mapping[str, Any]:
        captions = [pairs.words(pair) for pair in some]
        return {
            "prompt": captions if captioned else [""] * len(some),
            "guidance_scale": 1.0,
            "gradient": clip.gradient(captions),
            "gradient_scale": scale,
        }

    return Arm(name, CLIP_SCALES, call)


def compare(
    guided: Path, arms: Sequence[Arm], workspace: Workspace
) -> tuple[dict[str, Outcome], list[Measurement]]:
    """Tries the scales of each arm on the pipeline in the folder `guided`, and measures the best afresh."""
    pipeline = LatentDiffusionPipeline.from_pretrained(guided)
    outcomes, measurements = {}, []

    def draw(arm: Arm, scale: float, times: int, series: int) -> list[pairs.Sample]:
        return pairs.sample(
            pipeline,
            pairs.repeated(SEEN_PAIRS, times),
            lambda some: arm.call(some, scale),
            seed=workspace.draw_seed(series),
            description=f"{arm.name}, scale {scale:g}",
            progress=workspace.progress,
        )

    for arm in arms:
        tried = {scale: draw(arm, scale, TRIED, 1) for scale in arm.scales}
        for scale, samples in tried.items():
            measurements += _measured(samples, guidance=arm.name, scale=scale, stage="tried")
        best = max(tried, key=lambda scale: pairs.score(tried[scale]).accuracy)
        outcomes[arm.name] = Outcome(best, draw(arm, best, MEASURED, 2))
        measurements += _measured(outcomes[arm.name].samples, guidance=arm.name, scale=best, stage="measured")
    return outcomes, measurements


def settings(**more: Any) -> dict[str, Any]:
    return {
        "pictures per scale tried": TRIED * len(SEEN_PAIRS),
        "pictures of the best scale": MEASURED * len(SEEN_PAIRS),
        "sampling steps": pairs.STEPS,
        **more,
    }


def _measured(samples: Sequence[pairs.Sample], **setting: str | float) -> list[Measurement]:
    value, interval = pairs.diversity(samples)
    return [
        Measurement.of_score("accuracy", pairs.score(samples), **setting),
        Measurement("diversity", setting, value, interval, len(samples)),
    ]
