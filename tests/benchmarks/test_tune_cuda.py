"""Tables of the CUDA C++ kernels: on a machine whose GPU is the CPU, with times that are made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import tune_cuda
from benchmarks.__main__ import main
from benchmarks.measure import measure
from benchmarks.registry import Case
from fastldm import dispatch, ops
from fastldm.errors import InputError
from fastldm.implementation import Implementation
from fastldm.native import cuda
from fastldm.native.cuda import group_norm, tables

FORWARD = Case("group_norm", "one-group", "float32", "contiguous", "forward")
BOTH = replace(FORWARD, direction="forward+backward")
TINY = {"attention": "more-keys", "group_norm": "one-group", "vq_nearest": "odd", "vq_ema_update": "odd"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(fault=0.0, supports=...)`: kernels of group_norm, off by `fault`, first in the order of the
    CPU; the folder of the tables."""
    real = dispatch.find
    monkeypatch.setattr(tables, "capability_of", lambda device: 90)
    monkeypatch.setattr(tune_cuda, "capability_of", lambda device: 90)
    monkeypatch.setattr(tables, "sources_folder", lambda: tmp_path)
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("cuda", "torch", "reference"))
    # What the CPU has for small tensors, and a GPU has not.
    monkeypatch.setattr(dispatch, "run_composite", lambda op, backend, args: None)

    def make(fault=0.0, supports=lambda *args: None):
        torch_backend = real("torch", "group_norm")

        def forward(*args):
            y, mean, rstd = torch_backend.forward(*args)
            return y + fault, mean, rstd

        found = Implementation(
            forward=forward,
            backward=torch_backend.backward,
            supports=supports,
            supports_backward=lambda grad, x, mean, rstd, *rest: supports(x, *rest),
        )
        kernels = cuda.only_where_measured("group_norm", found, group_norm.key)
        ours = ("cuda", "group_norm")
        monkeypatch.setattr(dispatch, "find", lambda *which: kernels if which == ours else real(*which))
        for cached in (tables.entries, dispatch._auto_chain):
            cached.cache_clear()
        return tmp_path / "cuda" / "tables"

    yield make
    for cached in (tables.entries, dispatch._auto_chain):
        cached.cache_clear()


def timed(monkeypatch, **seconds):
    """Every case takes so long on each backend, but for those that do not do it."""
    real = tune_cuda._times

    def times(problem, judge):
        return {name: seconds[name] for name in real(problem, judge)}

    monkeypatch.setattr(tune_cuda, "_ROUNDS", 1)
    monkeypatch.setattr(tune_cuda, "_times", times)


def entries(folder):
    (path,) = folder.glob("*.json")
    assert path.name == "group_norm-sm_90.json"
    return json.loads(path.read_text())["entries"]


def chosen(case):
    """What "auto" takes for the forward of the case, and for its backward if there is one."""
    problem = tune_cuda.registry.find(case.op).problem(case)
    x, weight, bias = (t.detach().requires_grad_(case.direction != "forward") for t in problem.inputs)
    with dispatch.record() as calls:
        y = ops.group_norm(x, 1, weight, bias, activation="silu")
        if y.requires_grad:
            y.backward(problem.grad)
    return [call.backend for call in calls.calls]


@pytest.mark.parametrize(
    ("torch_time", "cuda_time", "directions"),
    [(2.0, 1.0, {"forward", "backward"}), (1.0, 1.0, set()), (1.0, 2.0, set())],
)
def test_only_where_the_kernel_is_the_fastest(machine, monkeypatch, torch_time, cuda_time, directions):
    folder = machine()
    timed(monkeypatch, torch=torch_time, triton=3.0, cuda=cuda_time)
    assert tune_cuda.run([FORWARD, BOTH]) == 0
    assert {entry["direction"] for entry in entries(folder)} == directions
    backend = "cuda" if directions else "torch"
    assert chosen(BOTH) == [backend, backend]


def test_each_direction_is_measured_alone(machine, monkeypatch):
    folder = machine()
    timed(monkeypatch, torch=2.0, triton=3.0, cuda=1.0)
    tune_cuda.run([BOTH])
    assert {entry["direction"] for entry in entries(folder)} == {"backward"}
    assert chosen(FORWARD) == ["torch"]
    tune_cuda.run([FORWARD])
    assert {entry["direction"] for entry in entries(folder)} == {"forward", "backward"}
    timed(monkeypatch, torch=1.0, triton=3.0, cuda=2.0)
    tune_cuda.run([FORWARD])
    assert {entry["direction"] for entry in entries(folder)} == {"backward"}
    assert entries(folder)[0]["key"]["num_groups"] == 1


def test_a_wrong_kernel_is_in_no_table(machine, monkeypatch, capsys):
    folder = machine(fault=0.1)
    timed(monkeypatch, torch=2.0, triton=3.0, cuda=1.0)
    tune_cuda.run([FORWARD])
    assert entries(folder) == []
    assert "cuda is WRONG" in capsys.readouterr().out


def test_what_the_kernel_refuses_is_not_timed(machine, monkeypatch):
    machine(supports=lambda *args: "takes nothing")
    monkeypatch.setattr(tune_cuda, "_times", lambda *args: pytest.fail("timed"))
    assert tune_cuda.tune_case(FORWARD) == {}


def test_another_folder(machine, monkeypatch, tmp_path):
    machine()
    timed(monkeypatch, torch=2.0, triton=3.0, cuda=1.0)
    tune_cuda.run([FORWARD], tmp_path / "out")
    assert len(entries(tmp_path / "out")) == 1
    assert chosen(FORWARD) == ["torch"]


def test_kernels_that_do_not_run_here(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "find", lambda name, op: "not built")
    with pytest.raises(InputError, match="kernels of group_norm do not run here: not built"):
        tune_cuda.run([FORWARD])
    with pytest.raises(SystemExit):
        main(["tune", "--backend", "cpu"])
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_backend_that_is_not_live_is_listed_with_its_reason(op, monkeypatch):
    real = dispatch.find
    monkeypatch.setattr(dispatch, "find", lambda name, op: "no GPU" if name == "cuda" else real(name, op))
    found = {p.name: p for p in tune_cuda.registry.find(op).providers()}
    assert list(found)[:5] == [f"fastldm-{name}" for name in ("auto", "torch", "cpu", "triton", "cuda")]
    (row,) = measure(replace(FORWARD, op=op, shape=TINY[op]), [found["fastldm-cuda"]], rounds=1)
    assert (row.refused, row.seconds) == ("no GPU", None)
    assert found["fastldm-torch"].refuse(FORWARD) is None
