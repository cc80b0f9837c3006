"""Where the Triton kernels of attention read and write, and in which order."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

from fastldm import ops
from fastldm.testing import live_backends, poisoned_memory
from fastldm.testing.inputs import attention_inputs, attention_mask
from fastldm.testing.shapes import AttentionShape

pytestmark = pytest.mark.skipif(
    "triton" not in live_backends("attention"), reason="neither a GPU nor Triton's interpreter"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("short", "long", "split", "wide")
# 40 is two pieces, 32 and 16, of which the second passes its end; the wide path has none.
WIDTH = {"short": 40, "long": 40, "split": 40, "wide": 32}

interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), reason="looks into the interpreter"
)


def run(inputs, mask=None, is_causal=False, watching=nullcontext):
    """Output and gradients of q, k, v by the kernels."""
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned_memory(), watching():
        out = ops.attention(*leaves, mask, is_causal=is_causal, backend="triton")
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def masks(shape):
    full = torch.randn(shape.batch, shape.heads, shape.queries, shape.keys)
    return None, attention_mask(shape, "float32-row"), full > 0.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_strides_past_2_31(dimension, path, take):
    """Elements, of which those between are never touched."""
    take(path)
    queries, keys = (20, 35) if dimension < 2 else (2, 2)
    inputs = attention_inputs(AttentionShape(2, 2, queries, keys, WIDTH[path]), torch.float16)
    memory = torch.empty(2**31 + sum(x.numel() for x in inputs), dtype=torch.float16, device=DEVICE)
    far, start = [], 0
    for x in inputs:
        strides = [2**31 if i == dimension else stride for i, stride in enumerate(x.stride())]
        far.append(memory.as_strided(x.shape, strides, start).copy_(x))
        start += x.numel()
    for a, b in zip(run([x.to(DEVICE) for x in inputs]), run(far)):
        assert torch.equal(a, b)


def surrounded(x):
    """A view equal to x, of memory that is NaN (or True) before, between and after its rows."""
    memory = torch.full([size + 2 for size in x.shape], torch.nan).to(x.dtype).to(DEVICE)
    view = memory[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_around_the_tensors_is_used(path, take):
    take(path)
    shape = AttentionShape(1, 2, 20, 35, WIDTH[path])
    inputs = [x.to(DEVICE) for x in attention_inputs(shape, torch.float32)]
    for mask in masks(shape):
        is_causal = mask is None
        mask = None if mask is None else mask.to(DEVICE)
        around = None if mask is None else surrounded(mask)
        expected = run(inputs, mask, is_causal)
        for a, b in zip(expected, run([surrounded(x) for x in inputs], around, is_causal)):
            assert torch.equal(a, b)


@interpreting
@pytest.mark.parametrize("path", PATHS)
def test_every_access_is_inside_a_tensor(path, take):
    from fastldm.testing.interpreter import checked_accesses

    take(path)
    shape = AttentionShape(1, 2, 20, 35, WIDTH[path])
    for mask in masks(shape):
        is_causal = mask is None
        run(attention_inputs(shape, torch.float32), mask, is_causal, checked_accesses)


@interpreting
@pytest.mark.parametrize("path", PATHS)
def test_programs_may_run_in_any_order(path, take):
    from fastldm.testing.interpreter import programs_from_the_last

    take(path)
    inputs = attention_inputs(AttentionShape(1, 2, 40, 50, WIDTH[path]), torch.float16)
    for a, b in zip(run(inputs), run(inputs, watching=programs_from_the_last)):
        assert torch.equal(a, b)
