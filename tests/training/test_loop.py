"""The training loop: what a run leaves behind, resuming, failing, stopping, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastldm.errors import CheckpointError, ConfigError, TrainingError
from fastldm.models.vq_model import VQModel
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.checkpoint import list_checkpoints, load_checkpoint
from fastldm.training.config import TrainingConfig, load_config, to_yaml
from fastldm.training.data import StreamSampler, derive_seed
from fastldm.training.datasets import CaptionedShapes, export_image_folder
from fastldm.training.first_stage_task import FirstStageTask
from fastldm.training.latent_diffusion import LatentDiffusionTask
from fastldm.training.loop import TrainingInterrupted, learning_rate, train

ROOT = Path(__file__).resolve().parents[2]


class LineTask:
    """Fits y = 2 x with dropout and noise, so that a resumed run must repeat the random numbers too."""

    every_step_trains_all = True
    adversary = None

    def __init__(self, before_step=None):
        self.module = LineModule()
        self.averaged = self.module
        self.dataset = [{"x": torch.linspace(-1, 1, 8) * i / 20} for i in range(20)]
        self.before_step = before_step
        self.calls = 0

    def to(self, device):
        pass

    def start(self, batch):
        self.first = batch["x"].mean().item()

    def state(self):
        return {"first": self.first}

    def load_state(self, state):
        self.first = state["first"]

    def prepare(self, batch, generator):
        self.calls += 1
        if self.before_step is not None:
            self.before_step(self)
        return batch

    def picture(self, seed):
        return Image.new("RGB", (8, 8))

    def export(self, folder, dtype):
        torch.save(self.module.state_dict(), folder / "line.pt")


class LineModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 8))

    def forward(self, batch, *, step, generator):
        x = batch["x"]
        noisy = x + 0.1 * torch.randn(x.shape, generator=generator, device=x.device)
        loss = (self.net(noisy) - 2 * x).square().mean()
        return loss, {"twice": 2 * loss.detach()}


@pytest.fixture
def line_config(tmp_path):
    def make(*overrides: str) -> TrainingConfig:
        values = {
            "output_dir": str(tmp_path / "runs"),
            "max_steps": 8,
            "batch_size": 3,
            "log_every": 1,
            "checkpoint_every": 2,
            "sample_every": 4,
            "gradient_accumulation_steps": 2,
        }
        return load_config(TrainingConfig, values, overrides)

    return make


def final_state(config) -> dict[str, torch.Tensor]:
    """Every tensor and number of the last checkpoint, flat."""
    checkpoint = load_checkpoint(list_checkpoints(Path(config.output_dir) / config.name / "checkpoints")[-1])
    assert checkpoint.step == config.max_steps
    flat = {f"model.{key}": value for key, value in checkpoint.model.items()}
    flat |= {f"ema.{key}": value for key, value in checkpoint.ema.items()}
    for index, state in checkpoint.optimizer["state"].items():
        flat |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    flat["ema_updates"] = torch.tensor(checkpoint.ema_updates)
    numbers = [value for value in checkpoint.task.values() if isinstance(value, float)]
    flat["task"] = torch.tensor(numbers, dtype=torch.float64)
    return flat


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


def test_learning_rate_warms_up_and_follows_the_cosine(line_config):
    config = line_config(
        "max_steps=104",
        "optimizer.lr=1.0",
        "optimizer.warmup_steps=4",
        "optimizer.schedule=cosine",
        "optimizer.final_lr=0.2",
    )
    assert [learning_rate(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, config) == 1.0
    assert learning_rate(54, config) == pytest.approx(0.6)
    assert learning_rate(104, config) == pytest.approx(0.2)
    constant = line_config("optimizer.lr=1.0", "optimizer.warmup_steps=2")
    assert [learning_rate(step, constant) for step in (0, 1, 2, 1000)] == [0.5, 1.0, 1.0, 1.0]


def test_every_epoch_shows_every_picture_once_across_processes_and_batches():
    length, batch, processes = 10, 3, 2
    samplers = [
        StreamSampler(length, batch, seed=1, process=r, processes=processes) for r in range(processes)
    ]
    stream = [i for step in range(5) for sampler in samplers for i in sampler.batch(step)]
    epochs = [stream[i : i + length] for i in range(0, 30, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_of_pictures_is_a_function_of_seed_and_position():
    whole = StreamSampler(7, 2, seed=3)
    late = iter(StreamSampler(7, 2, seed=3, start=5))
    assert [next(late) for _ in range(4)] == [whole.batch(step) for step in range(5, 9)]
    assert StreamSampler(7, 2, seed=4).batch(0) != whole.batch(0)


def test_seeds_differ_in_every_part():
    seeds = {derive_seed(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_a_run_leaves_behind(line_config):
    config = line_config()
    exported = train(config, LineTask, progress=False)
    run = Path(config.output_dir) / config.name
    assert exported == run / "model"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000006", "step-000008"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000004.png", "step-000008.png"]
    assert (run / "config.yaml").read_text() == to_yaml(config)
    assert list((run / "logs").glob("events.*"))
    ema = load_file(run / "checkpoints" / "step-000008" / "ema.safetensors")
    state = torch.load(exported / "line.pt", weights_only=True)
    assert_same_bits(state, ema)


def test_the_logs_are_means_over_micro_steps(line_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, losses = line_config("optimizer.lr=0.5", "optimizer.warmup_steps=8"), []

    def build():
        task = LineTask()
        task.module.register_forward_hook(lambda module, args, output: losses.append(output[0].item()))
        return task

    train(config, build, progress=False)
    events = EventAccumulator(str(Path(config.output_dir) / config.name / "logs")).Reload()
    loss, twice, rate = (events.Scalars(key) for key in ("loss", "twice", "lr"))
    assert [event.step for event in loss] == list(range(1, 9))
    micro_means = [(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)]
    assert [event.value for event in loss] == pytest.approx(micro_means)
    assert [event.value for event in twice] == pytest.approx([2 * event.value for event in loss])
    assert [event.value for event in rate] == pytest.approx([0.5 * (step + 1) / 8 for step in range(8)])


@pytest.fixture
def optimizer_steps():
    """For each step of an optimiser so far: its settings, and the gradients by parameter."""
    seen = []

    def look(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        grads = {id(p): p.grad.clone() for p in group["params"] if p.grad is not None}
        seen.append(({k: v for k, v in group.items() if k != "params"}, grads))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def norm(grads) -> float:
    return torch.stack([grad.norm() for grad in grads]).norm().item()


@pytest.mark.parametrize(("limit", "clipped"), [("1e-3", True), ("null", False)])
def test_the_optimiser_is_that_of_the_configuration(line_config, optimizer_steps, limit, clipped):
    config = line_config(
        "max_steps=1",
        "optimizer.weight_decay=0.3",
        "optimizer.betas=[0.8, 0.95]",
        "optimizer.eps=1e-6",
        f"optimizer.max_grad_norm={limit}",
    )
    train(config, LineTask, progress=False)
    ((settings, grads),) = optimizer_steps
    assert (settings["weight_decay"], settings["betas"], settings["eps"]) == (0.3, (0.8, 0.95), 1e-6)
    assert (norm(grads.values()) == pytest.approx(1e-3, rel=1e-3)) == clipped


def test_an_existing_run_is_not_overwritten(line_config):
    train(line_config("max_steps=2"), LineTask, progress=False)
    with pytest.raises(ConfigError, match=r"already holds a run up to step-000002; go on with --resume"):
        train(line_config(), LineTask, progress=False)


def test_resuming_with_another_configuration_names_the_keys(line_config):
    train(line_config("max_steps=2"), LineTask, progress=False)
    other = line_config("batch_size=4", "optimizer.lr=1e-2")
    with pytest.raises(ConfigError, match=r"these keys differ: batch_size, optimizer\.lr$"):
        train(other, LineTask, resume=True, progress=False)
    assert "batch_size: 3" in (Path(other.output_dir) / other.name / "config.yaml").read_text()


def test_resuming_with_another_number_of_processes_is_refused(line_config):
    config = line_config("max_steps=2")
    train(config, LineTask, progress=False)
    checkpoint = list_checkpoints(Path(config.output_dir) / config.name / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["processes"] == 1
    (checkpoint / "state.json").write_text(json.dumps({**state, "processes": 2}))
    with pytest.raises(ConfigError, match=r"step-000002 with 1 processes: .* launch 2") as caught:
        train(line_config(), LineTask, resume=True, progress=False)
    assert "\n" not in str(caught.value)


def test_a_start_that_fails_leaves_no_empty_folder(line_config, tmp_path):
    def broken():
        raise ConfigError("nothing fits")

    config = line_config()
    with pytest.raises(ConfigError, match="nothing fits"):
        train(config, broken, progress=False)
    assert not list(tmp_path.iterdir())
    # What was there before stays, and so does a run.
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="nothing fits"):
        train(config, broken, progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    train(line_config("max_steps=2"), LineTask, progress=False)
    with pytest.raises(ConfigError, match="nothing fits"):
        train(config, broken, resume=True, progress=False)
    assert len(list_checkpoints(tmp_path / "runs" / config.name / "checkpoints")) == 1


def captions_swapped(lines):
    rows = [json.loads(line) for line in lines]
    return [json.dumps({**row, "text": other["text"]}) for row, other in zip(rows, rows[::-1])]


def one_more(lines):
    return [*lines, json.dumps({"file_name": "00000.png", "text": "again"})]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("vq", captions_swapped, "other names, captions or classes"),
        ("vq", lambda lines: lines[::-1], "other names, captions or classes"),
        ("ldm", one_more, "7 pictures instead of 6"),
    ],
    ids=["captions", "order", "number"],
)
def test_resuming_on_a_folder_that_has_changed_is_refused(
    vq_config, ldm_config, tmp_path, kind, change, said
):
    folder = tmp_path / "pictures"
    export_image_folder(CaptionedShapes(kind="one", size=32, length=6), folder)
    data = ["data.source=image_folder", f"data.path={folder}", "optimizer.schedule=constant"]
    make, task = vq_config, FirstStageTask
    if kind == "ldm":
        make, task = ldm_config, LatentDiffusionTask
        data += ["sampling.prompts=[]", "cache_latents=true"]

    def run(steps):
        config = make(*data, f"max_steps={steps}")
        train(config, lambda: task(config), resume=True, progress=False)
        return Path(config.output_dir) / config.name / "checkpoints"

    run(1)
    state = run(2) / "step-000002" / "state.json"
    metadata = folder / "metadata.jsonl"
    before = metadata.read_text()
    metadata.write_text("\n".join(change(before.splitlines())))
    with pytest.raises(ConfigError, match=rf"step-000002: the folder .* has changed .*{said}.*put it back"):
        run(3)
    # A checkpoint of before folders had fingerprints goes on.
    old = json.loads(state.read_text())
    assert old.pop("data")["pictures"] == 6
    state.write_text(json.dumps(old))
    metadata.write_text(before)
    assert (run(3) / "step-000003").is_dir()


def test_resume_without_a_checkpoint_starts_anew(line_config):
    config = line_config()
    train(config, LineTask, resume=True, progress=False)
    assert len(list_checkpoints(Path(config.output_dir) / config.name / "checkpoints")) == 2


def test_without_ema_the_trained_weights_are_exported(line_config):
    config = line_config("ema.enabled=false")
    exported = train(config, LineTask, progress=False)
    last = list_checkpoints(exported.parent / "checkpoints")[-1]
    assert not (last / "ema.safetensors").exists()
    assert_same_bits(
        torch.load(exported / "line.pt", weights_only=True), load_file(last / "model.safetensors")
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(line_config):
    def poison(task):
        if task.calls == 10:  # two micro-steps a step: step 5
            task.module.net[0].bias.data[0] = float("nan")

    config = line_config("log_every=4")
    with pytest.raises(TrainingError, match=r"loss of step 5 is not finite; .*step-000004") as caught:
        train(config, lambda: LineTask(poison), progress=False)
    assert "\n" not in str(caught.value)
    kept = list_checkpoints(Path(config.output_dir) / config.name / "checkpoints")
    assert kept[-1].name == "step-000004"
    assert all(value.isfinite().all() for value in load_checkpoint(kept[-1]).model.values())


def test_weights_that_are_not_finite_are_never_saved(line_config):
    def poison(task):
        if task.calls == 8:  # after the loss of step 4 it is too late to see it in that loss
            handle = task.module.net[2].bias.register_hook(lambda grad: grad * float("inf"))
            task.handles = [*getattr(task, "handles", []), handle]

    config = line_config("optimizer.max_grad_norm=null")
    with pytest.raises(TrainingError, match=r"^net\.2\.bias is not finite after step 4; .*step-000002"):
        train(config, lambda: LineTask(poison), progress=False)


def test_buffers_that_are_not_finite_are_never_saved(line_config):
    def poison(task):
        if task.calls == 8:
            task.module.average[1] = float("inf")

    def build():
        task = LineTask(poison)
        task.module.register_buffer("average", torch.zeros(2))
        return task

    with pytest.raises(TrainingError, match=r"^average is not finite after step 4; .*step-000002"):
        train(line_config(), build, progress=False)


def test_an_average_that_is_not_finite_is_never_saved(line_config):
    def poison(task):
        if task.calls in (6, 7):  # in step 3, and out again before the checkpoint of step 4
            task.module.counts[1] = float("inf") if task.calls == 6 else 0.0

    def build():
        task = LineTask(poison)
        task.module.register_buffer("counts", torch.zeros(2))
        return task

    said = r"^the average of counts is not finite after step 4; .*step-000002"
    with pytest.raises(TrainingError, match=said):
        train(line_config(), build, progress=False)


def test_optimiser_moments_that_are_not_finite_are_never_saved(line_config):
    def poison(task):
        if task.calls == 6:  # the square overflows, and the weight stands still from then on
            handle = task.module.net[2].bias.register_hook(lambda grad: grad * 1e30)
            task.handles = [*getattr(task, "handles", []), handle]

    config = line_config("optimizer.max_grad_norm=null")
    said = r"^exp_avg_sq of net\.2\.bias is not finite after step 4; .*step-000002"
    with pytest.raises(TrainingError, match=said):
        train(config, lambda: LineTask(poison), progress=False)


@pytest.mark.parametrize("decay", ["0.9", "null"])
def test_a_first_stage_that_diverges_between_two_logs_is_said_in_one_line(vq_config, decay):
    config = vq_config(
        "optimizer.lr=1e30",
        "optimizer.warmup_steps=0",
        "log_every=50",
        "checkpoint_every=50",
        "max_steps=50",
        f"model.ema_codebook_decay={decay}",
    )
    with pytest.raises(TrainingError, match=r"step \d+.*; there is no checkpoint yet") as caught:
        train(config, lambda: FirstStageTask(config), progress=False)
    assert "\n" not in str(caught.value)


def test_a_codebook_that_is_not_finite_stops_and_names_the_last_good_checkpoint(vq_config):
    config = vq_config("log_every=50", "checkpoint_every=2")

    def build():
        task = FirstStageTask(config)
        prepare, calls = task.prepare, []

        def poison(batch, generator):
            calls.append(1)
            if len(calls) == 5:  # two micro-steps a step: step 3
                task.module.model.quantize.embedding.weight.data[0, 0] = float("nan")
            return prepare(batch, generator)

        task.prepare = poison
        return task

    said = r"embedding\.weight is not finite in step 3; the last good checkpoint is .*step-000002"
    with pytest.raises(TrainingError, match=said):
        train(config, build, progress=False)


def test_an_error_of_a_run_that_has_not_diverged_stays_what_it_is(line_config):
    def refuse(task):
        if task.calls == 3:
            raise ValueError("a picture of another size")

    with pytest.raises(ValueError, match=r"^a picture of another size$"):
        train(line_config(), lambda: LineTask(refuse), progress=False)


def test_ctrl_c_saves_the_finished_step_and_the_run_goes_on_from_there(line_config):
    def interrupt(task):
        if task.calls == 5:  # within step 3
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    config = line_config()
    with pytest.raises(TrainingInterrupted, match=r"stopped at step 3 .*--resume"):
        train(config, lambda: LineTask(interrupt), progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert list_checkpoints(Path(config.output_dir) / config.name / "checkpoints")[-1].name == "step-000003"
    train(config, LineTask, resume=True, progress=False)
    straight = line_config("name=straight")
    train(straight, LineTask, progress=False)
    assert_same_bits(final_state(config), final_state(straight))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_old_one(line_config, monkeypatch):
    import fastldm.training.checkpoint as module

    real, calls = module.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:  # weights and EMA of the first checkpoint
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    config = line_config()
    with pytest.raises(CheckpointError, match=r"No space left on device; .*step-000002"):
        train(config, LineTask, progress=False)
    checkpoints = Path(config.output_dir) / config.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
import fastldm.training.checkpoint as checkpoint
from fastldm.training.config import FirstStageConfig, LatentDiffusionConfig, load_config
from fastldm.training.loop import train

real, calls = torch.save, []
def killed_while_saving(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
checkpoint.torch.save = killed_while_saving

if sys.argv[1] == "vq":
    from fastldm.training.first_stage_task import FirstStageTask as Task
    config = load_config(FirstStageConfig, sys.argv[2])
else:
    from fastldm.training.latent_diffusion import LatentDiffusionTask as Task
    config = load_config(LatentDiffusionConfig, sys.argv[2])
train(config, lambda: Task(config), progress=False)
"""


def script(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Python code in a process of its own, from the checkout."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("kind", ["vq", "ldm"])
def test_a_run_killed_while_it_saves_resumes_bit_for_bit(kind, vq_config, ldm_config, tmp_path):
    make, task = (vq_config, FirstStageTask) if kind == "vq" else (ldm_config, LatentDiffusionTask)
    straight, killed = make("name=straight"), make("name=killed")
    train(straight, lambda: task(straight), progress=False)

    file = tmp_path / "killed.yaml"
    file.write_text(to_yaml(killed))
    result = script("-c", KILLED, kind, str(file), str(torch.get_num_threads()), check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    checkpoints = Path(killed.output_dir) / killed.name / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000002"]
    assert len(list(checkpoints.iterdir())) == 2  # the checkpoint and what the kill left of the next

    train(killed, lambda: task(killed), resume=True, progress=False)
    assert_same_bits(final_state(straight), final_state(killed))
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []
    folder = "" if kind == "vq" else "unet"
    weights = Path(folder) / "diffusion_pytorch_model.safetensors"
    one, other = (Path(c.output_dir) / c.name / "model" / weights for c in (straight, killed))
    assert one.read_bytes() == other.read_bytes()


def test_the_exported_folders_load(vq_config, ldm_config):
    stage = vq_config("max_steps=1", "export_dtype=float16")
    folder = train(stage, lambda: FirstStageTask(stage), progress=False)
    model = VQModel.from_pretrained(folder)
    assert model.decode(model.encode(torch.zeros(1, 3, 32, 32)).latents).sample.shape == (1, 3, 32, 32)
    assert not [key for key in load_file(folder / "diffusion_pytorch_model.safetensors") if "ema" in key]

    config = ldm_config(f"first_stage.path={folder}", "max_steps=1", "export_dtype=float16")
    pipeline = LatentDiffusionPipeline.from_pretrained(
        train(config, lambda: LatentDiffusionTask(config), progress=False)
    )
    assert pipeline.defaults["num_inference_steps"] == 2
    assert pipeline(["a large red circle"], progress=False).images[0].size == (32, 32)


def test_the_discriminator_learns_beside_the_autoencoder(vq_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = vq_config("loss.disc_weight=0.5", "loss.disc_start=2", "loss.disc_channels=8", "max_steps=4")
    tasks = []

    def build():
        tasks.append(FirstStageTask(config))
        tasks[0].fresh = {k: v.clone() for k, v in tasks[0].module.loss.discriminator.named_parameters()}
        return tasks[0]

    folder = train(config, build, progress=False).parent
    trained = dict(tasks[0].module.loss.discriminator.named_parameters())
    assert all(not torch.equal(trained[key], value) for key, value in tasks[0].fresh.items())
    logs = EventAccumulator(str(folder / "logs")).Reload()
    assert [event.step for event in logs.Scalars("loss")] == [1, 2, 3, 4]
    for key in ("generator_loss", "disc_weight", "discriminator_loss"):  # steps count from 0 in disc_start
        assert [event.step for event in logs.Scalars(key)] == [3, 4]


def test_autoencoder_and_discriminator_are_clipped_apart(vq_config, optimizer_steps):
    config = vq_config(
        "loss.disc_weight=0.5",
        "loss.disc_start=1",
        "loss.disc_channels=8",
        "max_steps=2",
        "optimizer.max_grad_norm=1e-3",
    )
    tasks = []

    def build():
        tasks.append(FirstStageTask(config))
        return tasks[0]

    train(config, build, progress=False)
    discriminator = {id(p) for p in tasks[0].module.loss.discriminator.parameters()}
    for (_, grads), started in zip(optimizer_steps, (False, True), strict=True):
        theirs = [grad for key, grad in grads.items() if key in discriminator]
        ours = [grad for key, grad in grads.items() if key not in discriminator]
        assert norm(ours) == pytest.approx(1e-3, rel=1e-2)
        assert bool(theirs) == started
    assert norm(theirs) == pytest.approx(1e-3, rel=1e-2)


TWO_PROCESSES = """
import json, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from fastldm.training.config import FirstStageConfig, LatentDiffusionConfig, load_config
from fastldm.training.first_stage_task import FirstStageTask
from fastldm.training.latent_diffusion import LatentDiffusionTask
from fastldm.training.loop import train

def run(cls, Task, file):
    config = load_config(cls, file)
    tasks = []
    def build():
        tasks.append(Task(config))
        return tasks[0]
    train(config, build, progress=False)
    flat = torch.cat([v.detach().double().flatten() for v in tasks[0].module.state_dict().values()])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    same, finite = torch.equal(*both), bool(flat.isfinite().all())
    return {"processes": len(both), "same": same, "finite": finite}

found = [
    run(FirstStageConfig, FirstStageTask, sys.argv[1]),
    run(LatentDiffusionConfig, LatentDiffusionTask, sys.argv[2]),
]
if dist.get_rank() == 0:
    print("FOUND " + json.dumps(found))
"""


def test_two_processes_stay_in_step(vq_config, ldm_config, tmp_path, monkeypatch):
    files = []
    for name, config in (("vq", vq_config("name=vq")), ("ldm", ldm_config("name=ldm"))):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(to_yaml(config))
    code = tmp_path / "two.py"
    code.write_text(textwrap.dedent(TWO_PROCESSES))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = script(*launch, str(code), *map(str, files))
    found = json.loads(result.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found == [{"processes": 2, "same": True, "finite": True}] * 2
    for name in ("vq", "ldm"):
        run = tmp_path / "runs" / name
        assert [path.name for path in list_checkpoints(run / "checkpoints")][-1] == "step-000006"
        assert (run / "model").is_dir()
        assert load_checkpoint(run / "checkpoints" / "step-000006").processes == 2
