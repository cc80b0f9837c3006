"""Attention of the `cuda` backend: as it is called on a GPU, what it refuses, and on a GPU itself."""

from __future__ import annotations

import types

import pytest
import torch
from fastldm.kernels.common.target import KNOWN, Target

from fastldm import ops
from fastldm.implementation import readable_mask
from fastldm.native.cuda import attention as cuda_attention
from fastldm.native.cuda import support
from fastldm.testing import assert_as_accurate, plain_attention, poisoned_memory
from fastldm.testing.inputs import ATTENTION_LAYOUTS, attention_inputs
from fastldm.testing.shapes import ATTENTION_LAYERS, AttentionShape
from tests.cuda.attention import BACKWARD, DTYPES, FORWARD, HALVES, described, gradients, integers, key_mask


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


@pytest.mark.parametrize("repeated", ["nothing", "queries", "heads"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_of_other_dtypes_as_a_backend(backend, dtype, repeated):
    """Are read in float32, and never written out where they are expanded."""
    inputs = q, k, v, grad = attention_inputs(AttentionShape(1, 2, 20, 50, 40), torch.float16)
    size = {"nothing": (1, 1, 20, 50), "queries": (1, 2, 1, 50), "heads": (1, 1, 20, 50)}[repeated]
    mask = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
    if repeated != "nothing":
        mask = mask.expand(1, 2, 20, 50)
    read = readable_mask(mask, q.dtype)
    assert (read.shape, read.dtype) == (size, torch.float32)
    out, lse = backend.forward(q, k, v, mask, False, None, True)
    results = out, *backend.backward(grad, q, k, v, out, lse, mask, False, None)
    truth = gradients(plain_attention, [x.double() for x in inputs], attn_mask=mask)
    rough = gradients(plain_attention, inputs, attn_mask=mask)
    for name, result, exact, plain in zip(("out", "dq", "dk", "dv"), results, truth, rough):
        assert_as_accurate(result, exact, plain, name, terms=90)


def test_wide_heads_as_a_backend(backend):
    inputs = q, k, v, grad = attention_inputs(AttentionShape(1, 1, 20, 1100, 512), torch.float16)
    with poisoned_memory():
        out, lse = backend.forward(q, k, v, None, False, 0.05, True)
        results = out, *backend.backward(grad, q, k, v, out, lse, None, False, 0.05)
    truth = gradients(plain_attention, [x.double() for x in inputs], scale=0.05)
    rough = gradients(plain_attention, inputs, scale=0.05)
    for name, result, exact, plain in zip(("out", "dq", "dk", "dv"), results, truth, rough):
        assert_as_accurate(result, exact, plain, name, terms=1612)


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
    for mask_dtype in (torch.bool, torch.float16, torch.float64):
        assert reasons(mask=torch.ones(1, 1, 4, 4, dtype=mask_dtype)) == (None, None)
    both("takes float16 and bfloat16; float32", dtype=torch.float32)
    both("not torch.float64", dtype=torch.float64)
    both("capability 8.0, not 7.5", capability=75)
    assert reasons(head_dim=512) == reasons(head_dim=512, capability=80) == (None, None)
    both("up to 2^30 queries and keys, not 1073741825", queries=2**30 + 1)
    both("less than 2^31 tiles of 64 queries or keys of all heads, not 2147483648", heads=2**31)
    small = "on a GPU whose blocks have 99 KiB of shared memory, not"
    for capability in (86, 89, 120):
        assert reasons(head_dim=512, capability=capability) == (
            f"takes head dims up to 256 {small} 512",
            f"takes head dims up to 160 {small} 512",
        )
        assert reasons(head_dim=256, capability=capability) == (
            None,
            f"takes head dims up to 160 {small} 256",
        )


def test_what_measurements_are_kept_under():
    q, k, v, grad = attention_inputs(AttentionShape(1, 1, 5, 77, 40), torch.bfloat16)
    found = cuda_attention.key("forward", (q, k, v, None, False, None, True))
    assert found == {"head_dim": 40, "dtype": "bfloat16", "few_keys": True, "mask": "none", "causal": False}
    args = grad, q, k, v, q, None, key_mask(AttentionShape(1, 1, 5, 77, 40), "odd"), True, None
    assert cuda_attention.key("backward", args) == found | {"mask": "keys", "causal": True}
    for mask in (torch.zeros(1, 1, 1, 77), torch.ones(1, 1, 5, 77, dtype=torch.bool)):
        args = q, k, v, mask, False, None, True
        assert cuda_attention.key("forward", args) == found | {"mask": "scores"}


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
            return gradients(ops.attention, inputs, backend="cuda")

    results = compute()
    assert all(torch.equal(a, b) for a, b in zip(results, compute()))
    for name, result, exact, plain in zip(("out", "dq", "dk", "dv"), results, truth, rough):
        assert_as_accurate(result, exact, plain, name, terms=terms)
