"""Group norm kernels that are broken on purpose: each must fail what tests/kernels/test_group_norm.py
checks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastldm.testing import live_backends, poisoned_memory
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GroupNormShape

if "triton" not in live_backends("group_norm"):
    pytest.skip("no GPU and no interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from tests.kernels.test_group_norm import LAYOUTS, WAYS, Forced, check


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


# File, what is broken, the text and what it becomes. Each must fail `check` in one of the ways at least.
MUTANTS = [
    ("tile", "lanes beyond the channels of a block", "(lane < GROUPS * CPG) & ", ""),
    (
        "tile",
        "groups that end at powers of two",
        "(tl.arange(0, BLOCK_C) // CPG)",
        "(tl.arange(0, BLOCK_C) // 16)",
    ),
    ("tile", "no scale", "weight * gain, ", "weight, "),
    ("forward_kernels", "E[x^2] - E[x]^2", " / first_count.to(tl.float32)", " * 0.0"),
    ("forward_kernels", "pixels past the end", "tl.where(mask, shifted(", "tl.where(mask | True, shifted("),
    ("forward_kernels", "nothing between the chunks", "spreads + counts * apart * apart", "spreads"),
    (
        "forward_kernels",
        "a last chunk as long as the others",
        "pixels - each * chunk_pixels",
        "pixels + each * 0",
    ),
    ("forward_kernels", "half of the saved mean", "group, pivot + rest,", "group, pivot,"),
    ("forward_kernels", "half of the mean in y", "    low -= to_channels(rest, member)\n", ""),
    (
        "gradient",
        "the slope of SiLU without the affine part",
        "u = xhat * slope[:, None] + offset[:, None]",
        "u = xhat",
    ),
    ("gradient", "dx with a mean", " - c1[:, None]", ""),
    ("gradient", "dx with a part along xhat", " - (xhat - off[:, None]) * c2[:, None]", ""),
    ("gradient", "means without the weight", "to_groups(slope * sum1, member)", "to_groups(sum1, member)"),
    ("gradient", "dchannel_bias with a part along xhat", " - to_channels(c2, member) * rest", ""),
    ("gradient", "padding with an xhat", "tl.where(mask, normalized(", "tl.where(mask | True, normalized("),
    ("backward_kernels", "dweight without 1 + scale", "dweight += gain * ", "dweight += "),
    ("backward_kernels", "a chunk left out", "(each < chunks)[:, None]", "(each < chunks - 1)[:, None]"),
]


def mutated(folder: Path, file: str, old: str, new: str):
    """forward and backward with one text replaced, as modules of the package."""
    package = "fastldm.kernels.group_norm"
    root = Path(sys.modules[package].__file__).parent
    files = ("tile", "gradient", "forward_kernels", "backward_kernels", "forward", "backward")
    for name in files:
        text = (root / f"{name}.py").read_text()
        if name == file:
            assert old in text, f"nothing to break: {old!r}"
            text = text.replace(old, new)
        for other in files:
            text = text.replace(f"from .{other} import", f"from ._mutant_{other} import")
            text = text.replace(f"from . import {other} as", f"from . import _mutant_{other} as")
        path = folder / f"_mutant_{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return {name: getattr(sys.modules[f"{package}._mutant_{name}"], name) for name in ("forward", "backward")}


def survives(functions) -> bool:
    """Whether a broken kernel passes `check` in every way."""
    shape = GroupNormShape((2, 30, 5, 7), 3)
    for layout in LAYOUTS:
        for way in ("resident-2", "sweep", "split"):
            for mean in (0.5, 1e3):
                inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=mean, std=1.0)
                try:
                    with Forced(WAYS[way]):
                        check(inputs, 3, **functions)
                except AssertionError:
                    return False
    return True


@pytest.fixture
def no_mutants_left():
    yield
    for name in [name for name in sys.modules if "._mutant_" in name]:
        del sys.modules[name]


@pytest.mark.parametrize(("file", "what", "old", "new"), MUTANTS, ids=[what for _, what, _, _ in MUTANTS])
def test_a_broken_kernel_fails(file, what, old, new, tmp_path, no_mutants_left):
    assert not survives(mutated(tmp_path, file, old, new))


def test_an_unbroken_kernel_does_not_fail(tmp_path, no_mutants_left):
    assert survives(mutated(tmp_path, "tile", "", ""))
