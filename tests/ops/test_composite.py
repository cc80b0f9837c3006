"""Small tensors whose gradient is wanted: "auto" on the CPU leaves them to PyTorch's own autograd."""

from __future__ import annotations

import pytest
import torch

import fastldm
from fastldm import ops, processor
from fastldm.testing import assert_as_accurate


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def attention(q, k, v, **arguments):
    return ops.attention(q, k, v, **arguments)


def group_norm(x, weight, bias, **arguments):
    return ops.group_norm(x, 4, weight, bias, activation="silu", **arguments)


QKV = [normal(2, 3, 5, 16), normal(2, 3, 7, 16, seed=1), normal(2, 3, 7, 16, seed=2)]
IMAGE = [normal(2, 8, 5, 3, seed=3), normal(8, seed=4), normal(8, seed=5)]
SMALL = {
    "attention": (attention, QKV),
    "attention-heads-last": (attention, [heads_last(x) for x in QKV]),
    "group_norm": (group_norm, IMAGE),
    "group_norm-channels-last": (group_norm, [channels_last(IMAGE[0]), *IMAGE[1:]]),
}


def differentiated(function, inputs, dtype=torch.float32, **arguments):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with fastldm.record() as record:
        out = function(*inputs, **arguments)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    return [out, *grads], record.calls


@pytest.mark.parametrize("name", SMALL)
def test_results_gradients_layout_and_record(name):
    function, inputs = SMALL[name]
    results, calls = differentiated(function, inputs)
    exact, _ = differentiated(function, inputs, torch.float64, backend="reference")
    plain, _ = differentiated(function, inputs, backend="torch")
    assert results[0].stride() == inputs[0].stride()
    for result, reference, other in zip(results, exact, plain, strict=True):
        assert_as_accurate(result, reference, other, name, terms=240)
    assert [(call.direction, call.backend) for call in calls] == [("forward", "torch"), ("backward", "torch")]
    assert all("PyTorch's own autograd" in call.fallback for call in calls)
    with fastldm.record() as record:
        function(*inputs)
    assert all(call.fallback is None or "autograd" not in call.fallback for call in record.calls)


NOT_HERE = {
    "half precision": (attention, [x.bfloat16() for x in QKV], {}),
    "mask": (attention, QKV, {"attn_mask": torch.ones(5, 7, dtype=torch.bool)}),
    "many scores": (attention, [normal(1, 1, 290, 8) for _ in range(3)], {}),
    "odd strides": (attention, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in QKV], {}),
    "no rows": (attention, [normal(1, 1, 0, 8), normal(1, 1, 3, 8), normal(1, 1, 3, 8)], {}),
    "channel bias": (group_norm, IMAGE, {"channel_bias": normal(2, 8)}),
    "mixed dtypes": (group_norm, [IMAGE[0].bfloat16(), *IMAGE[1:]], {}),
    "many elements": (group_norm, [normal(1, 8, 256, 256), *IMAGE[1:]], {}),
    "not dense": (group_norm, [normal(2, 8, 5, 6)[..., ::2], *IMAGE[1:]], {}),
    "named": (group_norm, IMAGE, {"backend": "torch"}),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_everything_else_goes_to_the_backends(name):
    function, inputs, arguments = NOT_HERE[name]
    inputs = [x.requires_grad_() for x in (x.detach() for x in inputs)]
    with fastldm.record() as record:
        out = function(*inputs, **arguments)
    assert "_function" in type(out.grad_fn).__name__
    assert all("autograd" not in (call.fallback or "") for call in record.calls)


def test_a_policy_is_kept():
    function, inputs = SMALL["group_norm"]
    with fastldm.use_backend("reference"):
        _, calls = differentiated(function, inputs)
    assert [(call.direction, call.backend) for call in calls] == [
        ("forward", "reference"),
        ("backward", "reference"),
    ]


@pytest.mark.parametrize("slow", [False, True])
def test_where_products_of_pytorch_are_slow_less_is_left_to_them(slow, monkeypatch):
    for module in ("fastldm.eager.attention", "fastldm.native.attention"):
        monkeypatch.setattr(f"{module}.mkl_is_slow", lambda: slow)
    inputs = [normal(2, 4, 64, 8).requires_grad_() for _ in range(3)]
    with fastldm.record() as record:
        ops.attention(*inputs)
    assert ("autograd" in (record.calls[0].fallback or "")) is not slow


def test_the_processor_is_told_by_its_vendor(monkeypatch):
    monkeypatch.setattr(processor.torch.backends.mkl, "is_available", lambda: True)
    for vendor, slow in ((": GenuineIntel", False), (": AuthenticAMD", True)):
        monkeypatch.setattr(processor, "_vendor", lambda vendor=vendor: vendor)
        assert processor.mkl_is_slow.__wrapped__() is slow
    monkeypatch.setattr(processor.torch.backends.mkl, "is_available", lambda: False)
    assert not processor.mkl_is_slow.__wrapped__()
