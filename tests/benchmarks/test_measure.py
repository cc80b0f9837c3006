"""A wrong kernel gets no time; the arithmetic of rows."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import pytest
import torch

from benchmarks import registry
from benchmarks.checks import spread
from benchmarks.measure import Row, _compare, falls_behind, measure
from benchmarks.providers import installed, too_large
from benchmarks.registry import Case, Provider

TINY = {
    "attention": Case("attention", "more-keys", "float32", "contiguous", "forward"),
    "group_norm": Case("group_norm", "cpg-20", "float32", "channels-last", "forward"),
    "vq_nearest": Case("vq_nearest", "odd", "float32", "contiguous", "forward"),
    "vq_ema_update": Case("vq_ema_update", "odd", "float32", "contiguous", "forward"),
}


def spoiled(provider: Provider, change) -> Provider:
    """A provider beside this one, with a changed result."""

    def build(problem):
        function = provider.build(problem)
        return lambda *inputs: change(function(*inputs))

    return Provider(f"changed-{provider.name}", build, ours=provider.ours)


def scaled(result):
    """A part in a thousand too large; for indices, the last one off by one."""
    if isinstance(result, tuple):
        return (result[0], result[1] * 1.001)
    if result.is_floating_point():
        return result * 1.001
    return torch.cat([result[:-1], (result[-1:] + 1) % 37])


def ours(op: str) -> Provider:
    return registry.providers(registry.find(op), ["fastldm-auto"])[0]


def rival(op: str) -> Provider:
    return registry.providers(registry.find(op), [registry.find(op).torch])[0]


@pytest.mark.parametrize("op", TINY)
def test_a_wrong_kernel_is_refused_and_a_wrong_rival_marked(op):
    right, peer = ours(op), rival(op)
    rows = measure(TINY[op], [right, spoiled(right, scaled), peer], rounds=2)
    assert [row.fault is None for row in rows] == [True, False, True]
    assert [row.seconds is None for row in rows] == [False, True, False]
    assert rows[1].error > 0
    assert rows[1].samples == []
    assert rows[1].ratio is None
    assert rows[0].best_rival == peer.name
    assert rows[0].ratio == pytest.approx(rows[2].seconds / rows[0].seconds)
    (row,) = measure(TINY[op], [spoiled(peer, scaled)], rounds=1)
    assert row.fault
    assert row.seconds > 0


@pytest.mark.parametrize("direction", ["backward", "forward+backward"])
@pytest.mark.parametrize("op", ["attention", "group_norm"])
def test_a_wrong_gradient_is_refused(op, direction):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    case = Case(op, TINY[op].shape, "float32", "contiguous", direction)
    right = ours(op)
    rows = measure(case, [right, spoiled(right, Wrong.apply)], rounds=1)
    assert rows[0].fault is None
    assert rows[1].fault.startswith("d")
    assert rows[1].seconds is None


def test_the_ratio_is_to_the_fastest_rival():
    def row(provider, ours, seconds):
        return Row(
            **asdict(TINY["attention"]), dims={}, threads=1, provider=provider, ours=ours, seconds=seconds
        )

    rows = [
        row("mine", True, 2.0),
        row("slow", False, 8.0),
        row("fast", False, 3.0),
        row("none", False, None),
    ]
    _compare(rows, "slow")
    assert (rows[0].best_rival, rows[0].ratio) == ("fast", 1.5)
    assert rows[1].ratio is None


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_every_head_of_a_large_case_is_looked_at(direction, monkeypatch):
    """Where not all can be compared whole."""
    monkeypatch.setattr("benchmarks.ops.attention._CHECKED_SCORES", 200)
    case = Case("attention", "sdxl-text-64", "float32", "contiguous", direction)
    right = ours("attention")

    def lose_a_head(out):
        keep = torch.ones(1, 2, 1, 1)
        keep[0, 0] = 0.0
        return out * keep

    rows = measure(case, [right, spoiled(right, lose_a_head)], rounds=1)
    assert [row.fault is None for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out.index_put((torch.tensor(0),) * 4, torch.tensor(torch.nan)), "1 elements are NaN"),
        (lambda out: out[:, :, 1:], "is due"),
        (lambda out: out.double(), "is due"),
        (lambda out: (out, out), "2 results where 1 are due"),
        (lambda out: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_results_that_are_no_result(change, message):
    right = ours("attention")
    (row,) = measure(TINY["attention"], [spoiled(right, change)], rounds=1)
    assert message in row.fault
    assert row.seconds is None


def test_a_rival_that_fails_or_is_absent_did_not_run():
    peer = rival("group_norm")
    failing = spoiled(peer, lambda out: 1 / 0)
    absent = Provider("absent", peer.build, refuse=installed("no_such_module"))
    rows = measure(TINY["group_norm"], [ours("group_norm"), failing, absent], rounds=1)
    assert rows[1].refused.startswith("ZeroDivisionError")
    assert rows[2].refused == "no_such_module is not installed"
    assert rows[0].seconds > 0
    assert rows[0].ratio is None


def test_floors_are_in_the_row():
    (attention,) = measure(TINY["attention"], [ours("attention")], rounds=1)
    assert attention.floor == "matmul"
    assert attention.rate * attention.seconds == pytest.approx(4 * 5 * 300 * 32)
    (norm,) = measure(TINY["group_norm"], [ours("group_norm")], rounds=1)
    assert norm.floor == "copy"
    assert norm.rate * norm.seconds == pytest.approx(2 * 2 * 640 * 15 * 4)
    assert norm.floor_rate * norm.floor_seconds == pytest.approx(2 * 2 * 640 * 15 * 4)


@pytest.mark.parametrize(
    ("seconds", "peer", "behind"),
    [
        (20e-6, 6e-6, False),
        (22e-6, 6e-6, True),
        (1.02, 1.0, False),
        (1.04, 1.0, True),
        (0.5, 1.0, False),
    ],
)
def test_auto_falls_behind_by_more_than_3_percent_and_15_microseconds(seconds, peer, behind):
    assert falls_behind(seconds, peer) == behind


def test_spread():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 0) == [99]
    assert spread(100, 2) == [0, 99]
    assert len(set(spread(1000, 7))) == 7


def test_what_needs_more_memory_than_there_is_is_not_tried():
    assert too_large(1 << 60, "cpu").startswith("needs 1073741824.0 GiB at once")
    assert too_large(1, "cpu") is None


def test_networks():
    op = registry.find("unet-step")
    named = partial(registry.providers, op)
    (right,), (peer,) = named(["fastldm"]), named(["diffusers-channels-last"])
    case = Case("unet-step", "demo", "float32", "contiguous", "forward")
    rows = measure(case, [right, spoiled(right, scaled), peer], rounds=1)
    assert [row.fault is None for row in rows] == [True, False, True]
    assert rows[0].error <= 1e-5
    assert rows[0].best_rival == "diffusers-channels-last"
    assert rows[0].rate > 0
