"""The CUDA kernels of attention under the shim, on the plans of several GPUs, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastldm.kernels.common.target import KNOWN

from fastldm import reference
from fastldm.native.cuda import attention as cuda_attention
from fastldm.testing import assert_as_accurate, plain_attention
from fastldm.testing.inputs import ATTENTION_LAYOUTS, attention_inputs
from fastldm.testing.shapes import AttentionShape
from tests.cuda.attention import (
    BACKWARD,
    FORWARD,
    HALVES,
    SHAPES,
    SHAPES_BACKWARD,
    backward,
    check_backward,
    check_forward,
    forward,
    gradients,
    key_mask,
)
from tests.cuda.shim import ShimError

# Each tile: head dims at and below it, few and many keys, both lengths that fill no tile, keys that lack one.
TILES = [
    (8, 70), (32, 127), (40, 191), (40, 77), (40, 100), (48, 81), (56, 140), (64, 191), (64, 128), (64, 5),
    (72, 150), (72, 77), (80, 129), (80, 80), (80, 127), (96, 63), (128, 100), (136, 140), (160, 130),
    (160, 77), (160, 81), (256, 63),
]  # fmt: skip


@pytest.mark.parametrize(("head_dim", "keys"), TILES)
def test_tiles(shim, head_dim, keys):
    for dtype, queries in zip(HALVES, (33, 140)):
        check_forward(shim(FORWARD), AttentionShape(1, 2, queries, keys, head_dim), dtype)


@pytest.mark.parametrize(("head_dim", "keys"), TILES)
def test_backward_tiles(shim, head_dim, keys):
    for dtype, queries in zip(HALVES, (33, 140)):
        check_backward(shim(BACKWARD), AttentionShape(1, 2, queries, keys, head_dim), dtype)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "odd"])
@pytest.mark.parametrize("name", SHAPES)
def test_masks(shim, name, kind, is_causal):
    shape = SHAPES[name]
    mask = key_mask(shape, kind)
    # Of these only wide heads have another kernel on sm_90.
    for capability in (80, 90) if name == "wide" else (80,):
        out, lse = check_forward(
            shim(FORWARD), shape, torch.float16, mask=mask, is_causal=is_causal, capability=capability
        )
        if kind == "padding":
            assert (out[0] == 0).all()
            assert (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "odd"])
@pytest.mark.parametrize("name", SHAPES_BACKWARD)
def test_backward_masks(shim, name, kind, is_causal):
    shape = SHAPES_BACKWARD[name]
    mask = key_mask(shape, kind)
    results = check_backward(shim(BACKWARD), shape, torch.bfloat16, mask=mask, is_causal=is_causal)
    if kind == "padding" and shape.batch > 1:
        assert all((x[0] == 0).all() for x in results)


def test_more_keys_than_queries_and_fewer(shim):
    for queries, keys in ((2, 2), (200, 3), (3, 200), (2, 300), (129, 65)):
        shape = AttentionShape(1, 2, queries, keys, 72)
        check_forward(shim(FORWARD), shape, torch.bfloat16, is_causal=True)
        check_backward(shim(BACKWARD), shape, torch.bfloat16, is_causal=True)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_a_warp_walks_many_tiles(shim, head_dim):
    """And one that has none; on a GPU of one multiprocessor."""
    for keys, queries in ((77, 200), (50, 20)):
        shape = AttentionShape(2, 3, queries, keys, head_dim)
        inputs = attention_inputs(shape, torch.float16, layout="heads-last")
        options = {"mask": key_mask(shape, "odd"), "capability": 1}
        results = [
            check_forward(shim(FORWARD), shape, torch.float16, inputs=inputs, seed=i, **options)
            for i in range(2)
        ]
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("capability", KNOWN)
def test_plans_fit_every_gpu(shim, capability):
    roomy = KNOWN[capability].shared_memory > 99 << 10
    for head_dim, keys in [*TILES, *([(512, 40)] if roomy else [])]:
        shape = AttentionShape(1, 1, 5, keys, head_dim)
        check_forward(shim(FORWARD), shape, torch.float16, capability=capability)
        if roomy or head_dim <= 160:
            check_backward(shim(BACKWARD), shape, torch.float16, capability=capability)


def test_plans_that_do_not_fit_are_refused(shim):
    """They take what the backend says that they do before it asks for them."""
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 5, 9, 512), torch.float16)
    with pytest.raises(ShimError, match=f"of {cuda_attention._FORWARD_512} bytes of shared memory; the dev"):
        forward(shim(FORWARD), q, k, v, capability=89)
    with pytest.raises(ShimError, match=f"of {cuda_attention._BACKWARD_512} bytes of shared memory; the dev"):
        backward(shim(BACKWARD), grad, q, k, v, q, torch.zeros(1, 1, 5), capability=89)
    narrow = [x[..., :256].contiguous() for x in (grad, q, k, v, q)]
    with pytest.raises(ShimError, match=f"of {cuda_attention._BACKWARD_256} bytes of shared memory; the dev"):
        backward(shim(BACKWARD), *narrow, torch.zeros(1, 1, 5), capability=89)
    between = [torch.zeros(1, 1, 5, 264, dtype=torch.float16)] * 5
    with pytest.raises(ShimError, match="no kernel is made for head dim 264"):
        backward(shim(BACKWARD), *between, torch.zeros(1, 1, 5))
    odd = torch.zeros(1, 1, 5, 44, dtype=torch.float16)[..., :40]
    with pytest.raises(ShimError, match="multiples of 16 bytes"):
        forward(shim(FORWARD), odd, odd, odd)
    with pytest.raises(ShimError, match="head dims are multiples of 8"):
        forward(shim(FORWARD), odd[..., :20], odd[..., :20], odd[..., :20])


@pytest.mark.parametrize("name", SHAPES)
def test_the_order_of_threads_shows_nowhere(shim, name):
    q, k, v, _ = attention_inputs(SHAPES[name], torch.bfloat16)
    results = [forward(shim(FORWARD), q, k, v, is_causal=True, seed=seed) for seed in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", SHAPES_BACKWARD)
def test_the_order_of_threads_shows_nowhere_backward(shim, name):
    shape = SHAPES_BACKWARD[name]
    inputs = attention_inputs(shape, torch.bfloat16)
    results = [
        check_backward(shim(BACKWARD), shape, torch.bfloat16, inputs=inputs, seed=seed) for seed in range(3)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", [*ATTENTION_LAYOUTS[1:], "expanded", "gaps"])
def test_layouts(shim, layout, name):
    shape = SHAPES[name]._replace(batch=2, heads=2, queries=40)
    if name == "wide":
        shape = shape._replace(keys=40)
    if layout in ATTENTION_LAYOUTS:
        inputs = attention_inputs(shape, torch.float16, layout=layout)
    else:
        q, k, v, grad = attention_inputs(shape, torch.float16)
        if layout == "expanded":
            inputs = q, k[:, :1].expand_as(k), v[:1].expand_as(v), grad[:, :, :1].expand_as(grad)
        else:
            inputs = [torch.cat([x[..., :8], x, x[..., :16]], -1)[..., 8:-16] for x in (q, k, v, grad)]
    check_forward(shim(FORWARD), shape, torch.float16, inputs=inputs)
    check_backward(shim(BACKWARD), shape, torch.float16, inputs=inputs)


@pytest.mark.parametrize("name", SHAPES)
def test_scales(shim, name):
    shape = SHAPES[name]._replace(batch=1, heads=1)
    q, k, v, grad = attention_inputs(shape, torch.float16)
    mask = key_mask(shape, "odd")
    for scale in (-0.3, 0.0, 2.0):
        check_forward(shim(FORWARD), shape, torch.float16, mask=mask, scale=scale)
        check_backward(shim(BACKWARD), shape, torch.float16, mask=mask, scale=scale)
    check_forward(shim(FORWARD), shape, torch.float16, inputs=(6.0 * q, 6.0 * k, v, grad))


def test_a_scale_that_is_no_number(shim):
    shape = AttentionShape(1, 1, 20, 30, 40)
    q, k, v, grad = attention_inputs(shape, torch.float16)
    for result in forward(shim(FORWARD), q, k, v, scale=torch.nan):
        assert result.isnan().all()
    out, lse = forward(shim(FORWARD), q, k, v)
    for result in backward(shim(BACKWARD), grad, q, k, v, out, lse, scale=torch.nan):
        assert result.isnan().all()


def test_without_log_sum_exp(shim):
    for name in ("long", "short", "wide"):
        q, k, v, _ = attention_inputs(SHAPES[name], torch.float16)
        out, lse = forward(shim(FORWARD), q, k, v, need_lse=False)
        assert lse is None
        assert torch.equal(out, forward(shim(FORWARD), q, k, v)[0])


def rounding_of_dq_and_dk(inputs, truth, attn_mask=None, is_causal=False, scale=None):
    """What rounding out, dS and the results to float16 makes of dq and dk, twice: so much for float32."""
    q, k, v, grad = [x.double() for x in inputs]
    eye = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    weights = reference.attention(q, k, eye, attn_mask, is_causal=is_causal, scale=scale)[0]
    factor = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    change = grad @ v.mT
    slopes = weights * (change - (weights * change).sum(-1, keepdim=True))
    of_delta = (grad * truth[0]).abs().sum(-1, keepdim=True)
    half = torch.finfo(torch.float16)  # below the least normal number the steps are those of that number
    off = factor * (slopes.abs() + weights * of_delta + half.smallest_normal)
    sums = off @ k.abs(), off.mT @ q.abs()
    return [half.eps * (x + exact.abs() + half.smallest_normal) for x, exact in zip(sums, truth[1:])]


@pytest.mark.parametrize(("size", "head_dim"), [*itertools.product((300.0, 6e4), (40, 48, 80)), (6e4, 512)])
def test_huge_scores(shim, size, head_dim):
    """Rows whose log-sum-exp has no bits left for exp(score - lse), beside ordinary ones."""
    shape = AttentionShape(1, 1, 70, 70, head_dim)
    inputs = q, k, v, grad = attention_inputs(shape, torch.float16)
    q[:, :, 5], q[:, :, 60] = size, size
    k[:, :, 30:40], k[:, :, :3] = size, size
    scores = torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(5)) > 0.3
    added = torch.zeros(1, 1, 70, 70).masked_fill(~scores, -torch.inf)
    masks = [key_mask(shape, "odd"), scores, added.half(), added]
    for options in ({}, {"is_causal": True}, {"scale": -1.0}, *({"mask": mask} for mask in masks)):
        arguments = {"attn_mask" if name == "mask" else name: value for name, value in options.items()}
        truth = gradients(plain_attention, [x.double() for x in inputs], **arguments)
        plain = gradients(plain_attention, [x.float() for x in inputs], **arguments)
        out, lse = forward(shim(FORWARD), q, k, v, **options)
        dq, dk, dv = backward(shim(BACKWARD), grad, q, k, v, out, lse, **options)
        assert_as_accurate(out, truth[0], plain[0].half(), "out", terms=140)
        assert_as_accurate(dv, truth[3], plain[3].half(), "dv", terms=140)
        bounds = rounding_of_dq_and_dk(inputs, truth, **arguments)
        for result, exact, bound in zip((dq, dk), truth[1:], bounds):
            assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", SHAPES)
def test_closed_keys_may_hold_the_largest_numbers(shim, name):
    shape = SHAPES[name]
    q, k, v, grad = attention_inputs(shape, torch.bfloat16)
    closed = torch.arange(shape.keys) % 3 == 0
    mask = ~closed[None, None, None]
    clean = forward(shim(FORWARD), q, k, v, mask)
    results = backward(shim(BACKWARD), grad, q, k, v, *clean, mask)
    largest = torch.finfo(torch.bfloat16).max
    k[:, :, closed], v[:, :, closed] = largest, largest
    k[:, :, closed, ::2], v[:, :, closed, ::2] = -largest, -largest
    dirty = forward(shim(FORWARD), q, k, v, mask)
    again = backward(shim(BACKWARD), grad, q, k, v, *dirty, mask)
    assert all(torch.equal(a, b) for a, b in zip((*clean, *results), (*dirty, *again)))


@pytest.mark.parametrize("name", SHAPES)
def test_nan_stays_in_its_row(shim, name):
    shape = SHAPES[name]
    q, k, v, grad = attention_inputs(shape, torch.float16)
    clean, _ = forward(shim(FORWARD), q, k, v)
    q[0, -1, 5, 3] = torch.nan
    out, lse = forward(shim(FORWARD), q, k, v)
    assert out[0, -1, 5].isnan().all()
    dq, dk, dv = backward(shim(BACKWARD), grad, q, k, v, out, lse)
    assert dq[0, -1, 5].isnan().all()
    assert dk[0, -1].isnan().all()
    assert not dq[0, -1, 6:].isnan().any()
    assert not dk[1].isnan().any()
    assert not dv[1].isnan().any()
    out[0, -1, 5] = clean[0, -1, 5]
    assert torch.equal(out, clean)
