"""VQ kernels that are broken on purpose: each must fail what tests/kernels/test_vq.py checks."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from fastldm.testing import live_backends, poisoned_memory
from fastldm.testing.inputs import vq_inputs
from fastldm.testing.shapes import VQShape

if "triton" not in live_backends("vq_nearest"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from fastldm.kernels.vq import configs, finish, nearest, search_few, search_many

from tests.kernels.test_vq import (
    DEVICE,
    UNIT,
    check_all,
    check_sums,
    cut_off_by_tensor_cores,
    cutting_tensor_cores,  # noqa: F401, a fixture
    forced,
    one_split,  # noqa: F401, a fixture
    order_of_addition,
    shuffled,
    small_few,
    small_finish,
    wrong_in_float32,
)

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="changes the interpreter")


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


BROKEN = {
    "bound an eighth, float32": ("bound", "2.0 * (1.0 + 2.0**-9) * error", "0.25 * error", "wrong"),
    "bound an eighth, tensor cores": ("bound", "2.0 * (1.0 + 2.0**-9) * error", "0.25 * error", "cut-off"),
    "open rows stay": ("finish", "    while count > 0:", "    while count > 1000:", "wrong"),
    "highest index of a tile": (
        "finish",
        "tl.min(tl.where(same, code[None, :], num_codes), axis=1)",
        "tl.max(tl.where(same, code[None, :], -1), axis=1)",
        "ties",
    ),
    "last tile": ("finish", "(lowest < found))", "(lowest > found))", "ties"),
    "highest index of a place": (
        "finish",
        "index = tl.min(tl.where(distance == nearest[:, None], codes, num_codes - 1), axis=1)",
        "index = tl.max(tl.where(distance == nearest[:, None], codes, 0), axis=1)",
        "pairs",
    ),
    "fused squares": (
        "finish",
        "distance += difference * difference",
        "distance = tl.fma(difference, difference, distance)",
        "order",
    ),
    "squares added backwards": (
        "finish",
        "d = tl.full((), first + step, tl.int64)",
        "d = tl.full((), DIM - 1 - first - step, tl.int64)",
        "order",
    ),
    "squares added backwards in a place": (
        "finish",
        "d = tl.full((), step, tl.int64)",
        "d = tl.full((), DIM - 1 - step, tl.int64)",
        "order in a place",
    ),
    "second best of a lane": ("search_few", "tl.maximum(best, least)", 'float("inf")', "equal"),
    "other lanes": (
        "search_few",
        "tl.where(here, second, best)",
        'tl.where(here, second, float("inf"))',
        "wrong",
    ),
    "splits": ("finish", "tl.minimum(others, tl.maximum(least, new))", "others", "equal"),
}


def equal_in_float32():
    """Codes 128 apart, in one lane of two blocks, of which the second is nearer by about the rounding of a
    score."""
    codebook = torch.nn.functional.normalize(torch.randn(128, 3, generator=torch.Generator().manual_seed(0)))
    return 3.0 * codebook[:60], torch.cat([codebook, codebook * (1.0 + 2.0**-23)])


INPUTS = {
    "wrong": lambda: [wrong_in_float32()],
    "cut-off": lambda: [cut_off_by_tensor_cores()],
    "ties": lambda: [vq_inputs(30, VQShape(300, 3), kind="ties")],
    "pairs": lambda: [vq_inputs(30, VQShape(300, 3), kind="duplicates")],
    "order": lambda: [shuffled(*order_of_addition())],
    "order in a place": lambda: [
        (order_of_addition()[0], order_of_addition()[1][6 * i :][:4]) for i in range(5)
    ],
    "equal": lambda: [equal_in_float32()],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_seen(name, tmp_path, monkeypatch, request):
    module, before, after, inputs = BROKEN[name]
    if name == "fused squares":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        if not hasattr(interpreter._interpreter, "fma_fp64"):
            pytest.skip("this Triton's interpreter rounds a fused multiply-add twice")
    if name == "second best of a lane":
        request.getfixturevalue("one_split")
    if inputs == "cut-off":
        request.getfixturevalue("cutting_tensor_cores")
    original = importlib.import_module(f"fastldm.kernels.vq.{module}")
    with open(original.__file__, encoding="utf-8") as file:
        text = file.read()
    assert before in text
    with forced(search_few=small_few(), finish=small_finish()):
        check_all(INPUTS[inputs]())
        path = tmp_path / f"{module}.py"
        path.write_text(text.replace(before, after), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"fastldm.kernels.vq._broken_{module}", path)
        broken = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(broken)
        for user in (nearest, finish, search_few, search_many):
            for function in ("slack", "finish", "search_few", "search_many"):
                if hasattr(user, function) and hasattr(broken, function) and user is not original:
                    monkeypatch.setattr(user, function, getattr(broken, function))
        with pytest.raises(AssertionError):
            check_all(INPUTS[inputs]())


BROKEN_SUMS = {
    "later units lost": ("    if later > 0:", "    if later > 1000:"),
    "unit begins late": ("(UNIT - (at - first) % UNIT) % UNIT", "UNIT - (at - first) % UNIT"),
}


@pytest.mark.parametrize("name", BROKEN_SUMS)
def test_broken_sums_are_seen(name, tmp_path, monkeypatch):
    before, after = BROKEN_SUMS[name]
    original = importlib.import_module("fastldm.kernels.vq.ema_update")
    with open(original.__file__, encoding="utf-8") as file:
        text = file.read()
    assert before in text
    path = tmp_path / "ema_update.py"
    path.write_text(text.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fastldm.kernels.vq._broken_sums", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    with forced(ema_update=configs.EmaConfig(UNIT, 8, 4, 1)):
        z, indices = torch.randn(100, 3), torch.zeros(100, dtype=torch.int64)
        check_sums(z, indices, 2)
        monkeypatch.setattr(original, "sum_units", broken.sum_units)
        monkeypatch.setattr(original, "sum_partials", broken.sum_partials)
        with pytest.raises(AssertionError):
            check_sums(z, indices, 2)
