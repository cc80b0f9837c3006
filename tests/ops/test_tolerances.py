"""The gate itself: a kernel broken on purpose fails, a correct one of another summation order passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastldm
from fastldm import dispatch, ops
from fastldm.implementation import Implementation
from fastldm.testing import (
    assert_as_accurate,
    assert_same_special_values,
    plain_attention,
    plain_group_norm,
    poisoned_memory,
    rounding_atol,
)
from fastldm.testing.inputs import attention_inputs, group_norm_inputs
from fastldm.testing.shapes import ATTENTION, GROUP_NORM


def broken_attention(fault):
    """Attention with one fault of the kind that kernels have."""

    def forward(q, k, v, attn_mask, is_causal, scale, need_lse):
        if fault == "last key dropped":
            out = plain_attention(q, k[:, :, :-1], v[:, :, :-1])
        elif fault == "padded keys counted":
            out = plain_attention(q, *(F.pad(x, (0, 0, 0, -x.shape[2] % 64)) for x in (k, v)))
        elif fault == "scale of the padded head dim":
            out = plain_attention(q, k, v, scale=64**-0.5)
        elif fault == "float16 sum":
            p = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1).half()
            out = sum(p[..., i : i + 1] * v[:, :, i : i + 1].half() for i in range(k.shape[2])).to(q.dtype)
        elif fault == "one row not written":
            out = torch.empty_like(q)
            out[:, :, :-1] = plain_attention(q, k, v)[:, :, :-1]
        else:
            order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(1))
            out = plain_attention(q, k[:, :, order], v[:, :, order])
        return out.contiguous(), q.new_empty(0, dtype=torch.float32)

    return Implementation(forward=forward)


FAULTS = (
    "last key dropped",
    "padded keys counted",
    "scale of the padded head dim",
    "float16 sum",
    "one row not written",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_attention_gate(fault, dtype, monkeypatch):
    if fault == "float16 sum" and dtype != torch.float32:
        dtype = torch.float32
    monkeypatch.setitem(dispatch.BACKENDS, "broken", "fastldm.native:cpu")
    find = dispatch.find
    broken = broken_attention(fault)
    monkeypatch.setattr(dispatch, "find", lambda name, op: broken if name == "broken" else find(name, op))
    # The fault sits in "fastldm." code only by this name, which is what the poison looks at.
    monkeypatch.setitem(broken_attention.__globals__, "__name__", "fastldm.broken")
    shape = ATTENTION["sd15-text-40"]
    q, k, v, _ = attention_inputs(shape, dtype)
    result = ops.attention(q, k, v, backend="broken")
    exact = plain_attention(q.double(), k.double(), v.double())
    plain = plain_attention(q, k, v)

    def gate():
        assert_as_accurate(result, exact, plain, terms=shape.keys + shape.head_dim)

    if fault is None:
        gate()
    else:
        with pytest.raises(AssertionError, match="first at"):
            gate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["no eps", "unbiased variance", "naive variance", None])
def test_group_norm_gate(fault, dtype):
    shape = GROUP_NORM["cpg-10"]
    mean = 100.0 if fault == "naive variance" else 0.0
    x = group_norm_inputs(shape, dtype, mean=mean, std=0.05 if fault == "no eps" else 1.0)["x"]
    groups = x.float().reshape(2, 32, -1)
    centre = groups.mean(-1, keepdim=True)
    variance = groups.var(-1, correction=int(fault == "unbiased variance"), keepdim=True)
    if fault == "naive variance":
        variance = groups.square().mean(-1, keepdim=True) - centre.square()
    eps = 0.0 if fault == "no eps" else 1e-5
    result = ((groups - centre) * (variance + eps).rsqrt()).reshape(x.shape).to(dtype)
    exact, plain = plain_group_norm(x.double(), 32), plain_group_norm(x, 32)
    # In bfloat16 the result is too coarse to show faults of 1e-3 and less.
    if fault is None or dtype == torch.bfloat16:
        assert_as_accurate(result, exact, plain, terms=640)
    else:
        with pytest.raises(AssertionError, match="over the limit"):
            assert_as_accurate(result, exact, plain, terms=640)


def test_special_values():
    reference = torch.tensor([[1.0, torch.nan], [torch.inf, -torch.inf]])
    assert_same_special_values(reference.clone(), reference)
    for position, value in (((0, 0), torch.nan), ((0, 1), 1.0), ((1, 0), -torch.inf), ((1, 1), 0.0)):
        wrong = reference.clone()
        wrong[position] = value
        with pytest.raises(AssertionError, match=rf"first at \({position[0]}, {position[1]}\)"):
            assert_same_special_values(wrong, reference)
        with pytest.raises(AssertionError, match="on one side only"):
            assert_as_accurate(wrong, reference, reference, terms=1)
    assert_as_accurate(reference, reference, reference, terms=1)


def test_error_message_names_the_first_bad_position():
    reference = torch.ones(3, 4, dtype=torch.float64)
    result = reference.float()
    result[1, 2] += 1e-3
    with pytest.raises(AssertionError, match=r"dq: max error 1\.0.*1 of 12 elements, first at \(1, 2\)"):
        assert_as_accurate(result, reference, reference.float(), "dq", terms=1)
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(result[:2], reference, reference.float(), terms=1)


def test_atol_is_a_rounding_of_the_tested_dtype():
    x = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        assert 0.05 * eps < rounding_atol(x, dtype) < 2 * eps


def test_poison_reaches_fastldm_and_nobody_else(monkeypatch):
    with poisoned_memory():
        assert not torch.empty_like(torch.zeros(1000)).isnan().all()
        monkeypatch.setitem(globals(), "__name__", "fastldm.somewhere")
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).min).all()
        assert torch.empty(3, dtype=torch.bool).shape == (3,)
    assert torch.empty is not None
    assert fastldm.ops is ops
