"""The `cuda` backend in the dispatcher: "auto" takes it from measured tables only."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch
from fastldm.kernels.common.target import KNOWN

import fastldm
from fastldm import dispatch, ops
from fastldm.errors import UnsupportedError
from fastldm.implementation import Implementation
from fastldm.native import cuda
from fastldm.native.cuda import attention as cuda_attention
from fastldm.native.cuda import group_norm, support, tables, vq
from tests.cuda.contract import REFUSALS, refused_by_contract

X = torch.randn(1, 4, 8, 8)


def key(direction, args):
    return {"channels": args[0].shape[1]}


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A machine whose GPU is the CPU and whose kernels of group_norm are written; `kernels(entries)` is its
    table."""

    def forward(x, *rest):
        return dispatch.find("torch", "group_norm").forward(x, *rest)

    module = types.SimpleNamespace(implementation=lambda: Implementation(forward=forward), key=key)
    monkeypatch.setattr(cuda, "load_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_module", lambda name: module if name == "group_norm" else None)
    monkeypatch.setattr(tables, "capability_of", lambda device: 90)
    monkeypatch.setattr(tables, "sources_folder", lambda: tmp_path)
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("cuda", "torch", "reference"))
    found = {op: answer(op) for op in dispatch.OPS}
    monkeypatch.setattr(
        dispatch, "find", lambda name, op, real=dispatch.find: found[op] if name == "cuda" else real(name, op)
    )
    dispatch._auto_chain.cache_clear()

    def write(entries):
        path = tmp_path / "cuda" / "tables" / "group_norm-sm_90.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"device": "none", "entries": entries}))
        tables.entries.cache_clear()

    tables.entries.cache_clear()
    yield write
    tables.entries.cache_clear()
    dispatch._auto_chain.cache_clear()


def answer(op):
    try:
        return cuda.implementation(op)
    except UnsupportedError as error:
        return str(error)


def backend_of_a_call():
    with fastldm.record() as calls:
        ops.group_norm(X, 2)
    return calls.calls[0]


def test_auto_never_takes_what_was_not_measured(kernels):
    call = backend_of_a_call()
    assert call.backend == "torch"
    assert call.fallback == "cuda: not measured to be the fastest for such a call on sm_90"
    with fastldm.record() as calls:
        ops.group_norm(X, 2, backend="cuda")
    assert calls.backends() == {"group_norm": ["cuda"]}


@pytest.mark.parametrize(
    ("entry", "chosen"),
    [
        ({"direction": "forward", "key": {"channels": 4}}, "cuda"),
        ({"direction": "forward", "key": {"channels": 8}}, "torch"),
        ({"direction": "backward", "key": {"channels": 4}}, "torch"),
    ],
)
def test_auto_takes_what_a_table_names(kernels, entry, chosen):
    kernels([entry])
    assert backend_of_a_call().backend == chosen


def test_what_is_not_written_is_said(kernels):
    assert answer("attention") == "no CUDA C++ kernels of attention are written"
    with pytest.raises(UnsupportedError, match="no CUDA C"):
        ops.attention(X, X, X, backend="cuda")


def test_refusals(monkeypatch):
    assert support.refuse(X) == "runs on CUDA devices, not on cpu"
    assert support.refuse(X.double()) == "takes float32, bfloat16 and float16, not torch.float64"
    on_gpu = types.SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", 0))
    monkeypatch.setattr(support, "capability_of", lambda device: 75)
    assert support.refuse(on_gpu) == "needs a GPU of capability 8.0, not 7.5"
    monkeypatch.setattr(support, "capability_of", lambda device: 80)
    assert support.refuse(on_gpu) is None


def test_the_table_of_every_operation_is_read(kernels):
    assert set(cuda._OPS) == set(dispatch.OPS)


def messages_of(op, *reasons):
    return [f"backend 'cuda' cannot run {op} backward: {r}; use backend='auto'" for r in reasons]


def test_tests_of_every_backend_know_what_is_refused_by_contract(monkeypatch):
    """`contract.py` has the reasons that the implementations give, and no others."""
    monkeypatch.setattr(support, "capability_of", lambda device: 89)
    monkeypatch.setattr(cuda_attention, "target_of", lambda device: KNOWN[89])

    def on_gpu(*shape, dtype=torch.float16):
        x = torch.empty(shape, dtype=dtype, device="meta")
        return types.SimpleNamespace(
            shape=x.shape, dtype=dtype, device=torch.device("cuda", 0), stride=x.stride, numel=x.numel
        )

    implementation = cuda_attention.implementation()

    def attention(direction, dtype=torch.float16, head_dim=64, mask=None):
        q = on_gpu(1, 1, 4, head_dim, dtype=dtype)
        if direction == "forward":
            return implementation.supports(q, q, q, mask, False, None, True)
        return implementation.supports_backward(q, q, q, q, q, None, mask, False, None)

    rest = (None, None, 1e-5, None, None, None, None)
    wide, many = on_gpu(1, 5000), on_gpu(2**28 + 1, 1)
    nearest, sums = vq.nearest_implementation().supports, vq.ema_update_implementation().supports
    found = {
        "attention": [
            attention("forward", torch.float32),
            attention("forward", torch.float64),
            attention("forward", head_dim=512),
            attention("backward", head_dim=512),
        ],
        "group_norm": [
            group_norm.supports(on_gpu(2, 4096, 8), 1, *rest),
            group_norm.supports(on_gpu(1, 1, 2**30 + 1), 1, *rest),
            group_norm.supports(on_gpu(2**20, 128, 1), 128, *rest),
            group_norm.supports(on_gpu(1, 2**31, 1), 2**21, *rest),
            group_norm.supports(on_gpu(1, 2048, 2**21), 1, *rest),
        ],
        "vq_nearest": [nearest(wide, wide), nearest(on_gpu(1, 1), many)],
        "vq_ema_update": [sums(wide, None, 2**28 + 1)],
    }
    for op, reasons in found.items():
        for reason, message in zip(reasons, messages_of(op, *reasons)):
            assert refused_by_contract(message) == reason
        for pattern in REFUSALS[op]:
            assert any(re.match(pattern, reason) for reason in reasons), pattern
    others = "the CUDA kernels are not built; run `fastldm build`", "needs a GPU of capability 8.0, not 7.5"
    assert not any(map(refused_by_contract, messages_of("attention", *others)))
    assert refused_by_contract(messages_of("vq_nearest", found["attention"][0])[0]) is None


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [("takes head dims up to 256 on a GPU whose blocks have 99 KiB", "skipped"), ("needs", "failed")],
)
def test_only_what_is_refused_by_contract_is_skipped(reason, outcome):
    from tests.ops.conftest import pytest_pyfunc_call

    error = UnsupportedError(messages_of("attention", reason)[0])
    calling = pytest_pyfunc_call(None)
    next(calling)
    with pytest.raises(pytest.skip.Exception if outcome == "skipped" else UnsupportedError, match=reason):
        calling.throw(error)
