"""Latent diffusion against diffusion in pixels, on the same pictures, for the same time.

The same captions, optimiser, batch and kind of UNet, with about as many parameters; one works on 64x64
pixels, the other on the 8x8 latents of a frozen first stage. Both train for the same wall-clock time on the
same machine, in turns, and are asked for pictures at the end of every turn. The published anchor is LDM-4
against LDM-1 (Rombach et al. 2022): training 3.0 times and sampling 3.7 times as fast, FID 15 against 25.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm.auto import tqdm

from fastldm.evaluation.statistics import difference, mean, ratio
from fastldm.reproduce import pairs
from fastldm.reproduce.finding import Finding, Measurement, band, judge, says, together
from fastldm.reproduce.timed import Timed, train_to
from fastldm.reproduce.workspace import Workspace
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.datasets.shapes import SEEN_PAIRS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "latent-vs-pixel"
STATEMENT = (
    "Diffusion in the latents of an autoencoder trains and samples faster, in less memory, than diffusion in "
    "pixels, and draws better after the same time."
)

_TURNS, _TURN_SECONDS = 4, 60
_BATCH, _CALIBRATION_STEPS = 32, 12
_PICTURES = 84
_SAMPLED, _ROUNDS = 32, 4
_SCALE = 2.0
_COMMON = (
    f"batch_size={_BATCH}",
    "optimizer.lr=5.0e-4",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=100",
    "ema.decay=0.995",
    "data.length=4000",
    "checkpoint_every=1000000",
    "keep_checkpoints=1",
)
_SPACES = {
    "latent": ("name=turns-latent",),
    "pixel": (
        "name=turns-pixel",
        "first_stage={path: pixels}",
        "unet={block_out_channels: [32, 64, 96, 128], layers_per_block: 1, attention_head_dim: 4, "
        "norm_num_groups: 16, "
        "down_block_types: [DownBlock2D, DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D], "
        "up_block_types: [CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D, UpBlock2D]}",
    ),
}


def run(workspace: Workspace) -> tuple[Finding, Image.Image]:
    measurements: list[Measurement] = []
    bar = tqdm(total=len(_SPACES) * (_TURNS + 1), unit="turn", disable=None if workspace.progress else True)
    folder = workspace.fresh("turns")
    state = {space: _Run(space, folder, workspace, bar) for space in _SPACES}
    for turn in range(_TURNS):
        for one in state.values():
            one.train((turn + 1) * _TURN_SECONDS)
        for one in state.values():
            score = pairs.score(one.draw(turn))
            setting = {"space": one.space, "seconds": round(one.seconds, 1), "images": one.step * _BATCH}
            measurements.append(Measurement.of_score("accuracy", score, **setting))
    bar.close()
    sampling = _sampling_rates([one.pipeline for one in state.values()])
    latent, pixel = state["latent"], state["pixel"]
    rates = {"training": [latent.rates, pixel.rates], "sampling": sampling}
    ratios = {}
    for what, (ours, theirs) in rates.items():
        for space, values in (("latent", ours), ("pixel", theirs)):
            value, interval = mean(values)
            measurements.append(
                Measurement(f"{what} images/s", {"space": space}, value, interval, len(values))
            )
        ratios[what] = ratio(ours, theirs)
        measurements.append(Measurement(f"{what} ratio", {}, *ratios[what], len(ours)))
    for one in state.values():
        measurements.append(
            Measurement("training memory, MiB", {"space": one.space}, one.memory, (one.memory,) * 2, 1)
        )
    final = [pairs.score(one.samples) for one in (latent, pixel)]
    gain, gain_interval = difference(*final)
    measurements.append(Measurement("difference", {}, gain, gain_interval, _PICTURES))
    parts = [judge(ratios["training"][1], 1), judge(ratios["sampling"][1], 1), judge(gain_interval)]
    # Some systems do not say how much memory a process held.
    known = latent.memory > 0 and pixel.memory > 0
    parts.append(latent.memory < pixel.memory if known else None)
    holds = together(parts)
    low, high = gain_interval
    verdict = (
        f"{says(holds)}. In latents, training sees {_times(ratios['training'])} and sampling makes "
        f"{_times(ratios['sampling'])} as many images a second as in pixels (published for LDM-4 against "
        f"LDM-1: 3.0 and 3.7). Training takes {_size(latent.memory)} against {_size(pixel.memory)}. After "
        f"{latent.seconds / 60:.1f} and {pixel.seconds / 60:.1f} minutes on the same cores, colour and "
        f"shape are both right in {100 * final[0].accuracy:.1f}% and {100 * final[1].accuracy:.1f}% of the "
        f"pictures, a difference of {100 * gain:.1f} points (95% interval {100 * low:.1f} to "
        f"{100 * high:.1f})."
    )
    settings = {
        "turns": _TURNS,
        "seconds per turn": _TURN_SECONDS,
        "batch size": _BATCH,
        "images a second, turn by turn": {
            what: {space: [round(rate, 2) for rate in found] for space, found in zip(_SPACES, both)}
            for what, both in rates.items()
        },
        "images seen": {one.space: one.step * _BATCH for one in state.values()},
        "parameters of the UNet": {one.space: one.parameters for one in state.values()},
        "first stage": "the shipped one, trained beforehand in 9 minutes; its time is not counted",
        "configuration": "pairs-text",
    }
    finding = Finding(NAME, STATEMENT, holds, verdict, measurements, settings, workspace.seed)
    return finding, pairs.pictures([(one.space, one.samples) for one in state.values()], columns=8)


class _Run:
    """One of the two models, as far as it has trained."""

    def __init__(self, space: str, folder: Path, workspace: Workspace, bar: tqdm) -> None:
        self.space, self.workspace, self.bar = space, workspace, bar
        self.overrides = [f"output_dir={folder}", f"seed={workspace.seed}", *_COMMON, *_SPACES[space]]
        self.step, self.seconds, self.rates = 0, 0.0, []
        self.peak_bytes = self.idle_bytes = 0
        self.samples: list[pairs.Sample] = []
        self._train_to(_CALIBRATION_STEPS)

    @property
    def memory(self) -> float:
        """MiB that training held at most, beyond what the process held before; 0 where nobody knows."""
        return (self.peak_bytes - self.idle_bytes) / 2**20

    def train(self, until: float) -> None:
        """Go on to about `until` seconds of training, by the rate so far."""
        left = until - self.seconds - self.overhead
        timed = self._train_to(self.step + max(2, math.ceil(left * self.rate / _BATCH)))
        self.rates.append(self.rate)
        self.pipeline = LatentDiffusionPipeline.from_pretrained(timed.model)
        self.parameters = sum(p.numel() for p in self.pipeline.unet.parameters())

    def draw(self, turn: int) -> list[pairs.Sample]:
        wanted = pairs.repeated(SEEN_PAIRS, _PICTURES // len(SEEN_PAIRS))
        self.samples = pairs.sample(
            self.pipeline,
            wanted,
            pairs.by_caption(_SCALE),
            seed=self.workspace.draw_seed(0),
            description=f"{self.space}, turn {turn + 1} of {_TURNS}",
            progress=self.workspace.progress,
        )
        return self.samples

    def _train_to(self, step: int) -> Timed:
        self.bar.set_description(f"training in {self.space}s to step {step}")
        timed = train_to(step, "pairs-text", self.overrides)
        self.bar.update()
        before, self.step = self.step, step
        self.seconds += timed.seconds
        self.rate = timed.rate
        self.overhead = timed.seconds - (step - before) * _BATCH / timed.rate
        self.peak_bytes = max(self.peak_bytes, timed.peak_bytes)
        self.idle_bytes = timed.idle_bytes
        return timed


def _sampling_rates(pipelines: Sequence[LatentDiffusionPipeline]) -> list[list[float]]:
    """Images a second of each pipeline, in turns; the first round warms up."""
    rates: list[list[float]] = [[] for _ in pipelines]
    prompts = [pairs.words(pair) for pair in pairs.repeated(SEEN_PAIRS, 2)][:_SAMPLED]
    for round_ in range(_ROUNDS + 1):
        for found, pipeline in zip(rates, pipelines):
            start = time.perf_counter()
            pipeline(
                prompts,
                num_inference_steps=pairs.STEPS,
                guidance_scale=_SCALE,
                generator=torch.Generator().manual_seed(round_),
                progress=False,
            )
            if round_:
                found.append(len(prompts) / (time.perf_counter() - start))
    return rates


def _times(found: tuple[float, tuple[float, float]]) -> str:
    value, (low, high) = found
    return f"{value:.1f} times ({low:.1f} to {high:.1f})"


def _size(memory: float) -> str:
    return f"{memory:.0f} MiB" if memory > 0 else "unknown memory"


def plot(finding: Finding) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for space in _SPACES:
        rows = finding.select("accuracy", space=space)
        minutes = [row.setting["seconds"] / 60 for row in rows]
        band(axes, minutes, rows, f"in {space}s")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("colour and shape right, %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 105)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
