"""Training CLIP: the loss falls, resuming gives the same bits, noise is that of q, processes share pairs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastldm.cli import main
from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError, InputError
from fastldm.models.clip import MAX_LOGIT_SCALE
from fastldm.systems import CLIPScorer, LatentDiffusionPipeline
from fastldm.training.clip import CLIPTask
from fastldm.training.config import CLIPTrainingConfig, load_config, to_yaml
from fastldm.training.data import StreamSampler, batches
from fastldm.training.datasets import CaptionedShapes, export_image_folder
from fastldm.training.frozen_first_stage import noised
from fastldm.training.loop import TrainingInterrupted, train

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CLIP = {
    "max_steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 3,
    "gradient_accumulation_steps": 2,
    "data": {"size": 32, "length": 64, "kind": "one"},
    "model": {"projection_dim": 16, "text_config": TOWER, "vision_config": {**TOWER, "patch_size": 8}},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
}
NOISED = ("noised=true", "schedule.beta_schedule=squaredcos_cap_v2")
PATCHES = "model.vision_config.patch_size=4"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clip_config(tmp_path):
    """make(*overrides) -> CLIPTrainingConfig that writes below tmp_path."""

    def make(*overrides: str) -> CLIPTrainingConfig:
        values = json.loads(json.dumps({**CLIP, "output_dir": str(tmp_path / "runs")}))
        return load_config(CLIPTrainingConfig, values, overrides)

    return make


def run(config, **options):
    tasks = []

    def build():
        tasks.append(CLIPTask(config))
        return tasks[0]

    folder = train(config, build, progress=False, **options)
    return tasks[0], folder


def loss_of(task, seed=0):
    """Of 64 pictures that were not trained on, their noise drawn from the seed."""
    data = CaptionedShapes("seen", "one", 32, 64)
    batch = next(batches(data, StreamSampler(64, 64, seed=1)))
    prepared = task.prepare(batch, torch.Generator())
    with torch.no_grad():
        return task.module(prepared, step=0, generator=torch.Generator().manual_seed(seed))[0].item()


@pytest.mark.parametrize(
    ("overrides", "below"), [((), 1.5), (("noised=true", "schedule.beta_end=0.003"), 0.4)]
)
def test_a_short_run_lowers_the_loss_of_other_pictures(clip_config, overrides, below):
    longer = ["max_steps=100", "batch_size=32", "gradient_accumulation_steps=1", "sample_every=0"]
    config = clip_config(
        "data.length=4000", "optimizer.lr=3e-3", "optimizer.warmup_steps=10", *longer, *overrides
    )
    task, _ = run(config)
    chance = math.log(64)
    fresh = CLIPTask(clip_config(*overrides))
    fresh.to(torch.device("cpu"))
    assert loss_of(fresh) > chance - 0.1
    assert loss_of(task) < chance - below


@pytest.mark.parametrize("overrides", [(), NOISED, (*NOISED, "first_stage.path={stages}/kl", PATCHES)])
def test_resuming_gives_the_same_bits(clip_config, first_stages, overrides):
    overrides = [override.format(stages=first_stages) for override in overrides]
    straight, stopped = (clip_config(f"name={name}", *overrides) for name in ("straight", "stopped"))
    run(straight)
    tasks = []

    def build():
        tasks.append(CLIPTask(stopped))
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
    exported = [folder.parents[1] / "model" / "model.safetensors" for folder in last]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_every_weight_learns_and_the_export_scores_as_the_run(clip_config):
    fresh = []

    def build():
        task = CLIPTask(config)
        fresh.append((task, {k: v.clone() for k, v in task.module.named_parameters()}))
        return task

    config = clip_config("ema.enabled=false", *NOISED)
    folder = train(config, build, progress=False)
    task, before = fresh[0]
    assert [k for k, v in task.module.named_parameters() if torch.equal(v, before[k])] == []
    data = CaptionedShapes("seen", "one", 32, 4)
    images, captions = (
        torch.stack([data[i]["image"] for i in range(4)]),
        [data[i]["caption"] for i in range(4)],
    )
    scorer = CLIPScorer.from_pretrained(folder)
    found = scorer.scores(images, captions, timestep=9)
    torch.testing.assert_close(found, task.scorer().scores(images, captions, timestep=9), atol=1e-5, rtol=0)
    assert torch.equal(scorer.schedule.betas, NoiseSchedule.cosine().betas)
    assert scorer.image_mean == (0.5, 0.5, 0.5)
    torch.testing.assert_close(scorer.prepare(images), images, atol=1e-6, rtol=0)
    assert (Path(config.output_dir) / "clip" / "samples" / "step-000003.png").is_file()


def test_the_pictures_are_noised_as_by_q():
    schedule, images = (
        NoiseSchedule.cosine(20),
        torch.linspace(-1, 1, 4000)[:, None, None, None].repeat(1, 1, 2, 2),
    )
    x, t = noised(images, schedule, torch.Generator().manual_seed(0))
    again = noised(images, schedule, torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0])
    a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = (x - a.sqrt() * images) / (1 - a).sqrt()
    # 16000 normal numbers: five standard errors of mean and deviation
    assert abs(noise.mean()) < 5 * 16000**-0.5
    assert abs(noise.std() - 1) < 5 * 32000**-0.5
    # 200 expected of each t, standard deviation sqrt(200 * 0.95) = 13.8: five of them
    assert (torch.bincount(t, minlength=20) - 200).abs().max() < 69


def test_the_image_tower_gets_the_noised_picture_and_its_timestep(clip_config):
    task, seen = CLIPTask(clip_config(*NOISED)), []
    task.to(torch.device("cpu"))
    batch = next(batches(task.dataset, StreamSampler(64, 8, seed=0)))
    model = task.module.model
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args))
    task.module(task.prepare(batch, torch.Generator()), step=0, generator=torch.Generator().manual_seed(4))
    x, t = noised(batch["image"], task.schedule, torch.Generator().manual_seed(4))
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], t)


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_clip_on_latents_is_trained_on_the_latents(clip_config, first_stages, stage):
    where = [f"first_stage.path={first_stages / stage}", "model.vision_config.patch_size=4"]
    config = clip_config(*NOISED, *where, "cache_latents=true", "max_steps=3")
    task, folder = run(config)
    assert task.first_stage.scaling_factor is not None
    cached = next(batches(task.dataset, StreamSampler(64, 8, seed=0)))
    plain = next(batches(task.pictures, StreamSampler(64, 8, seed=0)))
    found, wanted = (task.prepare(b, torch.Generator().manual_seed(3)) for b in (cached, plain))
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    # The same convolutions over batches of another size.
    torch.testing.assert_close(found["x"], wanted["x"], rtol=1e-4, atol=1e-5)
    assert 0.7 < found["x"].std() < 1.4
    task.first_stage.model.encode = None
    task.prepare(cached, torch.Generator())

    scorer = CLIPScorer.from_pretrained(folder)
    assert scorer.space.shape == (4, 16, 16)
    assert scorer.latents.scaling_factor == task.first_stage.scaling_factor
    assert scorer.latents.first_stage_sha256 == task.first_stage.sha256
    assert (Path(config.output_dir) / "clip" / "samples" / "step-000003.png").is_file()


def test_clip_on_the_shipped_latents_takes_the_noise_of_the_shipped_model(clip_config):
    where = ["first_stage.path=shapes", "data.size=64", "model.vision_config.patch_size=2"]
    task = CLIPTask(clip_config("noised=true", *where))
    pipe = LatentDiffusionPipeline.from_pretrained("shapes")
    scorer = task.scorer()
    assert scorer.latents.scaling_factor == pipe.scaling_factor
    scorer.model.eval()
    call = {"num_inference_steps": 2, "output_type": "latent", "progress": False}
    found = pipe("a red circle", gradient=scorer.gradient("a red circle"), **call).images
    assert found.isfinite().all()
    other = CLIPTask(clip_config(*NOISED, *where)).scorer()
    with pytest.raises(InputError, match="another schedule"):
        pipe("a red circle", gradient=other.gradient("a red circle"), **call)


def test_the_temperature_is_kept_above_a_hundredth(clip_config):
    task, folder = run(clip_config("model.logit_scale_init_value=6.0", "max_steps=1", "ema.enabled=false"))
    # From 6 it was brought down before the step, which moves it by at most lr / 2 (warmup) and decay.
    found = CLIPScorer.from_pretrained(folder).model.logit_scale.item()
    assert MAX_LOGIT_SCALE - 1e-3 < found <= MAX_LOGIT_SCALE
    task.module.model.logit_scale.data.fill_(6.0)
    task.export(folder, torch.float32)
    assert CLIPScorer.from_pretrained(folder).model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_a_folder_of_captioned_pictures_is_trained_on(clip_config, tmp_path):
    export_image_folder(CaptionedShapes("train", "one", 32, 16), tmp_path / "pictures")
    data = ["data.source=image_folder", f"data.path={tmp_path / 'pictures'}"]
    _, folder = run(clip_config("max_steps=2", *data))
    tokenizer = CLIPScorer.from_pretrained(folder).tokenizer
    # A tokenizer from elsewhere, by the folder of a CLIP.
    task = CLIPTask(clip_config(f"tokenizer={folder}", "name=other", "max_length=12", *data))
    assert task.tokenizer.vocab == tokenizer.vocab
    assert task.module.model.text_model.config.max_position_embeddings == 12
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match="needs a caption for each picture"):
        CLIPTask(clip_config(*data))


def test_a_batch_holds_no_picture_of_a_folder_twice(clip_config, tmp_path, monkeypatch):
    export_image_folder(CaptionedShapes("train", "one", 32, 8), tmp_path / "pictures")
    data = ["data.source=image_folder", f"data.path={tmp_path / 'pictures'}"]
    CLIPTask(clip_config("batch_size=8", *data))
    with pytest.raises(ConfigError, match=r"batch_size=9 for the 8 pictures .*batch_size to at most 8"):
        CLIPTask(clip_config("batch_size=9", *data))
    # Pictures that also occur mirrored have one caption.
    with pytest.raises(ConfigError, match=r"batch_size=9 for the 8 pictures"):
        CLIPTask(clip_config("batch_size=9", "data.random_flip=true", *data))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    CLIPTask(clip_config("batch_size=2", *data))
    with pytest.raises(ConfigError, match=r"batch_size=3 in each of 3 processes .* at most 2"):
        CLIPTask(clip_config("batch_size=3", *data))


def test_captions_that_are_all_the_same_are_said_once(clip_config, tmp_path):
    export_image_folder(CaptionedShapes("train", "one", 32, 8), tmp_path / "pictures")
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    config = clip_config("max_steps=2", "data.source=image_folder", f"data.path={tmp_path / 'pictures'}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        CLIPTask(config)
        assert not [one for one in said if "captions" in str(one.message)]
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        metadata.write_text("\n".join(json.dumps({**row, "text": "a dog"}) for row in rows))
        run(config)
    (line,) = [str(one.message) for one in said if "captions" in str(one.message)]
    assert re.match(r"all 8 captions of .*pictures are 'a dog'", line)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_what_is_cut_of_captions_is_said_once(clip_config, said_of_captions, tmp_path, cached):
    pictures = CaptionedShapes("train", "one", 32, 16)
    export_image_folder(pictures, tmp_path / "pictures")
    data = ["data.source=image_folder", f"data.path={tmp_path / 'pictures'}", f"cache_latents={cached}"]
    config = clip_config("max_steps=2", "max_length=6", *data)
    # Every word is a token: at most four stand between the start and the end.
    cut = sum(len(pictures[i]["caption"].split()) > 4 for i in range(16))
    assert 0 < cut < 16
    (said,) = said_of_captions(lambda: run(config))
    assert said.startswith(f"{cut} of 16 captions are longer than the text window")
    assert said.endswith("see max_length")
    assert said_of_captions(lambda: CLIPTask(clip_config("max_length=16", *data))) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.num_train_timesteps=10", "noised=true"),
        ("batch_size=1", "batch_size"),
        ("model.vision_config.image_size=64", "image_size=64"),
        ("model.vision_config.num_channels=4", "num_channels=4"),
        ("model.vision_config.timestep_conditioning=true", "follows from noised"),
        ("model.text_config=3", "keys of its own"),
        ("model.text_config.layers=3", "layers"),
        ("model.text_config.vocab_size=20", "of 20"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(clip_config, override, said):
    with pytest.raises(ConfigError, match=said):
        CLIPTask(clip_config(override))


def test_the_command_trains_the_shipped_configuration(tmp_path, capsys):
    small = ["max_steps=1", "batch_size=2", "data.length=4", "data.num_workers=0", "mixed_precision=no"]
    assert main(["train", "clip", "--config", "shapes-clip", f"output_dir={tmp_path}", *small]) == 0
    scorer = CLIPScorer.from_pretrained(Path(capsys.readouterr().out.strip()))
    assert scorer.model.vision_model.config.image_size == 64


TWO_PROCESSES = """
import sys
import torch
from fastldm.training.clip import CLIPTask
from fastldm.training.config import CLIPTrainingConfig, load_config
from fastldm.training.loop import train
torch.set_num_threads(1)
config = load_config(CLIPTrainingConfig, sys.argv[1])
train(config, lambda: CLIPTask(config), progress=False)
"""


def test_two_processes_train_on_the_pairs_of_both(clip_config, tmp_path, monkeypatch):
    """As one process with the same pictures in one batch: the gradients differ by rounding only."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = ["max_steps=3", "sample_every=0", "gradient_accumulation_steps=1", "optimizer.eps=1e-3"]
    one, two = (clip_config(*shared, f"name={n}", f"batch_size={b}") for n, b in (("one", 8), ("two", 4)))
    run(one)
    (tmp_path / "two.yaml").write_text(to_yaml(two))
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(tmp_path / "two.py"), str(tmp_path / "two.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, wanted = (
        load_file(Path(c.output_dir) / c.name / "checkpoints" / "step-000003" / "model.safetensors")
        for c in (two, one)
    )
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=key)
