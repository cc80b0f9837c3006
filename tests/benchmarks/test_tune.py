"""Tuning: candidates are checked and timed, the best over all cases is written where `choose` finds it."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from fastldm.kernels.common import tables
from fastldm.kernels.common.target import KNOWN

from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.registry import Case


class Block(NamedTuple):
    size: int


def choose(name: str = "kernel") -> Block:
    key = {"head_dim": 40, "dtype": "bfloat16"}
    return tables.choose("attention", name, key, KNOWN[90], Block, lambda: Block(1), lambda: [Block(2)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables of our own."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.entries.cache_clear()
    yield tmp_path
    tables.entries.cache_clear()


def write(folder, version: str, size: int, capability: int = 90) -> None:
    path = folder / "attention" / "tables" / f"sm_{capability}-triton-{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"kernel": "kernel", "key": {"dtype": "bfloat16", "head_dim": 40}, "config": {"size": size}}
    path.write_text(json.dumps({"device": "x", "triton": version, "git": None, "entries": [entry]}))


def test_forced_then_measured_then_heuristic(folder):
    assert choose() == Block(1)
    write(folder, "3.6", 3)
    tables.entries.cache_clear()
    assert choose() == Block(3)
    assert choose("another kernel") == Block(1)
    with tables.forcing("attention", "kernel", Block(7)):
        assert choose() == Block(7)
    assert choose() == Block(3)


def test_the_latest_table_that_is_not_newer_than_triton(folder):
    write(folder, "3.4", 4)
    write(folder, "3.5", 5)
    write(folder, "99.0", 99)
    write(folder, "3.5", 8, capability=80)
    assert choose() == Block(5)


def test_watching_lists_what_was_chosen_and_what_else_there_is(folder):
    with tables.watching() as calls:
        choose()
    choose()
    assert len(calls) == 1
    assert (calls[0].kernel, calls[0].chosen, calls[0].candidates) == ("kernel", Block(1), (Block(2),))


def test_best_over_all_cases():
    a, b, c = Block(1), Block(2), Block(3)
    # c is fastest where it runs, which is not everywhere; a is half as slow again once, b twice as slow once.
    first, second = {a: 1.5, b: 1.0, c: 0.9}, {a: 3.0, b: 6.0}
    assert tune.best_of([first, second]) == a
    assert tune.best_of([first]) == c


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_tuning_an_operation_writes_a_table_that_is_used(direction, folder, monkeypatch):
    """Under Triton's interpreter, whose times mean nothing."""
    monkeypatch.setattr(tune, "_time", lambda prepared, case, choice, config: float(config[-1]))
    case = Case("group_norm", "one-group", "float32", "contiguous", direction)
    assert tune.run([case]) == 0
    (path,) = folder.rglob("*.json")
    assert path == tables.table_path("group_norm", 90)
    document = json.loads(path.read_text())
    assert {entry["kernel"] for entry in document["entries"]} >= {"forward"}
    tables.entries.cache_clear()
    with tables.watching() as choices:
        tune.tune_case(case)
    for choice in choices:
        assert choice.chosen[-1] == min(config[-1] for config in (choice.chosen, *choice.candidates))


def test_a_wrong_or_too_large_candidate_gets_no_time(folder):
    case = Case("group_norm", "one-group", "float32", "contiguous", "forward")
    for times in tune.tune_case(case).values():
        assert all(seconds > 0 for seconds in times.values())


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--op", "group_norm"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
