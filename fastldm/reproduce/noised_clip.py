"""CLIP guidance needs a CLIP that was trained on noised images.

Two CLIPs of one size see the same pairs of picture and caption, as often: one the clean latents, the other
latents noised as in diffusion, with the timestep. Each alone has to make the model, which is not told the
caption, draw what the caption says. The clean one is tried in two ways: on x_t, as it is, and on the x0 that
the model predicts from x_t, which is what people did who had no other CLIP; its gradient then runs through
the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastldm.diffusion.guidance import clip_gradient
from fastldm.diffusion.predictions import to_x0
from fastldm.evaluation.statistics import Score, difference
from fastldm.reproduce import pairs
from fastldm.reproduce.finding import Finding, Measurement, band, judge, says, together
from fastldm.reproduce.guidance import (
    CLIP_SCALES,
    MEASURED,
    Arm,
    clip_guided,
    clip_model,
    compare,
    settings,
)
from fastldm.reproduce.workspace import Workspace
from fastldm.systems.clip import CLIPScorer
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.datasets.shapes import SEEN_PAIRS, CaptionedShapes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "noised-clip"
STATEMENT = "CLIP guidance needs a CLIP retrained on noised images."

_NONE, _CLEAN, _PREDICTED, _NOISED = "none", "clean CLIP", "clean CLIP on x0", "noised CLIP"
# What a noised CLIP must beat: the others, and no guidance, without which no guidance is needed either.
_OTHERS = (_CLEAN, _PREDICTED, _NONE)
_TIMESTEPS = (0, 200, 400, 600, 800)
_READ = 252


def run(workspace: Workspace) -> tuple[Finding, Image.Image]:
    guided, seconds = pairs.text_model(workspace)
    clean, clean_seconds = clip_model(workspace, guided, noised=False)
    noised, noised_seconds = clip_model(workspace, guided, noised=True)
    pipeline = LatentDiffusionPipeline.from_pretrained(guided)
    measurements = [
        Measurement.of_score("zero-shot accuracy", score, clip=name, timestep=t)
        for name, clip in ((_CLEAN, clean), (_NOISED, noised))
        for t, score in _zero_shot(clip, pipeline, workspace.seed).items()
    ]
    arms = [
        Arm(_NONE, (1.0,), lambda some, scale: {"prompt": [""] * len(some), "guidance_scale": scale}),
        clip_guided(_CLEAN, clean, captioned=False),
        _through_the_denoiser(clean, guided),
        clip_guided(_NOISED, noised, captioned=False),
    ]
    outcomes, compared = compare(guided, arms, workspace)
    measurements += compared
    gains = {name: difference(outcomes[_NOISED].score, outcomes[name].score) for name in _OTHERS}
    for name, (value, interval) in gains.items():
        measurements.append(
            Measurement("difference", {"to": name}, value, interval, MEASURED * len(SEEN_PAIRS))
        )
    holds = together([judge(interval) for _, interval in gains.values()])
    percent = {name: f"{100 * outcome.score.accuracy:.1f}%" for name, outcome in outcomes.items()}
    points = {
        name: f"{100 * value:+.1f} points (95% interval {100 * low:.1f} to {100 * high:.1f})"
        for name, (value, (low, high)) in gains.items()
    }
    verdict = (
        f"{says(holds)}. A model that is not told the caption draws its colour and shape in "
        f"{percent[_NONE]} of the pictures. A CLIP that knows clean images only brings that to "
        f"{percent[_CLEAN]} where it reads x_t (scale {outcomes[_CLEAN].scale:g}), and to "
        f"{percent[_PREDICTED]} where it reads the x0 that the model predicts (scale "
        f"{outcomes[_PREDICTED].scale:g}); one that was trained on noised images to {percent[_NOISED]} "
        f"(scale {outcomes[_NOISED].scale:g}). That is {points[_NONE]} to no guidance, {points[_CLEAN]} to "
        f"the first CLIP and {points[_PREDICTED]} to the second."
    )
    about = settings(
        **{
            "training seconds": {"diffusion": seconds, _CLEAN: clean_seconds, _NOISED: noised_seconds},
            "configurations": ["pairs-text", "pairs-clip"],
        }
    )
    finding = Finding(NAME, STATEMENT, holds, verdict, measurements, about, workspace.seed)
    return finding, pairs.pictures([(name, o.samples) for name, o in outcomes.items()], columns=8)


def _zero_shot(clip: CLIPScorer, pipeline: LatentDiffusionPipeline, seed: int) -> dict[int, Score]:
    """How many fresh pictures, noised to a timestep, have their own caption first among the 21."""
    data = CaptionedShapes("seen", "one", length=_READ, seed=seed, attributes=("colour", "shape"))
    drawn = [data.draw(index) for index in range(_READ)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for _, _, picture in drawn]))
    generator = torch.Generator().manual_seed(seed)
    latents = pipeline.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1, generator)
    noise = torch.randn(latents.shape, generator=generator)
    captions = [pairs.words(pair) for pair in SEEN_PAIRS]
    own = torch.tensor([captions.index(caption) for _, caption, _ in drawn])
    found = {}
    for t in _TIMESTEPS:
        timesteps = torch.full((_READ,), t)
        noisy = pipeline.schedule.add_noise(latents, noise, timesteps)
        scores = clip.scores(noisy, captions, None if clip.schedule is None else timesteps)
        found[t] = Score(int((scores.argmax(dim=1) == own).sum()), _READ)
    return found


def _through_the_denoiser(clip: CLIPScorer, guided: Path) -> Arm:
    """The gradient of the clean CLIP's score of the x0 that the model predicts without a caption."""
    pipeline = LatentDiffusionPipeline.from_pretrained(guided)
    conditioner, schedule = pipeline.conditioner, pipeline.schedule

    def call(some: Sequence[pairs.Pair], scale: float) -> Mapping[str, Any]:
        with torch.no_grad():
            nothing = conditioner(conditioner.prepare([""] * len(some)))
        denoiser = pipeline.denoiser(nothing)

        def features(x: Tensor, t: Tensor) -> Tensor:
            x0 = to_x0(denoiser(x, t), x, schedule.alpha_bar(x, t), schedule.prediction_type)
            return clip.model.get_image_features(clip.prepare(x0)).pooler_output

        texts = clip.encode_texts([pairs.words(pair) for pair in some])
        return {
            "prompt": [""] * len(some),
            "guidance_scale": 1.0,
            "gradient": clip_gradient(features, texts, clip.model.logit_scale.detach()),
            "gradient_scale": scale,
        }

    return Arm(_PREDICTED, CLIP_SCALES, call)


def plot(finding: Finding) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    drawn, read = figure.subplots(1, 2)
    for name in (_CLEAN, _PREDICTED, _NOISED):
        rows = finding.select("accuracy", guidance=name, stage="tried")
        scales = [row.setting["scale"] for row in rows]
        band(drawn, scales, rows, f"guided by {name}")
    (chance,) = finding.select("accuracy", guidance=_NONE, stage="tried")
    drawn.axhline(100 * chance.value, linestyle=":", color="grey", label="not guided")
    drawn.set_xscale("log", base=2)
    drawn.set_xlabel("scale of the gradient")
    drawn.set_ylabel("drawn: colour and shape right, %")
    for name in (_CLEAN, _NOISED):
        rows = finding.select("zero-shot accuracy", clip=name)
        steps = [row.setting["timestep"] for row in rows]
        band(read, steps, rows, name)
    read.set_xlabel("timestep of the noise")
    read.set_ylabel("read: own caption among 21, %")
    for axes in (drawn, read):
        axes.set_ylim(0, 105)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    return figure
