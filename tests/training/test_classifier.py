"""Training the classifier: the loss falls, resuming gives the same bits, in pixels and on latents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastldm.cli import main
from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError
from fastldm.systems import ClassifierGuide, LatentDiffusionPipeline
from fastldm.systems.guides import fingerprint
from fastldm.training.classifier import ClassifierTask
from fastldm.training.config import ClassifierConfig, load_config
from fastldm.training.data import StreamSampler, batches
from fastldm.training.datasets import CaptionedShapes
from fastldm.training.datasets.shapes import PAIRS
from fastldm.training.frozen_first_stage import noised
from fastldm.training.loop import TrainingInterrupted, train

CPU = torch.device("cpu")
CLASSIFIER = {
    "max_steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 3,
    "gradient_accumulation_steps": 2,
    "data": {"size": 32, "length": 64, "kind": "one"},
    "model": {
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_resolutions": [16],
        "num_head_channels": 8,
    },
    "schedule": {"beta_end": 0.003},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine"},
}


@pytest.fixture
def classifier_config(tmp_path):
    """make(*overrides) -> ClassifierConfig that writes below tmp_path."""

    def make(*overrides: str) -> ClassifierConfig:
        values = json.loads(json.dumps({**CLASSIFIER, "output_dir": str(tmp_path / "runs")}))
        return load_config(ClassifierConfig, values, overrides)

    return make


@pytest.fixture
def on_latents(first_stages):
    """on_latents(kind) -> the overrides that train on the latents of an untrained first stage."""
    return lambda kind: (f"first_stage.path={first_stages / kind}", "cache_latents=true")


def run(config, **options):
    tasks = []

    def build():
        tasks.append(ClassifierTask(config))
        return tasks[0]

    folder = train(config, build, progress=False, **options)
    return tasks[0], folder


def start(task):
    """What the loop does before the first step; returns the first batch."""
    task.to(CPU)
    batch = next(batches(task.dataset, StreamSampler(len(task.dataset), 4, seed=0)))
    task.start(batch)
    return batch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_short_run_lowers_the_loss_of_other_pictures(classifier_config):
    longer = ["max_steps=60", "batch_size=32", "gradient_accumulation_steps=1", "sample_every=0"]
    task, _ = run(classifier_config("data.length=2000", *longer))
    data = CaptionedShapes("seen", "one", 32, 128)
    batch = next(batches(data, StreamSampler(128, 128, seed=1)))
    with torch.no_grad():
        prepared = task.prepare(batch, generator())
        loss, _ = task.module(prepared, step=0, generator=generator())
        fresh = ClassifierTask(classifier_config())
        start(fresh)
        chance, _ = fresh.module(prepared, step=0, generator=generator())
    assert chance > math.log(len(PAIRS)) - 0.3
    assert loss < math.log(len(PAIRS)) - 0.4


def test_the_loss_is_the_cross_entropy_of_the_noised_pictures(classifier_config):
    task = ClassifierTask(classifier_config("schedule.num_train_timesteps=20"))
    task.to(CPU)
    batch = next(batches(task.dataset, StreamSampler(64, 16, seed=0)))
    model = task.module.model.eval()
    x, t = noised(batch["image"], task.schedule, generator(4))
    with torch.no_grad():
        logits = model(x, t).logits.double()
        # Right but for every third.
        batch["label"] = (logits.argmax(1) + (torch.arange(16) % 3 == 0)) % 24
        loss, logs = task.module(task.prepare(batch, generator()), step=0, generator=generator(4))
    wanted = (logits.logsumexp(1) - logits.gather(1, batch["label"][:, None])[:, 0]).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    right = (logits.argmax(1) == batch["label"]).double()
    assert logs["accuracy"].item() == pytest.approx(right.mean().item())
    assert logs["accuracy_low_noise"].item() == pytest.approx(right[t < 10].mean().item())
    assert logs["accuracy_high_noise"].item() == pytest.approx(right[t >= 10].mean().item())
    assert len({round(value.item(), 6) for value in logs.values()}) == 3
    # A batch without a picture of low noise, or of high: the accuracy of all stands for it.
    one = {"x": batch["image"][:1], "label": batch["label"][:1]}
    for seed in range(4):
        with torch.no_grad():
            _, logs = task.module(one, step=0, generator=generator(seed))
        assert len({value.item() for value in logs.values()}) == 1


@pytest.mark.parametrize("stage", [None, "kl"])
def test_resuming_gives_the_same_bits(classifier_config, on_latents, stage):
    overrides = on_latents(stage) if stage else ()
    straight, stopped = (classifier_config(f"name={name}", *overrides) for name in ("straight", "stopped"))
    run(straight)
    tasks = []

    def build():
        tasks.append(ClassifierTask(stopped))
        forward = tasks[0].module.forward

        def stopping(batch, *, step, generator):
            if step == 3:
                raise TrainingInterrupted
            return forward(batch, step=step, generator=generator)

        tasks[0].module.forward = stopping
        return tasks[0]

    with pytest.raises(TrainingInterrupted):
        train(stopped, build, progress=False)
    run(stopped, resume=True)
    last = [Path(c.output_dir) / c.name / "checkpoints" / "step-000006" for c in (straight, stopped)]
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(folder / name) for folder in last)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("diffusion_pytorch_model.safetensors", "classes.json", "scheduler_config.json"):
        exported = [(folder.parents[1] / "model" / name).read_bytes() for folder in last]
        assert exported[0] == exported[1]


@pytest.mark.parametrize("stage", [None, "vq", "kl"])
def test_every_weight_learns_and_the_export_is_the_run_s(classifier_config, on_latents, stage):
    fresh = []

    def build():
        task = ClassifierTask(config)
        fresh.append((task, {k: v.clone() for k, v in task.module.named_parameters()}))
        return task

    config = classifier_config("ema.enabled=false", *(on_latents(stage) if stage else ()))
    folder = train(config, build, progress=False)
    task, before = fresh[0]
    assert [k for k, v in task.module.named_parameters() if torch.equal(v, before[k])] == []
    guide = ClassifierGuide.from_pretrained(folder)
    assert guide.space.shape == ((4, 16, 16) if stage else (3, 32, 32))
    assert guide.classes[:2] == ("red circle", "red square")
    assert torch.equal(guide.schedule.betas, NoiseSchedule.linear(beta_end=0.003).betas)
    if stage:
        assert guide.space.latents.scaling_factor == task.first_stage.scaling_factor
        assert guide.space.latents.first_stage_sha256 == task.first_stage.sha256
        assert guide.space.latents.fingerprint == fingerprint(task.first_stage.model)
    else:
        assert guide.space.latents is None
    x, _ = task.first_stage.shown(task.pictures, 4, seed=0)
    torch.testing.assert_close(guide.classify(x, 9), task.guide().classify(x, 9), atol=1e-5, rtol=0)
    picture = Path(config.output_dir) / "classifier" / "samples" / "step-000003.png"
    assert Image.open(picture).width > 4 * 64


def test_a_checkpoint_of_other_latents_is_refused(classifier_config, first_stages, tmp_path):
    stage = tmp_path / "stage"
    stage.mkdir()
    for file in (first_stages / "vq").iterdir():
        (stage / file.name).write_bytes(file.read_bytes())
    config = classifier_config(f"first_stage.path={stage}", "sample_every=0", "max_steps=2")
    run(config)
    weights = stage / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ConfigError, match="other weights than when this run began"):
        run(config, resume=True)


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_cached_latents_give_the_same_batches(classifier_config, on_latents, stage):
    cached, encoded = (
        ClassifierTask(classifier_config(*on_latents(stage), f"cache_latents={flag}"))
        for flag in (True, False)
    )
    found, wanted = (task.prepare(start(task), generator(7)) for task in (cached, encoded))
    assert torch.equal(found["label"], wanted["label"])
    # The same convolutions over batches of another size: a few float32 roundings of values around 1.
    torch.testing.assert_close(found["x"], wanted["x"], rtol=1e-4, atol=1e-5)
    # Nothing is encoded again.
    cached.first_stage.model.encode = None
    cached.prepare(next(batches(cached.dataset, StreamSampler(64, 4, seed=1))), generator())


def test_class_folders_give_the_classes(classifier_config, tmp_path):
    data = CaptionedShapes("train", "one", 32, 6)
    for i in range(6):
        folder = tmp_path / "pictures" / ("round" if i % 2 else "angular")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((data[i]["image"] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    config = classifier_config(
        "data.source=image_folder", f"data.path={tmp_path / 'pictures'}", "max_steps=1", "sample_every=1"
    )
    _, folder = run(config)
    assert ClassifierGuide.from_pretrained(folder).classes == ("angular", "round")
    loose = tmp_path / "loose"
    loose.mkdir()
    (tmp_path / "pictures" / "round" / "1.png").rename(loose / "1.png")
    with pytest.raises(ConfigError, match=r"loose has none: put the pictures into one folder per class"):
        ClassifierTask(classifier_config("data.source=image_folder", f"data.path={loose}"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.out_channels=3", r"model\.out_channels=3 for data with 24; leave it out"),
        ("model.image_size=64", r"model\.image_size=64 for data with 32"),
        ("model.widths=3", "'widths'"),
        ("data.kind=two", r"data\.kind=two has pictures of two objects, .*use data\.kind=one"),
        ("data.kind=mixed", r"data\.kind=mixed has pictures of two objects"),
        ("first_stage.path=''", r"first_stage\.path is not set"),
        ("first_stage.path=nowhere", "cannot read the first stage"),
        ("schedule.beta_schedule=cosine", "beta_schedule='cosine' is not offered"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(classifier_config, override, said):
    with pytest.raises(Exception, match=said) as caught:
        ClassifierTask(classifier_config(override))
    assert "\n" not in str(caught.value)


def test_the_shipped_configuration_makes_a_guide_of_the_shipped_model(tmp_path, capsys):
    small = ["max_steps=1", "batch_size=2", "data.length=4", "mixed_precision=no"]
    command = ["train", "classifier", "--config", "shapes-classifier", f"output_dir={tmp_path}"]
    assert main([*command, *small]) == 0
    guide = ClassifierGuide.from_pretrained(Path(capsys.readouterr().out.strip()))
    pipe = LatentDiffusionPipeline.from_pretrained("shapes")
    call = {"num_inference_steps": 3, "output_type": "latent", "progress": False, "guidance_scale": 0.0}
    plain, guided = (
        pipe("", generator=generator(), gradient=gradient, **call).images
        for gradient in (None, guide.gradient("red circle"))
    )
    assert guided.isfinite().all()
    assert not torch.equal(guided, plain)
