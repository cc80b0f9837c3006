from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from fastldm import dispatch, ops, reference
from fastldm.errors import InputError, InputTypeError, UnsupportedError
from fastldm.testing import assert_as_accurate, live_backends, plain_attention
from fastldm.testing.inputs import ATTENTION_LAYOUTS, MASKS, attention_inputs, attention_mask
from fastldm.testing.shapes import ATTENTION, AttentionShape

BACKENDS = live_backends("attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The kernels of our own compute in float32 and refuse float64 (tests/native).
WITH_FLOAT64 = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if dtype != torch.float64 or backend in ("reference", "torch")
]
SMALL = AttentionShape(2, 3, 33, 17, 16)


def run(function, inputs, **arguments):
    """Output and gradients of q, k, v."""
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **arguments)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def check(backend, inputs, mask=None, **arguments):
    """Output and gradients of one backend by the error rule, against float64 autograd."""
    results = run(ops.attention, inputs, attn_mask=mask, backend=backend, **arguments)
    plain_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(inputs[0].dtype)
    plain = run(plain_attention, inputs, attn_mask=plain_mask, **arguments)
    doubles = [x.double() for x in inputs]
    truth = run(plain_attention, doubles, attn_mask=mask, **arguments)
    for name, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        assert result.dtype == inputs[0].dtype
        assert_as_accurate(result, exact, rough, name, terms=terms(inputs))
    return results


def terms(inputs):
    """The longest sum: over keys or queries, of what are sums over the head dim."""
    q, k, _, _ = inputs
    return max(q.shape[2], k.shape[2]) + q.shape[3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_shapes(name, dtype, backend):
    check(backend, attention_inputs(ATTENTION[name], dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key(dtype, backend):
    """The output is v and dq, dk are 0 by cancellation: of two dot products of length D, each rounded."""
    inputs = q, k, v, grad = attention_inputs(AttentionShape(2, 2, 5, 1, 16), dtype)
    out, dq, dk, dv = run(ops.attention, inputs, backend=backend)
    assert torch.equal(out, v.expand_as(out))
    exact, plain = (g.sum(dim=2, keepdim=True) for g in (grad.double(), grad))
    assert_as_accurate(dv, exact, plain, "dv", terms=5)
    lengths = [x.double().norm(dim=-1) for x in (q, k, v, grad)]
    difference = 2 * 16 * torch.finfo(dtype).eps * (lengths[3] * lengths[2]).max()
    assert dq.abs().max() <= difference * lengths[1].max() / 4
    assert dk.abs().max() <= difference * lengths[0].sum(dim=2).max() / 4


@pytest.mark.parametrize(("backend", "dtype"), WITH_FLOAT64)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, dtype, is_causal, backend):
    inputs = attention_inputs(SMALL, dtype)
    mask = attention_mask(SMALL, kind)
    out, dq, _, _ = check(backend, inputs, mask, is_causal=is_causal)
    if kind in ("bool", "bool-broadcast", "float"):
        dead = SMALL.queries // 2
        assert (out[:, :, dead] == 0).all()
        assert (dq[:, :, dead] == 0).all()
    if kind == "padding":
        assert (out[0] == 0).all()
        assert (dq[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
def test_layouts(layout, backend):
    inputs = attention_inputs(ATTENTION["sd15-text-40"], torch.float32, layout=layout)
    results = check(backend, inputs)
    q, k, v, _ = inputs
    for result, like in zip(results, (q, q, k, v)):
        assert result.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_strided_inputs(backend):
    q, k, v, grad = attention_inputs(AttentionShape(2, 2, 9, 7, 16), torch.float32)
    strided = torch.stack([q, q], dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    expanded = k[:, :1].expand(2, 2, 7, 16)
    check(backend, (strided, expanded, v, grad))


@pytest.mark.parametrize(("backend", "dtype"), [pair for pair in WITH_FLOAT64 if pair[1] != torch.bfloat16])
def test_log_sum_exp(dtype, backend, on_device):
    q, k, v, _ = attention_inputs(SMALL, dtype)
    mask = attention_mask(SMALL, "bool")
    _, lse = on_device(torch.ops.fastldm.attention)(q, k, v, mask, False, 0.2, True, backend)
    scores = (q.double() @ k.double().transpose(-2, -1) * 0.2).masked_fill(~mask, -torch.inf)
    truth = torch.logsumexp(scores, dim=-1)
    assert lse.dtype == dtype
    assert (lse[:, :, SMALL.queries // 2] == -torch.inf).all()
    torch.testing.assert_close(lse.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_large_scores(backend):
    q, k, v, grad = attention_inputs(SMALL, torch.float32)
    check(backend, (q, k, v, grad), scale=0.5)
    check(backend, (5.0 * q, 5.0 * k, v, grad))


def huge_lse_inputs(name):
    """Inputs and mask with huge log-sum-exp. q k^T is constant in such rows: its rounding plays no part."""
    if name == "6e4":
        q, k, v, grad = attention_inputs(SMALL, torch.float16)
        return (torch.full_like(q, 6e4), torch.full_like(k, 6e4), v, grad), None
    q, k, v, grad = attention_inputs(SMALL, torch.bfloat16 if name == "bfloat16" else torch.float32)
    if name == "every row":
        return (torch.zeros_like(q), k, v, grad), torch.full((1, 1, 1, SMALL.keys), -1e9)
    q[:, :, 2] = 0.0
    mask = torch.zeros(1, 1, SMALL.queries, SMALL.keys)
    mask[:, :, 2] = -1e9
    mask[:, :, 3] = -torch.inf
    return (q, k, v, grad), mask


@pytest.mark.parametrize("backend", [*BACKENDS, "blocks"])
@pytest.mark.parametrize("name", ["every row", "one row", "bfloat16", "6e4"])
def test_huge_log_sum_exp(name, backend):
    """As a finite mask of -1e9 over a whole row, or |x| ~ 6e4 in float16, make it."""
    inputs, mask = huge_lse_inputs(name)
    if backend == "blocks":
        q, k, v, grad = inputs
        eager = importlib.import_module("fastldm.eager.attention")
        out, lse = eager._forward_blocks(q, k, v, mask, False, None)
        results = (out, *eager._backward_blocks(grad, q, k, v, out, lse, mask, False, None))
    else:
        results = run(ops.attention, inputs, attn_mask=mask, backend=backend)
    truth = run(plain_attention, [x.double() for x in inputs], attn_mask=mask)
    # Plain PyTorch in float32, rounded: float16 cannot hold these scores.
    plain = run(plain_attention, [x.float() for x in inputs], attn_mask=mask)
    for what, result, exact, rough in zip(("out", "dq", "dk", "dv"), results, truth, plain):
        if (name, what) == ("6e4", "dq"):
            # 0 by cancellation: the error of dS = P (dP - rowsum(P dP)), P = 1 / Sk, times k. The blocks
            # form dP in float16.
            _, _, v, grad = (x.double().norm(dim=-1).max() for x in inputs)
            eps = torch.finfo(torch.float16 if backend == "blocks" else torch.float32).eps
            error = 2 * terms(inputs) * eps * v * grad
            assert result.abs().max() <= SMALL.head_dim**-0.5 * 6e4 * error
        else:
            assert_as_accurate(result, exact, rough.to(result.dtype), what, terms=terms(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_batch(backend):
    q, k, v, _ = attention_inputs(SMALL, torch.float32)
    clean = ops.attention(q, k, v, backend=backend)
    q[0, 0, 3, 0] = torch.nan
    out = ops.attention(q, k, v, backend=backend)
    assert out[0, 0, 3].isnan().all()
    out[0, 0, 3] = clean[0, 0, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 3, 8), (2, 0, 5, 3, 8), (2, 2, 0, 3, 8), (2, 2, 5, 0, 8)])
def test_empty(shape, backend):
    q, k, v, grad = attention_inputs(AttentionShape(*shape), torch.float32)
    for result, like in zip(run(ops.attention, (q, k, v, grad), backend=backend), (q, q, k, v)):
        assert torch.equal(result, torch.zeros_like(like))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bit_equal(backend):
    inputs = attention_inputs(ATTENTION["sd15-text-40"], torch.bfloat16)
    first, second = (run(ops.attention, inputs, backend=backend) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_padding_mask_of_two_dimensions(backend):
    q, k, v, _ = attention_inputs(SMALL, torch.float32)
    keep = torch.arange(SMALL.keys) < torch.tensor([[5], [17]])
    short = ops.attention(q, k, v, keep, backend=backend)
    assert torch.equal(short, ops.attention(q, k, v, keep[:, None, None], backend=backend))
    truth = plain_attention(q[:1].double(), k[:1, :, :5].double(), v[:1, :, :5].double())
    torch.testing.assert_close(short[:1].double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("additive", [False, True])
def test_masked_keys_change_nothing(additive, dtype, backend):
    """Any finite number may stand there; NaN may not, but stays in its batch and head."""
    q, k, v, grad = attention_inputs(SMALL, dtype)
    mask = (torch.arange(SMALL.keys) < 11)[None, None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    clean = run(ops.attention, (q, k, v, grad), attn_mask=mask, backend=backend)
    k[:, :, 11:], v[:, :, 11:] = 1e4, -1e4
    other = run(ops.attention, (q, k, v, grad), attn_mask=mask, backend=backend)
    for a, b in zip(clean, other):
        assert torch.equal(a, b)
    assert (other[2][:, :, 11:] == 0).all()
    assert (other[3][:, :, 11:] == 0).all()
    k[0, 1, 12], v[0, 1, 12] = torch.nan, torch.nan
    spoiled = run(ops.attention, (q, k, v, grad), attn_mask=mask, backend=backend)
    for a, b in zip(clean, spoiled):
        b[0, 1] = a[0, 1]
        assert torch.equal(a, b)


def test_reference_formulas_against_autograd():
    shape = AttentionShape(2, 2, 6, 5, 8)
    inputs = attention_inputs(shape, torch.float64)
    mask = attention_mask(shape, "float")
    q, k, v, grad = inputs
    for is_causal in (False, True):
        truth = run(plain_attention, inputs, attn_mask=mask, is_causal=is_causal)
        out, _ = reference.attention(q, k, v, mask, is_causal=is_causal)
        grads = reference.attention_backward(grad, q, k, v, mask, is_causal=is_causal)
        for result, exact in zip((out, *grads), truth):
            torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-13)


def test_blockwise_path_of_the_torch_backend(monkeypatch):
    """The path for devices other than the CPU, which is plain PyTorch and so can be checked here."""
    eager = importlib.import_module("fastldm.eager.attention")
    monkeypatch.setattr(eager, "_BLOCK_ELEMENTS", 500)
    shape = AttentionShape(2, 2, 23, 11, 16)
    for dtype in (torch.float32, torch.float16):
        inputs = attention_inputs(shape, dtype)
        q, k, v, grad = inputs
        for kind, is_causal in itertools.product(("none", "bool", "float", "padding"), (False, True)):
            mask = attention_mask(shape, kind)
            arguments = {"attn_mask": mask, "is_causal": is_causal}
            truth = run(plain_attention, [x.double() for x in inputs], **arguments)
            plain_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            plain = run(plain_attention, inputs, attn_mask=plain_mask, is_causal=is_causal)
            out, lse = eager._forward_blocks(q, k, v, mask, is_causal, None)
            grads = eager._backward_blocks(grad, q, k, v, out, lse, mask, is_causal, None)
            for result, exact, rough in zip((out, *grads), truth, plain):
                assert_as_accurate(result, exact, rough, f"{kind} {is_causal}", terms=terms(inputs))


@pytest.mark.parametrize("size", [2.0**8, 2.0**-12])
def test_blockwise_path_of_float16_far_from_one(size):
    """q . k and dout . v beyond 65504, or near the underflow, where scores and results are not."""
    eager = importlib.import_module("fastldm.eager.attention")
    ordinary = attention_inputs(AttentionShape(2, 2, 23, 11, 64), torch.float16)
    inputs = q, k, v, grad = [x * size for x in ordinary]
    scale = 0.25 / size**2
    out, lse = eager._forward_blocks(q, k, v, None, False, scale)
    grads = eager._backward_blocks(grad, q, k, v, out, lse, None, False, scale)
    truth = run(plain_attention, [x.double() for x in inputs], scale=scale)
    # Outputs and gradients are all proportional to the size: at size 1 plain float16 says what is fair.
    plain = run(plain_attention, ordinary, scale=0.25)
    for what, result, exact, rough in zip(("out", "dq", "dk", "dv"), (out, *grads), truth, plain):
        assert_as_accurate(result / size, exact / size, rough, what, terms=terms(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_mask_without_gradient_elsewhere_than_on_the_cpu(dtype):
    """Rows that -1e9 covers in whole or in part keep their meaning, as does -inf."""
    eager = importlib.import_module("fastldm.eager.attention")
    q, k, v, _ = inputs = attention_inputs(SMALL, dtype)
    mask = torch.randn(1, 1, SMALL.queries, SMALL.keys, generator=torch.Generator().manual_seed(1))
    mask[:, :, 3, 4:] = -torch.inf
    mask[:, :, 4] = -torch.inf
    # The same as float16 can hold it.
    held = mask.clone()
    mask[:, :, 0], held[:, :, 0] = -1e9, 0.0
    mask[:, :, 1, :4], held[:, :, 1, :4] = -1e5, 0.0
    mask[:, :, 1, 4:], held[:, :, 1, 4:] = -1e9, -torch.inf
    mask[:, :, 2, 4:], held[:, :, 2, 4:] = -1e9, -torch.inf
    for is_causal in (False, True):
        out = eager._forward_plain(q, k, v, mask, is_causal, None)
        doubles = [x.double() for x in inputs[:3]]
        truth = plain_attention(*doubles, attn_mask=mask, is_causal=is_causal)
        plain = plain_attention(q, k, v, attn_mask=held, is_causal=is_causal)
        assert_as_accurate(out, truth, plain, f"causal: {is_causal}", terms=terms(inputs))


Q = torch.randn(2, 2, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0], Q, Q), ValueError, r"\(B, H, S, D\)"),
        ((Q.long(), Q.long(), Q.long()), TypeError, "floating point"),
        ((None, Q, Q), TypeError, "q must be a tensor, got NoneType"),
        ((Q, Q.to(torch.float8_e4m3fn), Q), TypeError, "k must be floating point"),
        ((Q, Q, Q.to_sparse()), TypeError, "v must be a dense tensor"),
        ((Q, Q, Q, [True]), TypeError, "attn_mask must be a tensor, got list"),
        ((Q, Q.double(), Q), ValueError, "one dtype"),
        ((Q, Q.to("meta"), Q), ValueError, "one device"),
        ((Q, Q[:1], Q[:1]), ValueError, "repeat the key heads|B, H, D"),
        ((Q, Q, Q[:, :, :2]), ValueError, "k and v must be"),
        ((Q[..., :4], Q[..., :4], Q[..., :4]), ValueError, "head dim"),
        ((torch.randn(1, 1, 2, 264),) * 3, ValueError, "head dim"),
        ((Q, Q, Q, torch.ones(3, 4, dtype=torch.bool)), ValueError, "does not broadcast"),
        ((Q, Q, Q, torch.ones(1, 1, 1, 4, 4)), ValueError, "does not broadcast"),
        ((Q, Q, Q, torch.ones(4, 4, dtype=torch.int64)), TypeError, "attn_mask must be bool"),
        ((Q, Q, Q, torch.zeros(4, 4, requires_grad=True)), ValueError, "requires grad"),
        ((Q, Q, Q, torch.ones(4, 4, device="meta")), ValueError, "device"),
        ((Q[:, :, :2], Q, Q, torch.ones(2, 4, dtype=torch.bool)), ValueError, "could be"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.attention(*arguments)
    assert isinstance(raised.value, InputError)


def test_a_scale_that_is_no_number_is_refused():
    for scale in ("a", True, torch.ones(())):
        with pytest.raises(InputTypeError, match="scale must be a number"):
            ops.attention(Q, Q, Q, scale=scale)
    for is_causal in ("yes", 1, None):
        with pytest.raises(InputTypeError, match="is_causal must be True or False"):
            ops.attention(Q, Q, Q, is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_without_dimensions_broadcasts(backend):
    q, k, v, _ = attention_inputs(SMALL, torch.float32)
    plain = ops.attention(q, k, v, backend=backend)
    assert torch.equal(ops.attention(q, k, v, torch.tensor(True), backend=backend), plain)
    assert not ops.attention(q, k, v, torch.tensor(False), backend=backend).any()


def test_unknown_and_absent_backends(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        ops.attention(Q, Q, Q, backend="tritn")
    monkeypatch.setattr(dispatch, "find", lambda backend, op: f"no {op} of {backend} here")
    with pytest.raises(UnsupportedError, match="no attention of cuda here; use backend='auto'"):
        ops.attention(Q, Q, Q, backend="cuda")
