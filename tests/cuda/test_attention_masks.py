"""Masks that differ by query and masks that are added, in the CUDA kernels of attention under the shim."""

from __future__ import annotations

import pytest
import torch

from fastldm import reference
from fastldm.testing import assert_as_accurate
from fastldm.testing.inputs import attention_inputs
from fastldm.testing.shapes import AttentionShape
from tests.cuda.attention import (
    BACKWARD,
    FORWARD,
    SHAPES,
    SHAPES_BACKWARD,
    backward,
    check_backward,
    check_forward,
    forward,
)

KINDS = ("bool", "bool of queries", "bool transposed", "added", "floats", "floats of keys", "floats expanded")


def mask_of(shape, kind, dtype):
    """4-D; "bool", "added" and "floats" with a query that sees no key."""
    generator = torch.Generator().manual_seed(2)
    batch, heads, queries, keys, _ = shape

    def made(*size):
        allowed = torch.rand(size, generator=generator) > 0.3
        if size[2] > 1:
            allowed[:, :, queries // 2] = False
        return allowed

    def added(*size):
        return torch.randn(size, generator=generator).masked_fill(~made(*size), -torch.inf)

    if kind == "bool":
        return made(batch, heads, queries, keys)
    if kind == "bool of queries":
        return made(batch, 1, queries, 1)
    if kind == "bool transposed":
        return made(1, heads, keys, queries).mT
    if kind == "added":
        return added(batch, heads, queries, keys).to(dtype)
    if kind == "floats":
        return added(1, 1, queries, 2 * keys)[..., ::2]
    if kind == "floats of keys":
        return added(batch, 1, 1, keys)
    return added(batch, 1, 1, keys).expand(batch, heads, queries, keys)


def cases(shapes):
    """Every kind for the first shape, in turn three of them for the others."""
    for index, name in enumerate(shapes):
        for kind in KINDS if index == 0 else ("bool", "added", "floats"):
            yield name, kind


@pytest.mark.parametrize(("name", "kind"), [*cases(SHAPES)])
def test_masks(shim, name, kind):
    shape = SHAPES[name]
    is_causal = kind in ("floats", "bool of queries", "floats expanded")
    for dtype in (torch.float16, torch.bfloat16) if kind == "added" else (torch.float16,):
        mask = mask_of(shape, kind, dtype)
        out, lse = check_forward(
            shim(FORWARD), shape, dtype, mask=mask, is_causal=is_causal, capability=90, seed=3
        )
        if mask.shape[2:] == (shape.queries, shape.keys) and kind in ("bool", "added", "floats"):
            assert (out[:, :, shape.queries // 2] == 0).all()
            assert (lse[:, :, shape.queries // 2] == -torch.inf).all()


@pytest.mark.parametrize(("name", "kind"), [*cases(SHAPES_BACKWARD)])
def test_backward_masks(shim, name, kind):
    shape = SHAPES_BACKWARD[name]
    is_causal = kind in ("floats", "bool of queries", "floats expanded")
    dtype = torch.bfloat16 if kind == "added" else torch.float16
    mask = mask_of(shape, kind, dtype)
    dq, _, _ = check_backward(
        shim(BACKWARD), shape, dtype, mask=mask, is_causal=is_causal, capability=90, seed=4
    )
    if kind in ("bool", "added", "floats"):
        assert (dq[:, :, shape.queries // 2] == 0).all()


def test_split_keys_of_a_wide_head(shim):
    """In parts whose largest scores differ by what is added."""
    shape = AttentionShape(1, 1, 33, 1100, 512)
    mask = mask_of(shape, "floats", torch.float16)
    mask[..., :700] -= 20.0
    check_forward(shim(FORWARD), shape, torch.float16, mask=mask, scale=-0.03, capability=90)


@pytest.mark.parametrize("name", ["long", "short"])
def test_scales(shim, name):
    """A mask is added in its own unit, whatever the scale."""
    shape = SHAPES[name]._replace(batch=1, queries=40)
    mask = mask_of(shape, "floats", torch.float16)
    for scale in (-0.3, 0.0, 1e-35, 2.0):
        check_forward(shim(FORWARD), shape, torch.float16, mask=mask, scale=scale)
        check_backward(shim(BACKWARD), shape, torch.float16, mask=mask, scale=scale)


@pytest.mark.parametrize("name", ["long", "short", "wide"])
@pytest.mark.parametrize(
    ("lowest", "mask_dtype"), [(-1e9, torch.bfloat16), (torch.finfo(torch.float32).min, torch.float32)]
)
def test_rows_that_a_finite_mask_covers(shim, name, lowest, mask_dtype):
    """Its float32 leaves no bit of the score: as in the reference, every such key weighs the same."""
    shape = SHAPES[name]._replace(batch=1, heads=2, queries=40)
    inputs = q, k, v, grad = attention_inputs(shape, torch.bfloat16)
    mask = torch.zeros(1, 2, 40, shape.keys, dtype=mask_dtype)
    mask[:, 0, :, 7:], mask[:, 1, ::2] = lowest, lowest
    out, lse = forward(shim(FORWARD), q, k, v, mask)
    results = out, *backward(shim(BACKWARD), grad, q, k, v, out, lse, mask)
    floats = [x.float() for x in inputs]
    exact, sums = reference.attention(*floats[:3], mask)
    truth = exact, *reference.attention_backward(floats[3], *floats[:3], mask)
    torch.testing.assert_close(lse, sums, rtol=3e-6, atol=3e-6)
    for part, result, wanted in zip(("out", "dq", "dk", "dv"), results, truth):
        assert_as_accurate(result, wanted, wanted.bfloat16(), part, terms=40 + shape.keys + shape.head_dim)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_stays_in_its_row(shim, value):
    shape = AttentionShape(1, 2, 40, 150, 40)
    q, k, v, grad = attention_inputs(shape, torch.float16)
    mask = mask_of(shape, "added", torch.float16)
    clean = forward(shim(FORWARD), q, k, v, mask)[0]
    mask[0, 1, 5, 9] = value
    out, lse = forward(shim(FORWARD), q, k, v, mask)
    dq, dk, dv = backward(shim(BACKWARD), grad, q, k, v, out, lse, mask)
    assert out[0, 1, 5].isnan().all()
    assert dq[0, 1, 5].isnan().all()
    assert not dq[0, 1, 6:].isnan().any()
    assert not any(x[0, 0].isnan().any() for x in (dq, dk, dv))
    out[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("name", ["long", "short", "wide"])
def test_closed_keys_may_hold_the_largest_numbers(shim, name):
    """Whose products are infinite, and minus infinity is added to them."""
    shape = SHAPES[name]._replace(batch=1, queries=40)
    q, k, v, grad = attention_inputs(shape, torch.bfloat16)
    mask = torch.zeros(1, 1, 1, shape.keys)
    mask[..., ::3] = -torch.inf
    results = []
    for largest in (1.0, torch.finfo(torch.bfloat16).max):
        k[:, :, ::3], v[:, :, ::3] = largest, -largest
        out, lse = forward(shim(FORWARD), q, k, v, mask)
        results.append((out, lse, *backward(shim(BACKWARD), grad, q, k, v, out, lse, mask)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
