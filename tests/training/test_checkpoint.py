"""Checkpoints on disk and the moving average."""

from __future__ import annotations

import errno
import resource

import pytest
import torch
from torch import nn

from fastldm.errors import CheckpointError
from fastldm.training import checkpoint as checkpoints
from fastldm.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    save_checkpoint,
)
from fastldm.training.ema import EMA


def make(step: int, module: nn.Module) -> Checkpoint:
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return Checkpoint(
        step=step,
        model=module.state_dict(),
        ema=EMA(module, 0.9).state_dict(),
        ema_updates=step,
        processes=2,
        optimizer=optimizer.state_dict(),
        scaler=None,
        task={"scaling_factor": 0.125},
        config={"batch_size": 4},
    )


@pytest.fixture
def module():
    return nn.Linear(4, 300)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path, module):
    saved = make(3, module)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=1))
    assert (loaded.step, loaded.ema_updates, loaded.processes) == (3, 3, 2)
    assert loaded.task == {"scaling_factor": 0.125}
    for one, other in ((saved.model, loaded.model), (saved.ema, loaded.ema)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert saved.optimizer["param_groups"] == loaded.optimizer["param_groups"]
    for index, state in saved.optimizer["state"].items():
        assert all(torch.equal(value, loaded.optimizer["state"][index][key]) for key, value in state.items())


def test_only_the_newest_are_kept(tmp_path, module):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, make(step, module), keep=2)
    assert names(tmp_path) == ["step-000006", "step-000008"]
    save_checkpoint(tmp_path, make(8, module), keep=2)
    assert names(tmp_path) == ["step-000006", "step-000008"]


def test_a_million_steps_sort_by_number(tmp_path, module):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, make(step, module), keep=2)
    assert list_checkpoints(tmp_path)[-1].name == "step-1000000"


@pytest.mark.parametrize("function", ["save_file", "torch.save"])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, module, monkeypatch, function):
    save_checkpoint(tmp_path, make(2, module), keep=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"{checkpoints.__name__}.{function}", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the last checkpoint is .*step-000002"
    ):
        save_checkpoint(tmp_path, make(4, module), keep=1)
    assert names(tmp_path) == ["step-000002"]
    load_checkpoint(tmp_path / "step-000002")


@pytest.mark.parametrize("limit", [2_000, 12_000])
def test_a_write_that_really_fails_keeps_the_old_checkpoint(tmp_path, module, limit):
    # The first limit stops the weights (5 kB), the second the optimiser state (about 15 kB).
    save_checkpoint(tmp_path, make(2, module), keep=1)
    newer = make(4, module)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="the last checkpoint is"):
            save_checkpoint(tmp_path, newer, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000002"]
    load_checkpoint(tmp_path / "step-000002")


def test_leftovers_of_a_kill_are_removed_and_checkpoints_are_not(tmp_path, module):
    save_checkpoint(tmp_path, make(2, module), keep=1)
    (tmp_path / ".step-000004.0a1b2c3d.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize("damaged", ["state.json", "model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["absent", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path, module, damaged, how):
    path = save_checkpoint(tmp_path, make(2, module), keep=1)
    if how == "absent":
        (path / damaged).unlink()
    else:
        (path / damaged).write_bytes((path / damaged).read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*step-000002") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named_by_its_keys(tmp_path, module):
    checkpoint = load_checkpoint(save_checkpoint(tmp_path, make(2, module), keep=1))
    other = nn.ModuleDict({"inner": nn.Linear(4, 3)})
    with pytest.raises(
        CheckpointError, match=r"2 missing \(inner.bias, inner.weight\); 2 unexpected \(bias, weight\)"
    ):
        load_weights(other, checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=r"weight \(300, 4\) instead of \(3, 4\)"):
        load_weights(nn.Linear(4, 3), checkpoint, tmp_path)


def test_ema_follows_its_warmup_and_then_its_decay():
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("count", torch.tensor(0))
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.3)
    expected = 0.0
    for n in range(6):
        nn.init.constant_(module.weight, n + 1.0)
        module.count += 1
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1.0)
    assert ema.updates == 6
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.average["count"].item() == 6


def test_ema_follows_tensors_that_are_replaced_and_does_not_walk_the_state_dict(monkeypatch):
    module = nn.BatchNorm1d(2)
    ema = EMA(module, decay=0.5)
    expected = {name: value.clone() for name, value in ema.average.items()}
    monkeypatch.setattr(nn.Module, "state_dict", None)
    for n, value in enumerate((1.5, -0.3, 7.0)):
        module.weight = nn.Parameter(torch.full((2,), value))
        module.bias.data = torch.full((2,), value / 3)
        module.running_mean = torch.full((2,), value / 7, dtype=torch.float16)
        module.running_var.fill_(value)
        module.num_batches_tracked = torch.tensor(n)
        ema.update()
        for name in ("weight", "bias", "running_mean", "running_var"):
            new = getattr(module, name).detach().float()
            expected[name].lerp_(new, 1 - min(0.5, (1 + n) / (10 + n)))
        expected["num_batches_tracked"].fill_(n)
    assert all(torch.equal(ema.average[name], value) for name, value in expected.items())


def test_ema_is_applied_and_the_trained_weights_come_back_bit_for_bit():
    module = nn.Linear(5, 5)
    ema = EMA(module, decay=0.5)
    nn.init.normal_(module.weight)
    ema.update()
    before = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, ema.average["weight"])
        assert not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)


def test_the_trained_weights_come_back_after_an_error_too():
    module = nn.Linear(5, 5)
    ema = EMA(module, decay=0.5)
    nn.init.normal_(module.weight)
    before = module.weight.detach().clone()

    def fail():
        with ema.applied():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(module.weight, before)
