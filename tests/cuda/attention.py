"""The CUDA kernels of attention under the shim: calls of them, and what their results are held against."""

from __future__ import annotations

import contextlib
import itertools
import math

import torch

from fastldm import reference
from fastldm.testing import assert_as_accurate, plain_attention
from fastldm.testing.inputs import attention_inputs
from fastldm.testing.shapes import AttentionShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of fastldm::DType
HALVES = DTYPES[1:]
FORWARD, BACKWARD = "attention_forward", "attention_backward"


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def described(q, k, mask, is_causal, *tensors):
    """Sizes and strides as tests/cuda/drivers/attention.h reads them."""
    mask_type, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        mask_type = (torch.bool, q.dtype, torch.float32).index(mask.dtype)
        mask_strides = tuple(0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride()))
    strides = itertools.chain(mask_strides, *(x.stride()[:3] for x in tensors))
    sizes = integers(*q.shape[:3], k.shape[2], q.shape[3], is_causal, mask_type)
    return sizes, integers(*strides)


def unwritten_like(x):
    """NaN in the layout of `x`."""
    return torch.empty_like(x).fill_(torch.nan)


@contextlib.contextmanager
def working_memory(shim, plan, sizes, capability):
    """NaN, as many floats as the plan asks for; what lies behind them must not be written."""
    floats = integers(0)
    shim(plan, sizes, capability, floats)
    memory = torch.full((int(floats) + 256,), torch.nan)
    behind = memory[int(floats) :].fill_(7.0)
    yield memory
    assert (behind == 7.0).all(), f"more was written than {plan} asked for"


def forward(shim, q, k, v, mask=None, *, is_causal=False, scale=None, capability=80, need_lse=True, seed=0):
    """out and lse of the kernel that a GPU of this capability would run."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    out = unwritten_like(q)
    lse = torch.full(q.shape[:3], torch.nan) if need_lse else None
    sizes, strides = described(q, k, mask, is_causal, q, k, v, out)
    with working_memory(shim, "forward_workspace", sizes, capability) as workspace:
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


def backward(shim, grad, q, k, v, out, lse, mask=None, *, is_causal=False, scale=None, capability=80, seed=0):
    """dq, dk and dv."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    results = tuple(map(unwritten_like, (q, k, v)))
    sizes, strides = described(q, k, mask, is_causal, grad, q, k, v, out, *results)
    with working_memory(shim, "backward_workspace", sizes, capability) as workspace:
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


# A shape for each kernel, over several of its tiles: of the forward; of the backward, some with chunks.
# Numbers of queries in chunks are no multiples of 4.
SHAPES = {
    "long": AttentionShape(2, 2, 140, 150, 40),
    "short": AttentionShape(2, 2, 140, 77, 40),
    "short-128": AttentionShape(2, 2, 70, 110, 64),
    "widest": AttentionShape(2, 1, 70, 70, 256),
    "wide": AttentionShape(2, 1, 70, 159, 512),
}
SHAPES_BACKWARD = {
    "32 keys a warp": AttentionShape(2, 2, 140, 150, 40),
    "16 queries at once": AttentionShape(2, 1, 70, 140, 64),
    "held": AttentionShape(2, 1, 140, 140, 72),
    "two parts": AttentionShape(2, 1, 70, 70, 256),
    "chunks": AttentionShape(2, 1, 601, 77, 40),
    "chunks of two parts": AttentionShape(1, 1, 259, 20, 256),
    "wide": AttentionShape(2, 1, 70, 75, 512),
}
