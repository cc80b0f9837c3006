"""The CUDA kernels of attention under the shim, on the plans of several GPUs, against float64."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from fastldm.kernels.common.target import KNOWN, Target

from fastldm import ops, reference
from fastldm.native.cuda import attention as cuda_attention
from fastldm.native.cuda import support
from fastldm.testing import assert_as_accurate, plain_attention, poisoned_memory
from fastldm.testing.inputs import ATTENTION_LAYOUTS, attention_inputs
from fastldm.testing.shapes import ATTENTION_LAYERS, AttentionShape
from tests.cuda.shim import ShimError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of fastldm::DType
HALVES = DTYPES[1:]
FORWARD, BACKWARD = "attention_forward", "attention_backward"


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def described(q, k, mask, is_causal, *tensors):
    """Sizes and strides as tests/cuda/drivers/attention.h reads them."""
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask_strides = tuple(0 if mask.shape[i] == 1 else mask.stride(i) for i in (0, 1, 3))
    strides = itertools.chain(mask_strides, *(x.stride()[:3] for x in tensors))
    return integers(*q.shape[:3], k.shape[2], q.shape[3], is_causal), integers(*strides)


def unwritten_like(x):
    """NaN in the layout of `x`."""
    return torch.empty_like(x).fill_(torch.nan)


def forward(shim, q, k, v, mask=None, *, is_causal=False, scale=None, capability=80, need_lse=True, seed=0):
    """out and lse of the kernel that a GPU of this capability would run."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    out = unwritten_like(q)
    lse = torch.full(q.shape[:3], torch.nan) if need_lse else None
    sizes, strides = described(q, k, mask, is_causal, q, k, v, out)
    floats = integers(0)
    shim("forward_workspace", sizes, capability, floats)
    workspace = torch.full((int(floats),), torch.nan)
    shim(
        "forward", sizes, scale, mask, strides, q, k, v, out, lse, workspace, DTYPES.index(q.dtype),
        capability, seed=seed,
    )  # fmt: skip
    return out, lse


def key_mask(shape, kind):
    """Bool, 4-D: "padding" with a batch that has no open key, "odd" of each head its own, of odd strides."""
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.arange(shape.batch) * shape.keys // max(1, shape.batch - 1)
        return (torch.arange(shape.keys) < lengths[:, None])[:, None, None, :]
    wide = torch.rand(shape.batch, shape.heads, 1, 3 * shape.keys, generator=torch.Generator().manual_seed(1))
    return (wide > 0.3)[..., ::3]


def check_forward(shim, shape, dtype, *, mask=None, layout="contiguous", inputs=None, **options):
    q, k, v, _ = inputs or attention_inputs(shape, dtype, layout=layout)
    out, lse = forward(shim, q, k, v, mask, **options)
    arguments = {name: options[name] for name in ("is_causal", "scale") if name in options}
    exact = plain_attention(q.double(), k.double(), v.double(), mask, **arguments)
    rough = plain_attention(q, k, v, mask, **arguments)
    assert_as_accurate(out, exact, rough, "out", terms=shape.keys + shape.head_dim)
    _, sums = reference.attention(q.double(), k.double(), v.double(), mask, **arguments)
    torch.testing.assert_close(lse.double(), sums, rtol=3e-6, atol=3e-6)
    return out, lse


# Each tile: head dims at and below it, few and many keys, both lengths that fill no tile.
TILES = [
    (8, 70), (32, 130), (40, 130), (40, 77), (40, 100), (48, 81), (56, 140), (64, 200), (64, 128), (64, 5),
    (72, 150), (72, 77), (80, 129), (80, 80), (80, 90), (96, 70), (128, 100), (136, 140), (160, 130),
    (160, 77), (160, 81), (256, 70),
]  # fmt: skip


@pytest.mark.parametrize(("head_dim", "keys"), TILES)
def test_tiles(shim, head_dim, keys):
    for dtype, queries in zip(HALVES, (33, 140)):
        check_forward(shim(FORWARD), AttentionShape(1, 2, queries, keys, head_dim), dtype)


def backward(shim, grad, q, k, v, out, lse, mask=None, *, is_causal=False, scale=None, capability=80, seed=0):
    """dq, dk and dv."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    results = tuple(map(unwritten_like, (q, k, v)))
    sizes, strides = described(q, k, mask, is_causal, grad, q, k, v, out, *results)
    floats = integers(0)
    shim("backward_workspace", sizes, capability, floats)
    workspace = torch.full((int(floats),), torch.nan)
    shim(
        "backward", sizes, scale, mask, strides, grad, q, k, v, out, lse, *results, workspace,
        DTYPES.index(q.dtype), capability, seed=seed,
    )  # fmt: skip
    return results


def gradients(function, inputs, **arguments):
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **arguments)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def check_backward(shim, shape, dtype, *, mask=None, layout="contiguous", inputs=None, **options):
    """From the output and the log-sum-exp that float32 gives."""
    inputs = q, k, v, grad = inputs or attention_inputs(shape, dtype, layout=layout)
    arguments = {name: options[name] for name in ("is_causal", "scale") if name in options}
    out, lse = reference.attention(q, k, v, mask, **arguments)
    laid_out = torch.empty_like(q).copy_(out)
    results = backward(shim, grad, q, k, v, laid_out, lse.contiguous(), mask, **options)
    truth = gradients(plain_attention, [x.double() for x in inputs], attn_mask=mask, **arguments)
    rough = gradients(plain_attention, inputs, attn_mask=mask, **arguments)
    terms = max(shape.queries, shape.keys) + shape.head_dim
    for name, result, exact, plain in zip(("dq", "dk", "dv"), results, truth[1:], rough[1:]):
        assert_as_accurate(result, exact, plain, name, terms=terms)
    return results


@pytest.mark.parametrize(("head_dim", "keys"), TILES)
def test_backward_tiles(shim, head_dim, keys):
    for dtype, queries in zip(HALVES, (33, 140)):
        check_backward(shim(BACKWARD), AttentionShape(1, 2, queries, keys, head_dim), dtype)


# A shape for each kernel, over several of its tiles: of the forward; of the backward, the last with chunks.
SHAPES = {
    "long": AttentionShape(2, 2, 140, 150, 40),
    "short": AttentionShape(2, 2, 140, 77, 40),
    "short-128": AttentionShape(2, 2, 70, 110, 64),
    "widest": AttentionShape(2, 1, 70, 70, 256),
    "wide": AttentionShape(2, 1, 70, 150, 512),
}
SHAPES_BACKWARD = {
    "32 keys a warp": AttentionShape(2, 2, 140, 150, 40),
    "16 queries at once": AttentionShape(2, 1, 70, 140, 64),
    "held": AttentionShape(2, 1, 140, 140, 72),
    "two parts": AttentionShape(2, 1, 70, 70, 256),
    "chunks": AttentionShape(2, 1, 600, 77, 40),
    "chunks of two parts": AttentionShape(1, 1, 260, 20, 256),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "odd"])
@pytest.mark.parametrize("name", SHAPES)
def test_masks(shim, name, kind, is_causal):
    shape = SHAPES[name]
    mask = key_mask(shape, kind)
    for capability in (80, 90):
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


@pytest.mark.parametrize("masked", [False, True])
def test_split_keys_of_a_wide_head(shim, masked):
    """Two parts; masked, the first has no open key, and causal, the second none that is seen."""
    shape = AttentionShape(1, 1, 33, 1100, 512)
    mask = (torch.arange(1100) >= 600)[None, None, None] if masked else None
    check_forward(shim(FORWARD), shape, torch.float16, mask=mask, capability=90)
    check_forward(shim(FORWARD), shape, torch.bfloat16, is_causal=not masked, capability=80)
    dead = torch.zeros(1, 1, 1, 1100, dtype=torch.bool)
    out, lse = check_forward(shim(FORWARD), shape, torch.float16, mask=dead, capability=90)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


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
        if head_dim <= (256 if roomy else 160):
            check_backward(shim(BACKWARD), shape, torch.float16, capability=capability)


def test_plans_that_do_not_fit_are_refused(shim):
    """They take what the backend says that they do before it asks for them."""
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 5, 9, 512), torch.float16)
    with pytest.raises(ShimError, match=f"of {cuda_attention._FORWARD_512} bytes of shared memory; the dev"):
        forward(shim(FORWARD), q, k, v, capability=89)
    narrow = [x[..., :256].contiguous() for x in (grad, q, k, v, q)]
    with pytest.raises(ShimError, match=f"of {cuda_attention._BACKWARD_256} bytes of shared memory; the dev"):
        backward(shim(BACKWARD), *narrow, torch.zeros(1, 1, 5), capability=89)
    with pytest.raises(ShimError, match="no kernel is made for head dim 512"):
        backward(shim(BACKWARD), grad, q, k, v, q, torch.zeros(1, 1, 5))
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
    if layout in ATTENTION_LAYOUTS:
        inputs = attention_inputs(shape, torch.float16, layout=layout)
    else:
        q, k, v, grad = attention_inputs(shape, torch.float16)
        if layout == "expanded":
            inputs = q, k[:, :1].expand_as(k), v[:1].expand_as(v), grad[:, :, :1].expand_as(grad)
        else:
            inputs = [torch.cat([x[..., :8], x, x[..., :16]], -1)[..., 8:-16] for x in (q, k, v, grad)]
    check_forward(shim(FORWARD), shape, torch.float16, inputs=inputs)
    if shape.head_dim <= 256:
        check_backward(shim(BACKWARD), shape, torch.float16, inputs=inputs)


@pytest.mark.parametrize("name", SHAPES)
def test_scales(shim, name):
    shape = SHAPES[name]._replace(batch=1, heads=1)
    q, k, v, grad = attention_inputs(shape, torch.float16)
    mask = key_mask(shape, "odd")
    for scale in (-0.3, 0.0, 2.0):
        check_forward(shim(FORWARD), shape, torch.float16, mask=mask, scale=scale)
        if shape.head_dim <= 256:
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


@pytest.mark.parametrize("head_dim", [40, 48, 80])
@pytest.mark.parametrize("size", [300.0, 6e4])
def test_huge_scores(shim, size, head_dim):
    """Rows whose log-sum-exp has no bits left for exp(score - lse), beside ordinary ones."""
    shape = AttentionShape(1, 1, 70, 70, head_dim)
    inputs = q, k, v, grad = attention_inputs(shape, torch.float16)
    q[:, :, 5], q[:, :, 60] = size, size
    k[:, :, 30:40], k[:, :, :3] = size, size
    for options in ({}, {"is_causal": True}, {"mask": key_mask(shape, "odd")}, {"scale": -1.0}):
        arguments = {"attn_mask" if name == "mask" else name: value for name, value in options.items()}
        truth = gradients(plain_attention, [x.double() for x in inputs], **arguments)
        plain = gradients(plain_attention, [x.float() for x in inputs], **arguments)
        out, lse = forward(shim(FORWARD), q, k, v, **options)
        dq, dk, dv = backward(shim(BACKWARD), grad, q, k, v, out, lse, **options)
        assert_as_accurate(out, truth[0], plain[0].half(), "out", terms=140)
        assert_as_accurate(dv, truth[3], plain[3].half(), "dv", terms=140)
        # Sums of 70 terms as large as |dS| size, where dS is rounded to float16.
        bound = size * 70 * torch.finfo(torch.float16).eps * (grad.double() @ v.double().mT).abs().max()
        for result, exact in ((dq, truth[1]), (dk, truth[2])):
            finite = result.isfinite()
            assert finite.all() or size > 1e4
            assert (result.double() - exact)[finite].abs().max() <= bound * abs(options.get("scale", 1.0))


@pytest.mark.parametrize("name", SHAPES)
def test_closed_keys_may_hold_the_largest_numbers(shim, name):
    shape = SHAPES[name]
    q, k, v, grad = attention_inputs(shape, torch.bfloat16)
    closed = torch.arange(shape.keys) % 3 == 0
    mask = ~closed[None, None, None]
    clean = forward(shim(FORWARD), q, k, v, mask)
    results = backward(shim(BACKWARD), grad, q, k, v, *clean, mask) if shape.head_dim <= 256 else ()
    largest = torch.finfo(torch.bfloat16).max
    k[:, :, closed], v[:, :, closed] = largest, largest
    k[:, :, closed, ::2], v[:, :, closed, ::2] = -largest, -largest
    dirty = forward(shim(FORWARD), q, k, v, mask)
    again = backward(shim(BACKWARD), grad, q, k, v, *dirty, mask) if shape.head_dim <= 256 else ()
    assert all(torch.equal(a, b) for a, b in zip((*clean, *results), (*dirty, *again)))


@pytest.mark.parametrize("name", SHAPES)
def test_nan_stays_in_its_row(shim, name):
    shape = SHAPES[name]
    q, k, v, grad = attention_inputs(shape, torch.float16)
    clean, _ = forward(shim(FORWARD), q, k, v)
    q[0, -1, 5, 3] = torch.nan
    out, lse = forward(shim(FORWARD), q, k, v)
    assert out[0, -1, 5].isnan().all()
    if shape.head_dim <= 256:
        dq, dk, dv = backward(shim(BACKWARD), grad, q, k, v, out, lse)
        assert dq[0, -1, 5].isnan().all()
        assert dk[0, -1].isnan().all()
        assert not dq[0, -1, 6:].isnan().any()
        assert not dk[1].isnan().any()
        assert not dv[1].isnan().any()
    out[0, -1, 5] = clean[0, -1, 5]
    assert torch.equal(out, clean)


# A kernel that is wrong must be seen: file, what the source says, what it says then, which kernel.
BROKEN = {
    "no barrier": ("attention_forward", "      block_sync();\n", "", "long"),
    "no wait for copies": ("attention_forward", "      wait_group<0>();\n", "", "long"),
    "sums not rescaled": ("attention_tile", "total[row] * shrink;", "total[row];", "long"),
    "a step dropped": ("attention_forward", "index < steps;", "index < steps - 1;", "long"),
    "keys past the end": ("attention_tile", "bool yes = key < problem.keys &&", "bool yes =", "short"),
    "diagonal off by one": ("attention_tile", "+ column + i % 2 <= row", "+ column + i % 2 < row", "long"),
    "the mask of another head": (
        "attention_tile",
        "place.head * problem.mask.head)",
        "0 * problem.mask.head)",
        "short",
    ),
    "no wait for the next queries": ("attention_short", "wait_group<1>()", "wait_group<2>()", "short"),
    "rows not synchronised": (
        "attention_short",
        "      warp_sync();\n      // A lane",
        "      // A lane",
        "short",
    ),
    "weights before the barrier": (
        "attention_wide",
        "      wait_group<1>();\n      block_sync();\n",
        "      wait_group<1>();\n",
        "wide",
    ),
    "a part of the row unseen": (
        "attention_wide",
        "1; other < parts; ++other) most",
        "2; other < parts; ++other) most",
        "wide",
    ),
    "splits out of step": (
        "attention_wide",
        "fused_multiply_add(weight, part[i]",
        "fused_multiply_add(1.0f, part[i]",
        "split",
    ),
    "no delta": ("attention_backward", "weight * (x - delta[i % 2])", "weight * x", "backward"),
    "dk not scaled": (
        "attention_backward",
        "scale_row(dk, row, params.scale)",
        "scale_row(dk, row, 1.0f)",
        "backward",
    ),
    "queries past the end": ("attention_backward", "inside ? 4 : 0);", "4);", "backward"),
    "first queries dropped": (
        "attention_backward",
        "block_key / step : 0;",
        "block_key / step + 1 : 0;",
        "backward",
    ),
    "chunks not added": (
        "attention_backward",
        "chunk < params.chunks; ++chunk",
        "chunk < 1; ++chunk",
        "backward",
    ),
    "lse trusted where it is huge": (
        "attention_statistics",
        "if (is_large[row]) {",
        "if (false) {",
        "backward",
    ),
}  # fmt: skip


def probe(shim, kernel):
    """Calls that together notice every change."""
    dtype = torch.float16
    if kernel == "backward":
        for shape in (AttentionShape(1, 2, 300, 77, 40), AttentionShape(1, 2, 70, 150, 40)):
            q, k, v, grad = attention_inputs(shape, dtype)
            for is_causal in (False, True):
                check_backward(shim, shape, dtype, is_causal=is_causal)
                check_backward(shim, shape, dtype, inputs=(q, k, v + 1.0, grad + 1.0), is_causal=is_causal)
            q[:, :, 3], k[:] = 6e4, k.abs() + 0.5 * 6e4
            k[:, :, 5:] = k[:, :, 5:6]
            out, lse = reference.attention(q, k, v)
            dv = backward(shim, grad, q, k, v, out.to(dtype), lse.contiguous())[2]
            exact = gradients(plain_attention, [x.double() for x in (q, k, v, grad)])[3]
            rough = gradients(plain_attention, [x.float() for x in (q, k, v, grad)])[3]
            assert_as_accurate(dv, exact, rough.to(dtype), "dv", terms=300)
        return
    shape = {
        "long": AttentionShape(1, 2, 140, 150, 40),
        "short": AttentionShape(1, 6, 300, 77, 40),
        "wide": AttentionShape(1, 2, 70, 150, 512),
        "split": AttentionShape(1, 1, 33, 1100, 512),
    }[kernel]
    q, k, v, grad = attention_inputs(shape, dtype)
    for seed, (mask, is_causal) in enumerate([("none", False), ("none", True), ("odd", False)]):
        inputs = 3.0 * q, 3.0 * k, v, grad
        mask = key_mask(shape, mask)
        capability = 1 if kernel == "short" else 90  # where a warp walks several tiles
        options = {"mask": mask, "is_causal": is_causal, "seed": seed, "capability": capability}
        check_forward(shim, shape, dtype, inputs=inputs, **options)


@pytest.mark.parametrize("kernel", ["long", "short", "wide", "split", "backward"])
def test_the_calls_that_notice_changes_pass(shim, kernel):
    probe(shim("attention_few"), kernel)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_seen(broken_shim, name):
    file, old, new, kernel = BROKEN[name]
    with pytest.raises(AssertionError):
        probe(broken_shim("attention_few", {f"cuda/{file}.cuh": (old, new)}), kernel)


@pytest.fixture
def backend(shim, monkeypatch):
    """The implementation as it is called on a GPU, its kernels under the shim."""
    monkeypatch.setattr(support, "capability_of", lambda device: 80)
    monkeypatch.setattr(cuda_attention, "target_of", lambda device: KNOWN[80])

    def workspace(driver, direction, q, k):
        floats = integers(0)
        shim(driver)(f"{direction}_workspace", described(q, k, None, False)[0], 80, floats)
        return int(floats)

    def attention_forward(q, k, v, mask, is_causal, scale, out, lse, floats):
        sizes, strides = described(q, k, mask, is_causal, q, k, v, out)
        memory = (lse, floats, DTYPES.index(q.dtype), 80)
        shim(FORWARD)("forward", sizes, scale, mask, strides, q, k, v, out, *memory)

    def attention_backward(grad, q, k, v, out, lse, mask, is_causal, scale, dq, dk, dv, floats):
        tensors = grad, q, k, v, out
        sizes, strides = described(q, k, mask, is_causal, *tensors, dq, dk, dv)
        memory = (floats, DTYPES.index(q.dtype), 80)
        shim(BACKWARD)("backward", sizes, scale, mask, strides, *tensors, lse, dq, dk, dv, *memory)

    kernels = types.SimpleNamespace(
        attention_forward=attention_forward,
        attention_backward=attention_backward,
        attention_forward_workspace=lambda q, k: workspace(FORWARD, "forward", q, k),
        attention_backward_workspace=lambda q, k: workspace(BACKWARD, "backward", q, k),
    )
    monkeypatch.setattr(torch.ops, "fastldm_cuda", kernels, raising=False)
    return cuda_attention.implementation()


@pytest.mark.parametrize("layout", [*ATTENTION_LAYOUTS, "transposed", "not aligned", "expanded"])
def test_as_a_backend(backend, layout):
    """Whatever the strides, results lie as `empty_like` lays them out."""
    shape = AttentionShape(2, 2, 40, 50, 40)
    plain_layout = layout if layout in ATTENTION_LAYOUTS else "contiguous"
    q, k, v, grad = inputs = attention_inputs(shape, torch.bfloat16, layout=plain_layout)
    if layout == "transposed":
        inputs = [x.mT.contiguous().mT for x in inputs]
    elif layout == "not aligned":
        inputs = [torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1:-2] for x in inputs]
    elif layout == "expanded":
        inputs = q, k[:, :, :1].expand_as(k), v, grad[:1].expand_as(grad)
    q, k, v, grad = inputs
    mask = key_mask(shape, "padding").expand(2, 2, 40, 50)
    with poisoned_memory():
        out, lse = backend.forward(q, k, v, mask, True, None, True)
        results = out, *backend.backward(grad, q, k, v, out, lse, mask, True, None)
        assert backend.forward(q, k, v, mask, True, None, False)[1].shape == (0,)
    truth = gradients(plain_attention, [x.double() for x in inputs], attn_mask=mask, is_causal=True)
    rough = gradients(plain_attention, inputs, attn_mask=mask, is_causal=True)
    for name, result, like, exact, plain in zip(
        ("out", "dq", "dk", "dv"), results, (q, q, k, v), truth, rough
    ):
        assert result.stride() == torch.empty_like(like).stride()
        assert_as_accurate(result, exact, plain, name, terms=90)


def test_wide_heads_as_a_backend(backend):
    q, k, v, _ = inputs = attention_inputs(AttentionShape(1, 1, 20, 1100, 512), torch.float16)
    out, _ = backend.forward(q, k, v, None, False, 0.05, False)
    exact = plain_attention(*(x.double() for x in inputs[:3]), scale=0.05)
    assert_as_accurate(out, exact, plain_attention(q, k, v, scale=0.05), "out", terms=1612)


def test_what_the_backend_refuses(monkeypatch):
    implementation = cuda_attention.implementation()

    def reasons(dtype=torch.float16, head_dim=64, mask=None, capability=90, heads=1, queries=4):
        target = KNOWN.get(capability, Target(capability, 40, 64 << 10))
        monkeypatch.setattr(support, "capability_of", lambda device: capability)
        monkeypatch.setattr(cuda_attention, "target_of", lambda device: target)
        shape = (1, heads, queries, head_dim)
        q = types.SimpleNamespace(dtype=dtype, shape=shape, device=torch.device("cuda", 0))
        forward_reason = implementation.supports(q, q, q, mask, False, None, True)
        return forward_reason, implementation.supports_backward(q, q, q, q, q, None, mask, False, None)

    def both(part, **case):
        assert all(part in reason for reason in reasons(**case))

    assert reasons() == (None, None)
    assert reasons(mask=torch.ones(1, 1, 1, 4, dtype=torch.bool)) == (None, None)
    assert reasons(mask=torch.ones(1, 1, 1, 4, dtype=torch.bool).expand(1, 1, 4, 4)) == (None, None)
    both("takes float16 and bfloat16; float32", dtype=torch.float32)
    both("not torch.float64", dtype=torch.float64)
    both("capability 8.0, not 7.5", capability=75)
    both("takes bool masks, not torch.float16", mask=torch.zeros(1, 1, 1, 4, dtype=torch.float16))
    both("the same for every query", mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert reasons(head_dim=512) == (None, "has no backward for head dims above 256, such as 512")
    both("up to 2^30 queries and keys, not 1073741825", queries=2**30 + 1)
    both("less than 2^31 tiles of 64 queries or keys of all heads, not 2147483648", heads=2**31)
    small = "on a GPU whose blocks have 99 KiB of shared memory, not"
    for capability in (86, 89, 120):
        assert reasons(head_dim=512, capability=capability)[0] == f"takes head dims up to 256 {small} 512"
        assert reasons(head_dim=256, capability=capability) == (
            None,
            f"takes head dims up to 160 {small} 256",
        )


def test_what_measurements_are_kept_under():
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 5, 77, 40), torch.bfloat16)
    found = cuda_attention.key("forward", (q, k, v, None, False, None, True))
    assert found == {"head_dim": 40, "dtype": "bfloat16", "few_keys": True, "mask": False, "causal": False}
    args = grad, q, k, v, q, None, key_mask(AttentionShape(1, 1, 5, 77, 40), "odd"), True, None
    assert cuda_attention.key("backward", args) == found | {"mask": True, "causal": True}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_layers_on_the_gpu(name, dtype):
    """At their own size; the same bits again."""
    shape = ATTENTION_LAYERS[name]
    if shape.queries * shape.keys > 2**22:  # one head of float64 scores is 128 MB
        shape = shape._replace(batch=1, heads=2 if shape.heads > 1 else 1)
    inputs = [x.cuda() for x in attention_inputs(shape, dtype)]
    terms = max(shape.queries, shape.keys) + shape.head_dim
    truth = gradients(plain_attention, [x.double() for x in inputs])
    rough = gradients(plain_attention, inputs)

    def compute():
        with poisoned_memory():
            if shape.head_dim > 256:
                return (ops.attention(*inputs[:3], backend="cuda"),)
            return gradients(ops.attention, inputs, backend="cuda")

    results = compute()
    assert all(torch.equal(a, b) for a, b in zip(results, compute()))
    for name, result, exact, plain in zip(("out", "dq", "dk", "dv"), results, truth, rough):
        assert_as_accurate(result, exact, plain, name, terms=terms)
