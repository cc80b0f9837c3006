"""The compiled attention: what is special to its tiles, blocks, lanes, instruction sets and threads.

The contract itself is checked for every backend in tests/ops/test_attention.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm import dispatch, ops
from fastldm.errors import UnsupportedError
from fastldm.implementation import readable_mask
from fastldm.ops.attention import HEAD_DIMS
from fastldm.testing import assert_as_accurate, live_backends, plain_attention, poisoned_memory
from fastldm.testing.inputs import ATTENTION_LAYOUTS, MASKS, attention_inputs, attention_mask
from fastldm.testing.shapes import AttentionShape

pytestmark = pytest.mark.skipif(
    "cpu" not in live_backends("attention"), reason="the C++ kernels are not built: `fastldm build`"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(function, inputs, **arguments):
    """Output and gradients of q, k, v."""
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **arguments)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def ours(inputs, **arguments):
    with poisoned_memory():
        return run(ops.attention, inputs, backend="cpu", **arguments)


def check(inputs, mask=None, **arguments):
    """Output and gradients by the error rule, against float64 autograd."""
    q, k = inputs[:2]
    results = ours(inputs, attn_mask=mask, **arguments)
    plain_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    plain = run(plain_attention, inputs, attn_mask=plain_mask, **arguments)
    truth = run(plain_attention, [x.double() for x in inputs], attn_mask=mask, **arguments)
    terms = max(q.shape[2], k.shape[2]) + q.shape[3]
    cancelling = dict(zip(("dq", "dk"), cancellation(inputs, mask, **arguments)))
    for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        # With 16 bits the bound is wide, and only needed where one key is all there is.
        bounded = name in cancelling and (q.dtype == torch.float32 or exact.abs().max() <= 1e-9)
        if not bounded or ((result - exact).abs() > cancelling[name]).any():
            assert_as_accurate(result, exact, rough, name, terms=terms)


def cancellation(inputs, mask, is_causal=False, scale=None):
    """What rounding may leave of dq and dk where their terms cancel, as where one key has most of the weight.

    Both are sums of P (dP - delta), the difference of two dot products of length D: by chance the error of
    plain PyTorch, to which the error rule compares, can be far below that of either.
    """
    q, k, v, grad = (x.double() for x in inputs)
    unit = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    weights = plain_attention(q, k, unit, attn_mask=mask, is_causal=is_causal, scale=scale)
    lengths = v.norm(dim=-1)[:, :, None] + (weights @ v).norm(dim=-1, keepdim=True)
    scale = q.shape[3] ** -0.5 if scale is None else abs(scale)
    terms = scale * weights * grad.norm(dim=-1, keepdim=True) * lengths
    bound = q.shape[3] ** 0.5 * torch.finfo(inputs[0].dtype).eps
    return bound * (terms @ k.abs()), bound * (terms.transpose(-1, -2) @ q.abs())


@st.composite
def calls(draw):
    """Any shape, dtype, layout, mask and scale."""
    length = st.integers(1, 40) | st.sampled_from([47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 200, 257])
    shape = AttentionShape(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(length),
        draw(length),
        draw(st.sampled_from([8, 16, 24, 32, 40, 56, 64, 72, 80, 96]) | st.sampled_from(HEAD_DIMS)),
    )
    inputs = attention_inputs(
        shape,
        draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(ATTENTION_LAYOUTS)),
        seed=draw(st.integers(0, 2**31)),
    )
    mask = attention_mask(shape, draw(st.sampled_from(MASKS)), seed=draw(st.integers(0, 2**31)))
    if mask is not None and mask.is_floating_point() and draw(st.booleans()):
        mask = mask.to(inputs[0].dtype)
    scale = draw(st.none() | st.floats(-1.0, 1.0))
    return inputs, mask, draw(st.booleans()), scale


@settings(max_examples=100, deadline=None)
@given(calls())
def test_any_call(call):
    inputs, mask, is_causal, scale = call
    check(inputs, mask, is_causal=is_causal, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_queries_and_keys_around_a_tile(dtype):
    for queries in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 80, 96, 97, 128, 129, 144):
        check(attention_inputs(AttentionShape(1, 1, queries, 19, 24), dtype))
    for keys in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 77, 127, 128, 129, 130, 255, 256, 257, 513, 700):
        check(attention_inputs(AttentionShape(1, 1, 21, keys, 24), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim, dtype):
    check(attention_inputs(AttentionShape(1, 2, 20, 35, head_dim), dtype))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_gradient_through_a_softmax_of_one_key(head_dim):
    """dP and dout . out are the same sum, in the same order: they cancel to nothing."""
    q, k, v, grad = attention_inputs(AttentionShape(1, 2, 50, 1, head_dim), torch.float32)
    _, dq, dk, _ = ours((q, k, v, grad))
    assert (dq == 0.0).all()
    assert (dk == 0.0).all()
    mask = torch.tensor([False, True, False])
    _, dq, dk, _ = ours((q, *(x.repeat(1, 1, 3, 1) for x in (k, v)), grad), attn_mask=mask[None, None, None])
    assert (dq == 0.0).all()
    assert (dk == 0.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_keys_and_queries_than_are_packed_together(dtype):
    check(attention_inputs(AttentionShape(1, 1, 700, 1100, 8), dtype), is_causal=True)
    check(attention_inputs(AttentionShape(1, 1, 600, 300, 512), dtype))


@pytest.mark.parametrize("kind", MASKS)
def test_masks_over_several_blocks(kind):
    shape = AttentionShape(2, 2, 150, 300, 16)
    for is_causal in (False, True):
        check(attention_inputs(shape, torch.float32), attention_mask(shape, kind), is_causal=is_causal)


def test_masks_of_any_strides():
    shape = AttentionShape(2, 2, 30, 40, 16)
    inputs = attention_inputs(shape, torch.float32)
    full = torch.randn(2, 2, 30, 40)
    for mask in (
        full.transpose(2, 3).contiguous().transpose(2, 3),
        full[:, :, :, ::2].repeat_interleave(2, dim=3),
        torch.randn(2, 2, 30, 80)[..., ::2],
        full[:1, :, :1].expand(2, 2, 30, 40),
        full[:, :1, :, :1],
        full[0, 0, 0, 0].expand(2, 2, 30, 40),
        full.double(),
        full.double()[:1, :, :1].expand(2, 2, 30, 40),
        full > 0.0,
        (full > 0.0)[:, :, :1, :1],
    ):
        check(inputs, mask)


def test_an_expanded_mask_of_another_dtype_is_not_written_out():
    """It is read in float32, and its 2^45 numbers would not fit."""
    mask = torch.randn(1, 1, 1, 40, dtype=torch.float64).expand(1 << 10, 1 << 10, 1 << 20, 40)
    read = readable_mask(mask, torch.float16)
    assert (read.shape, read.dtype) == ((1, 1, 1, 40), torch.float32)
    assert torch.equal(read.double(), mask[:1, :1, :1].float().double())
    for dtype in (torch.bool, torch.float32, torch.float16):
        kept = torch.zeros(1, 1, 1, 40, dtype=dtype)
        assert readable_mask(kept, torch.float16) is kept


def test_closed_keys_may_hold_the_largest_numbers():
    """Even where their products overflow to infinity and infinity minus infinity."""
    for dtype in DTYPES:
        q, k, v, grad = attention_inputs(AttentionShape(1, 2, 20, 150, 16), dtype)
        closed = torch.arange(150) % 3 == 0
        bias = torch.zeros(1, 1, 20, 150).masked_fill(closed, -torch.inf)
        clean = ours((q, k, v, grad), attn_mask=bias)
        largest = torch.finfo(dtype).max
        k[:, :, closed], v[:, :, closed] = largest, largest
        k[:, :, closed, ::2] = -largest
        for mask in (bias, ~closed.expand(1, 1, 20, 150), ~closed[None, None, None]):
            for a, b in zip(clean, ours((q, k, v, grad), attn_mask=mask)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16.0, 256.0, 3000.0, 30000.0])
def test_large_scores(size, dtype):
    """Around `size`: the maximum leaves before anything is rounded; where the log-sum-exp is too coarse to
    stand for it, the backward finds it anew.
    """
    inputs = attention_inputs(AttentionShape(1, 2, 40, 200, 32), dtype)
    check(inputs, torch.full((1, 1, 1, 200), size))
    check(inputs, torch.full((1, 1, 1, 200), -size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_that_grows_from_block_to_block(dtype):
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 60, 900, 16), dtype)
    q[..., 0], k[..., 0] = 1.0, torch.linspace(-30.0, 60.0, 900).to(dtype)
    check((q, k, v, grad))


def test_gradients_of_expanded_tensors():
    """`out.sum().backward()` hands a gradient without strides, and k and v may be shared by the heads."""
    q, k, v, _ = attention_inputs(AttentionShape(2, 3, 20, 30, 16), torch.float32)
    grad = torch.ones(()).expand_as(q)
    check((q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), grad))


def test_last_dimension_that_is_not_dense():
    inputs = attention_inputs(AttentionShape(1, 2, 20, 24, 16), torch.float32)
    q, k, v, grad = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs)
    assert q.stride(3) != 1
    results = ours((q, k, v, grad))
    truth = ours([x.contiguous() for x in (q, k, v, grad)])
    for result, exact, like in zip(results, truth, (q, q, k, v)):
        assert result.stride() == torch.empty_like(like).stride()
        assert torch.equal(result, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 300, 200, 40), (1, 1, 500, 300, 64), (1, 1, 130, 700, 16)])
def test_bits_do_not_depend_on_the_run_or_the_threads(shape, dtype):
    inputs = attention_inputs(AttentionShape(*shape), dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(ours(inputs, is_causal=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_rows_do_not_depend_on_each_other():
    """A query gives the same bits in any batch, head and tile."""
    q, k, v, _ = attention_inputs(AttentionShape(2, 3, 150, 140, 40), torch.bfloat16)
    whole = ops.attention(q, k, v, backend="cpu")
    for i in (0, 17, 48, 149):
        one = ops.attention(q[1:, 2:, i : i + 1], k[1:, 2:], v[1:, 2:], backend="cpu")
        assert torch.equal(one, whole[1:, 2:, i : i + 1])


def test_several_python_threads():
    inputs = [attention_inputs(AttentionShape(2, 2, 100, 90, 40), DTYPES[i % 3], seed=i) for i in range(12)]
    expected = [ours(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(lambda x: run(ops.attention, x, backend="cpu"), inputs), expected):
            for a, b in zip(got, wanted):
                assert torch.equal(a, b)


def test_inference_mode():
    q, k, v, _ = attention_inputs(AttentionShape(1, 2, 20, 30, 16), torch.float32)
    expected = ops.attention(q, k, v, backend="cpu")
    with torch.inference_mode():
        assert torch.equal(ops.attention(q.clone(), k.clone(), v.clone(), backend="cpu"), expected)


def test_other_kernels_of_the_process_go_on():
    """PyTorch's own matrix products after ours, which use the same tile registers and rounding state."""
    a = torch.randn(64, 64).bfloat16()
    expected = a @ a
    q, k, v, _ = attention_inputs(AttentionShape(1, 2, 20, 30, 16), torch.bfloat16)
    ops.attention(q, k, v, backend="cpu")
    assert torch.equal(a @ a, expected)
    tiny = torch.full((8,), 1e-39)
    assert (tiny * 0.5).ne(0.0).all()


def test_refusals():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(UnsupportedError, match="float64"):
        ops.attention(q.double(), q.double(), q.double(), backend="cpu")
    meta = q.to("meta")
    arguments = (meta, meta, meta, None, False, None, False)
    with pytest.raises(UnsupportedError, match="runs on the CPU, not on meta"):
        dispatch.run("attention", "forward", "cpu", arguments, dispatch.current_state())
