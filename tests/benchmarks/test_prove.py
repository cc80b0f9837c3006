"""The parts of `prove`: how they end, what is kept, and that a second run goes on."""

from __future__ import annotations

import json

import pytest

from benchmarks import prove
from benchmarks.__main__ import _parser, main
from benchmarks.prove import Part
from fastldm.dispatch import OPS

PYTHON = ("-n", "1", "-r", "1")
GOOD = Part("good", "timeit", (*PYTHON, "print('a line')"))
BAD = Part("bad", "json.tool", ("a-file-that-is-not-there",))
SLOW = Part("slow", "timeit", (*PYTHON, "import time; time.sleep(60)"))
ABSENT = Part("absent", "timeit", PYTHON, tool=("a-tool-that-nobody-has",))


def outcomes(folder):
    return {entry["part"]: entry["status"] for entry in json.loads((folder / "prove.json").read_text())}


def test_parts_end_in_their_own_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prove, "parts", lambda names: [GOOD, BAD, SLOW, ABSENT])
    assert prove.run(tmp_path / "out", limit=3.0) == 1
    assert outcomes(tmp_path / "out") == {
        "good": "passed",
        "bad": "failed",
        "slow": "timed out",
        "absent": "absent",
    }
    assert (tmp_path / "out" / "good.log").read_text().startswith("a line")
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["part", "good", "bad", "slow", "absent"]


def test_a_second_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prove, "parts", lambda names: [GOOD, BAD])
    assert prove.run(tmp_path) == 1
    first = (tmp_path / "good.log").stat().st_mtime_ns
    mended = Part("bad", GOOD.module, GOOD.arguments)
    monkeypatch.setattr(prove, "parts", lambda names: [GOOD, mended])
    assert prove.run(tmp_path) == 0
    assert outcomes(tmp_path) == {"good": "passed", "bad": "passed"}
    assert (tmp_path / "good.log").stat().st_mtime_ns == first
    assert prove.run(tmp_path, again=True) == 0
    assert (tmp_path / "good.log").stat().st_mtime_ns > first


def test_every_part_names_files_and_options_that_exist():
    for part in prove.parts():
        files = [a for a in part.arguments if a.startswith("tests/")]
        assert all((prove.ROOT / file).exists() for file in files), part.name
    assert [part.name for part in prove.parts(["ops-vq"])] == ["ops-vq"]


def test_the_cuda_kernels_are_built_first_and_in_every_kind_of_part():
    """Their tests alone, so that kernels that are not built fail rather than go missing."""
    parts = {part.name: part for part in prove.parts()}
    assert next(iter(parts)) == "build-cuda"
    for word in ("attention", "group_norm", "vq"):
        assert parts[f"ops-{word}-cuda"].arguments[-3:] == ("-k", "cuda", f"tests/ops/test_{word}.py")
        assert "not cuda" in parts[f"ops-{word}"].arguments
        assert list(parts).index(f"tune-triton-{word}") < list(parts).index(f"tune-cuda-{word}")
    assert "cuda and" in " ".join(parts["sanitizer-cuda-memcheck"].arguments)
    tuned = {name for part in parts.values() if part.name.startswith("tune-cuda") for name in part.arguments}
    assert tuned >= set(OPS)
    for part in parts.values():
        if part.module == "benchmarks":
            _parser().parse_args(part.arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "everything"], "unknown part 'everything'; use one of: build-cuda, kernels-attention"),
        ([], "needs a CUDA GPU"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "--part" in arguments)
    assert main(["prove", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_record_of_something_else_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "prove.json").write_text('{"some": "thing"}')
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["prove", "--out", str(tmp_path), "--part", "ops-vq"]) == 2
    assert "is not what prove writes" in capsys.readouterr().err
