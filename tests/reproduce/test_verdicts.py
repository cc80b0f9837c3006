"""Verdicts of the claims for numbers that speak for them, against them, and for neither."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastldm.evaluation.shapes_grader import grade
from fastldm.evaluation.statistics import Score
from fastldm.reproduce import cfg_vs_clip, guidance, latent_vs_pixel, noised_clip, pairs, text_vs_class
from fastldm.reproduce.guidance import Arm, Outcome
from fastldm.reproduce.timed import Timed
from fastldm.reproduce.workspace import Workspace
from fastldm.training.datasets.shapes import SEEN_PAIRS, Object, Scene, render

_PICTURE = render(Scene((Object("circle", "red", "large", "top left"),)), 0)
_SHOWN = grade(_PICTURE)


def samples(right, total=100):
    """So many pictures, of which so many are right."""
    asked = [("red", "circle")] * right + [("blue", "circle")] * (total - right)
    return [pairs.Sample(pair, _PICTURE, _SHOWN) for pair in asked]


@pytest.fixture
def work(monkeypatch):
    """A workspace in which nothing is trained or loaded."""
    made = Workspace(Path("work"), progress=False)
    monkeypatch.setattr(made, "trained", lambda *_: (Path("class"), 1.0))
    monkeypatch.setattr(made, "fresh", lambda name: Path(name))
    monkeypatch.setattr(pairs, "text_model", lambda _: (Path("text"), 1.0))
    loader = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(unet=torch.nn.Linear(1, 1)))
    for module in (guidance, noised_clip, text_vs_class, latent_vs_pixel):
        monkeypatch.setattr(module, "LatentDiffusionPipeline", loader)
    for module in (noised_clip, cfg_vs_clip):
        monkeypatch.setattr(module, "clip_model", lambda *_, noised: (None, 1.0))
    monkeypatch.setattr(noised_clip, "_zero_shot", lambda *_: {0: Score(1, 2)})
    monkeypatch.setattr(noised_clip, "_through_the_denoiser", lambda *_: None)
    return made


def compared(monkeypatch, module, **right):
    """Have `compare` find so many right pictures of 100, by the arm's constant in the module."""
    found = {getattr(module, f"_{name}"): Outcome(2.0, samples(count)) for name, count in right.items()}
    monkeypatch.setattr(module, "compare", lambda *_: (found, []))


@pytest.mark.parametrize(
    ("right", "holds"),
    [
        ({"NONE": 5, "CLEAN": 5, "PREDICTED": 40, "NOISED": 90}, True),
        # One way in which a clean CLIP does as well, or may do as well, is enough.
        ({"NONE": 5, "CLEAN": 5, "PREDICTED": 95, "NOISED": 40}, False),
        ({"NONE": 5, "CLEAN": 95, "PREDICTED": 5, "NOISED": 40}, False),
        ({"NONE": 5, "CLEAN": 5, "PREDICTED": 88, "NOISED": 90}, None),
        # Better than what only does harm.
        ({"NONE": 60, "CLEAN": 1, "PREDICTED": 1, "NOISED": 20}, False),
        ({"NONE": 20, "CLEAN": 1, "PREDICTED": 1, "NOISED": 22}, None),
    ],
)
def test_noised_clip_must_beat_every_other_guidance_and_none(work, monkeypatch, right, holds):
    compared(monkeypatch, noised_clip, **right)
    finding, _ = noised_clip.run(work)
    assert finding.holds is holds
    (row,) = finding.select("difference", to="clean CLIP on x0")
    assert row.value == pytest.approx((right["NOISED"] - right["PREDICTED"]) / 100)
    assert f"{right['NOISED']:.1f}%" in finding.verdict


@pytest.mark.parametrize(
    ("free", "clip", "holds"), [(90, 50, True), (50, 90, False), (70, 68, None), (68, 70, None)]
)
def test_classifier_free_guidance_must_beat_clip(work, monkeypatch, free, clip, holds):
    compared(monkeypatch, cfg_vs_clip, NONE=99, CLIP=clip, FREE=free)
    finding, _ = cfg_vs_clip.run(work)
    assert finding.holds is holds
    assert finding.select("difference")[0].value == pytest.approx((free - clip) / 100)


@pytest.mark.parametrize(
    ("text", "labels", "holds"), [(90, 10, True), (10, 90, False), (50, 48, None), (48, 50, None)]
)
def test_text_must_beat_labels_on_the_pairs_never_shown(work, monkeypatch, text, labels, holds):
    found = {
        "text, held-out": samples(text),
        "class, held-out": samples(labels),
        # What has been seen says nothing.
        "text, seen": samples(99),
        "class, seen": samples(1),
    }
    monkeypatch.setattr(pairs, "sample", lambda *_, description, **__: found[description])
    finding, _ = text_vs_class.run(work)
    assert finding.holds is holds
    assert finding.select("difference")[0].value == pytest.approx((text - labels) / 100)


FAST = {"training": 3.0, "sampling": 3.0, "memory": 0.5, "right": (90, 50)}


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"training": 0.5}, False),
        ({"sampling": 0.5}, False),
        ({"memory": 2.0}, False),
        ({"right": (50, 90)}, False),
        ({"training": 1.01}, None),
        ({"sampling": 1.01}, None),
        ({"right": (70, 68)}, None),
        # Elsewhere than on Linux no memory is known, which is no reason to say that it is not less.
        ({"memory": None}, None),
        ({"memory": None, "training": 0.5}, False),
    ],
)
def test_latents_must_be_better_in_every_way(work, monkeypatch, changes, holds):
    here = {**FAST, **changes}
    steps = {"latent": 0, "pixel": 0}
    jitter = iter([1.0, 1.0, 1.02, 0.98, 0.97, 1.03, 1.0, 0.98, 1.03, 1.01])

    def train_to(step, config, overrides):
        space = "latent" if "name=turns-latent" in overrides else "pixel"
        rate = 10 * (here["training"] if space == "latent" else 1) * next(jitter)
        seconds, steps[space] = (step - steps[space]) / rate, step
        held = 0 if here["memory"] is None else (here["memory"] if space == "latent" else 1) * 2**30
        idle = 0 if here["memory"] is None else 2**20
        return Timed("model", seconds, rate * latent_vs_pixel._BATCH, int(held + idle), idle)

    rates = [here["sampling"] * value for value in (9.8, 10.0, 10.3)], [10.0, 10.2, 9.9]
    monkeypatch.setattr(latent_vs_pixel, "train_to", train_to)
    monkeypatch.setattr(latent_vs_pixel, "_sampling_rates", lambda _: rates)
    latent, pixel = (samples(count) for count in here["right"])
    monkeypatch.setattr(
        pairs, "sample", lambda *_, description, **__: latent if description.startswith("latent") else pixel
    )
    finding, _ = latent_vs_pixel.run(work)
    assert finding.holds is holds
    assert finding.select("training ratio")[0].value == pytest.approx(here["training"], rel=0.05)
    assert ("unknown memory" in finding.verdict) == (here["memory"] is None)
    # About the time that was asked for, in equal turns.
    seconds = [row.setting["seconds"] for row in finding.select("accuracy", space="pixel")]
    turns = [latent_vs_pixel._TURN_SECONDS * (turn + 1) for turn in range(latent_vs_pixel._TURNS)]
    assert seconds == pytest.approx(turns, rel=0.05)


def test_the_best_scale_is_measured_on_other_captions_and_noise(work, monkeypatch):
    calls = []

    def sample(pipeline, wanted, call, *, seed, **_):
        scale = call(wanted[:1])["scale"]
        calls.append((scale, seed, len(wanted)))
        return samples(50 - int(10 * abs(scale - 2)), 60)

    monkeypatch.setattr(pairs, "sample", sample)
    arm = Arm("some", (1.0, 2.0, 4.0), lambda some, scale: {"scale": scale})
    outcomes, rows = guidance.compare(Path("model"), [arm], work)
    *tried, (scale, seed, count) = calls
    assert [scale for scale, *_ in tried] == [1.0, 2.0, 4.0]
    assert scale == outcomes["some"].scale == 2.0
    assert seed not in {seed for _, seed, _ in tried}
    assert count == guidance.MEASURED * len(SEEN_PAIRS)
    assert [row.setting["scale"] for row in rows if row.setting["stage"] == "measured"] == [2.0, 2.0]


def test_sampling_is_timed_without_the_global_random_state():
    state, drawn = torch.get_rng_state(), []

    def pipeline(prompts, *, generator=None, **_):
        drawn.append(torch.randn(2, generator=generator))

    latent_vs_pixel._sampling_rates([pipeline, pipeline])
    assert torch.equal(torch.get_rng_state(), state)
    # Both draw the same noise in each round.
    assert all(torch.equal(one, other) for one, other in zip(drawn[::2], drawn[1::2]))
