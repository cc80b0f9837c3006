from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastldm
from fastldm import dispatch, env, ops
from fastldm.errors import InputError, InputTypeError, UnsupportedError
from fastldm.implementation import Implementation

Q = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def torch_first(monkeypatch):
    """Whether the compiled kernels are there must not matter here."""
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("torch", "reference"))
    dispatch._auto_chain.cache_clear()
    yield
    dispatch._auto_chain.cache_clear()


@pytest.fixture
def picky(monkeypatch, torch_first):
    """A backend first in the order of the CPU that does attention in float32 only, and no backward."""
    reference = dispatch.find("reference", "attention")

    def supports(q, *rest):
        return None if q.dtype == torch.float32 else f"float32 only, got {q.dtype}"

    def implementation(op):
        if op != "attention":
            raise UnsupportedError(f"no {op} here")
        return Implementation(forward=reference.forward, supports=supports)

    module = type(sys)("picky_backend")
    module.implementation = implementation
    monkeypatch.setitem(sys.modules, "picky_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "picky", "picky_backend:implementation")
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("picky", *dispatch.AUTO["cpu"]))
    monkeypatch.setattr(dispatch, "_warned", set())
    caches = (dispatch.find, dispatch._auto_chain)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def backend_of(**arguments):
    with fastldm.record() as rec:
        ops.attention(Q, Q, Q, **arguments)
    return rec.calls[0].backend


def test_policy():
    assert backend_of() == "torch"
    with fastldm.use_backend("reference"):
        assert backend_of() == "reference"
        assert backend_of(backend="torch") == "torch"
        with fastldm.use_backend("auto"):
            assert backend_of() == "torch"
        assert backend_of() == "reference"
    assert backend_of() == "torch"
    with (
        pytest.raises(InputError, match=r"'fast'; use one of: auto, reference, torch, cpu, triton, cuda"),
        fastldm.use_backend("fast"),
    ):
        pass
    with (
        pytest.raises(InputTypeError, match=r"must be a name, got float32 \(.*\); use"),
        fastldm.use_backend(Q),
    ):
        pass


def test_a_name_is_a_requirement():
    with pytest.raises(UnsupportedError, match=r"backend 'cuda' cannot run \w+ forward: .*CUDA"):
        ops.attention(Q, Q, Q, backend="cuda")
    with (
        fastldm.use_backend("cuda"),
        pytest.raises(UnsupportedError, match=r"backend 'cuda' cannot run \w+ forward: .*CUDA"),
    ):
        ops.group_norm(Q, 2)


def test_a_new_backend_needs_only_the_table(picky):
    assert backend_of() == "picky"
    assert "picky" in str(ops.explain("attention", Q, Q, Q))
    assert env.report().backends["picky"]["attention"] is None
    assert env.report().backends["picky"]["group_norm"] == "no group_norm here"


def test_fallback_is_recorded_and_warned_once(picky, caplog):
    half = Q.bfloat16()
    with caplog.at_level(logging.WARNING, logger="fastldm"), fastldm.record() as rec:
        ops.attention(half, half, half)
        ops.attention(half, half, half)
    assert [call.backend for call in rec.calls] == ["torch", "torch"]
    assert all(call.fallback == "picky: float32 only, got torch.bfloat16" for call in rec.calls)
    assert len(caplog.records) == 1
    assert "picky" in caplog.text
    assert "float32 only" in rec.summary()
    with pytest.raises(UnsupportedError, match="float32 only"):
        ops.attention(half, half, half, backend="picky")


def test_an_absent_backend_is_recorded_as_a_fallback(monkeypatch):
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("cuda", "torch", "triton"))
    with fastldm.record() as rec:
        ops.attention(Q, Q, Q)
    assert rec.calls[0].backend == "torch"
    assert rec.calls[0].fallback == f"cuda: {dispatch.find('cuda', 'attention')}"


def test_auto_passes_by_a_backend_that_is_slower(picky, caplog):
    """Without a warning; by name it runs."""
    found = dispatch.find("picky", "attention")
    object.__setattr__(found, "slower", lambda q, *rest: "slower for few keys" if q.shape[2] < 8 else None)
    with caplog.at_level(logging.WARNING, logger="fastldm"), fastldm.record() as rec:
        ops.attention(Q, Q, Q)
        ops.attention(Q, Q, Q, backend="picky")
        ops.attention(*(torch.randn(1, 1, 8, 8),) * 3)
    assert [call.backend for call in rec.calls] == ["torch", "picky", "picky"]
    assert [call.fallback for call in rec.calls] == ["picky: slower for few keys", None, None]
    assert not caplog.records
    assert fastldm.explain("attention", Q, Q, Q).reasons["picky"] == "slower for few keys"


def test_backward_falls_back_by_itself(picky):
    q, mask = Q.clone().requires_grad_(), torch.ones(4, 4, dtype=torch.bool)
    with fastldm.record() as rec:
        ops.attention(q, Q, Q, mask).sum().backward()
    assert [(c.direction, c.backend) for c in rec.calls] == [("forward", "picky"), ("backward", "torch")]
    assert rec.calls[1].fallback == "picky: the picky backend has no backward for attention"
    with pytest.raises(UnsupportedError, match="no backward"):
        ops.attention(q, Q, Q, backend="picky").sum().backward()


def test_record():
    with fastldm.record() as outer:
        ops.vq_quantize(torch.randn(5, 3), torch.randn(4, 3))
        with fastldm.record() as inner, fastldm.use_backend("reference"):
            ops.group_norm(Q, 2)
            ops.group_norm(Q, 2)
    ops.group_norm(Q, 2)
    assert [call.op for call in outer.calls] == ["vq_nearest", "group_norm", "group_norm"]
    assert inner.backends() == {"group_norm": ["reference"]}
    assert outer.backends() == {"group_norm": ["reference"], "vq_nearest": ["torch"]}
    call = inner.calls[0]
    assert (call.direction, call.shapes, call.dtype) == ("forward", ((2, 2, 4, 8),), torch.float32)
    header, row = inner.summary().splitlines()
    assert header.split()[:4] == ["calls", "op", "direction", "backend"]
    assert row.split() == ["2", "group_norm", "forward", "reference", "cpu", "float32", "2x2x4x8"]
    with fastldm.record() as nothing:
        pass
    assert nothing.summary() == "no fastldm operation ran"


def test_backward_runs_under_the_policy_of_its_forward():
    """Also from another thread and after the context has ended, with the recorders of the forward."""
    q, x = Q.clone().requires_grad_(), Q.clone().requires_grad_()
    with fastldm.use_backend("reference"), fastldm.record() as rec:
        loss = ops.attention(q, Q, Q).sum() + ops.group_norm(x, 2).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert q.grad is not None
    assert {(c.op, c.direction, c.backend) for c in rec.calls} == {
        (op, direction, "reference")
        for op in ("attention", "group_norm")
        for direction in ("forward", "backward")
    }


def test_the_policy_survives_copies_of_what_is_saved():
    """As a user's hooks make them, to keep saved tensors elsewhere."""
    q = torch.randn(1, 2, 300, 8, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
    with hooks, fastldm.use_backend("reference"), fastldm.record() as rec:
        out = ops.attention(q, q, q)
    out.sum().backward()
    assert [(c.direction, c.backend) for c in rec.calls] == [
        ("forward", "reference"),
        ("backward", "reference"),
    ]


def test_explicit_backend_holds_for_the_backward():
    q = Q.clone().requires_grad_()
    with fastldm.record() as rec:
        ops.attention(q, Q, Q, backend="reference").sum().backward()
    assert [call.backend for call in rec.calls] == ["reference", "reference"]


def test_threads_do_not_share_a_policy():
    seen = []
    barrier = threading.Barrier(2)

    def work(name):
        with fastldm.use_backend(name):
            barrier.wait(timeout=30)
            seen.append((name, backend_of()))
            barrier.wait(timeout=30)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [("reference", "reference"), ("torch", "torch")]


def test_explain():
    with fastldm.record() as rec:
        explanation = fastldm.explain("attention", Q, Q, Q, is_causal=True)
    assert rec.calls == []
    assert explanation.chosen == "torch"
    assert set(explanation.reasons) == set(dispatch.BACKENDS)
    assert explanation.reasons["torch"] == "chosen"
    assert "torch comes first" in explanation.reasons["reference"]
    assert explanation.reasons["cuda"] == dispatch.find("cuda", "attention")
    named = fastldm.explain("group_norm", Q, 2, backend="reference")
    assert named.chosen == "reference"
    assert named.reasons["torch"] == "not asked for: the policy is 'reference'"
    with fastldm.use_backend("cuda"):
        absent = fastldm.explain("vq_quantize", torch.randn(3, 4), torch.randn(5, 4))
    assert absent.chosen is None
    assert "no backend can do this call" in str(absent)
    assert fastldm.explain("vq_ema_update", torch.randn(1, 4), torch.zeros(1).long(), 3).chosen == "torch"
    with pytest.raises(InputError, match="unknown operation 'conv'"):
        fastldm.explain("conv", Q)
    for given, said in ((Q, r"float32 \(.*\)"), (["attention"], r"\['attention'\]"), (None, "None")):
        with pytest.raises(InputTypeError, match=f"the name of an operation comes first, got {said}; use "):
            fastldm.explain(given, Q, Q)
    with pytest.raises(ValueError, match="head dim"):
        fastldm.explain("attention", *(torch.randn(1, 1, 2, 7),) * 3)


def run_python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


PRINT_BACKENDS = """
import torch, fastldm
with fastldm.record() as rec:
    fastldm.ops.group_norm(torch.randn(1, 4, 2, 2), 2)
    with fastldm.use_backend("torch"):
        fastldm.ops.group_norm(torch.randn(1, 4, 2, 2), 2)
print([call.backend for call in rec.calls])
"""


def test_environment_variable():
    done = run_python(PRINT_BACKENDS, FASTLDM_BACKEND="reference")
    assert done.stdout.strip() == "['reference', 'torch']", done.stderr
    wrong = run_python(PRINT_BACKENDS, FASTLDM_BACKEND="refrence")
    assert (
        "ConfigError: FASTLDM_BACKEND='refrence' is not a backend; use one of: auto, reference"
        in wrong.stderr
    )


def test_env_report(monkeypatch):
    monkeypatch.setenv("FASTLDM_BACKEND", "auto")
    report = env.report()
    assert report.versions["torch"] == torch.__version__
    assert report.versions["fastldm"] == fastldm.__version__
    assert report.backends["torch"] == dict.fromkeys(dispatch.OPS)
    assert report.backends["cuda"]["attention"] == dispatch.find("cuda", "attention")
    assert report.variables["FASTLDM_BACKEND"] == "auto"
    text = str(report)
    for expected in (
        "torch",
        "CPU",
        "GPU",
        "vq_nearest",
        str(dispatch.find("cuda", "attention")),
        "FASTLDM_BACKEND=auto",
    ):
        assert expected in text
    assert set(report.to_dict()) == {"versions", "cpu", "gpu", "backends", "proven", "variables"}
    assert set(dispatch.BACKENDS) == set(report.proven)
    assert "no GPU has run it" in text
