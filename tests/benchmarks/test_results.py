"""Files of results, their pictures, the memory and the machine they tell of, and two trees in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import compare, machine, plot, report
from benchmarks.measure import Row
from benchmarks.registry import Case
from fastldm.errors import InputError


def row(
    provider: str, seconds: float | None, *, ours: bool = False, shape: str = "vqgan-4096", **fields
) -> Row:
    base = {
        "op": "vq_nearest",
        "shape": shape,
        "dims": {"z": [4096, 256], "codebook": [1024, 256]},
        "dtype": "float32",
        "layout": "contiguous",
        "direction": "forward",
        "device": "cpu",
        "threads": 2,
        "floor": "matmul",
        "floor_seconds": 1e-3,
        "floor_rate": 4e11,
    }
    if seconds is not None:
        times = {"seconds": seconds, "low": seconds, "high": seconds, "loops": 1, "samples": [seconds]}
        base |= {**times, "rate": 1e9 / seconds}
    return Row(**base, provider=provider, ours=ours, **fields)


ROWS = [
    row("fastldm-auto", 0.001, ours=True, ratio=2.0, best_rival="faiss", slower_than_torch=True, error=0.0),
    row("fastldm-cpu", None, ours=True, fault="3 of 256 rows differ", error=3.0),
    row("faiss", 0.002, fault="1 of 256 rows differ", error=1.0, peak_extra_bytes=8_000_000),
    row("chunked", 0.004),
    row("cdist", None, refused="needs 99 GiB at once"),
    row("chunked", 0.04, shape="vqgan-65536"),
    row("faiss", 0.01, shape="vqgan-65536"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ops.json"
    head = report.header("run ops", "cpu", "kept")
    report.write(path, head, [r.to_dict() for r in ROWS], complete=True)
    return path


def test_a_file_holds_machine_versions_revision_and_rows(file):
    document = report.read(file)
    assert document["schema"] == report.SCHEMA
    assert document["complete"] is True
    assert {"cpu", "cores", "flags", "gpu", "fastldm_instruction_set"} <= document["machine"].keys()
    assert {"fastldm", "python", "torch"} <= document["versions"].keys()
    assert document["git"].keys() == {"sha", "dirty"}
    assert document["git"] == machine.revision()
    assert [Row(**r) for r in document["rows"]] == ROWS


def test_a_busy_machine_is_said_to_be_busy():
    assert "load 1.5 on 2 cores" in machine.busy({"load_average": [1.5, 0.0, 0.0], "cores": 2})
    assert machine.busy({"load_average": [0.5, 9.0, 9.0], "cores": 2}) is None
    assert machine.busy({"load_average": None, "cores": 2}) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"schema": 0}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"other\.json"):
        report.read(path)
    with pytest.raises(InputError, match=r"other\.json"):
        plot.draw([path])


def test_results_of_another_schema_are_refused(file):
    document = {**report.read(file), "schema": 99}
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="schema 99"):
        report.read(file)


def test_the_table_shows_no_time_of_a_wrong_kernel():
    lines = report.table(ROWS[:5]).splitlines()
    assert "2 threads" in lines[0]
    assert "matmul 400 GFLOP/s" in lines[0]
    wrong = next(line for line in lines if "fastldm-cpu" in line)
    assert "not reported, WRONG: 3 of 256 rows differ" in wrong
    assert " ms" not in wrong
    assert "2.00x faiss" in next(line for line in lines if "fastldm-auto" in line)
    assert "WRONG: 1 of 256" in next(line for line in lines if line.startswith("  faiss"))
    assert "needs 99 GiB" in lines[-1]
    findings = report.findings(ROWS)
    assert len(findings) == 2
    assert "auto is slower than PyTorch" in findings[0]
    assert findings[1].startswith("WRONG: fastldm-cpu vq_nearest")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (123.4, "123 s"), (0.00999, "9.99 ms"), (1.2e-5, "12 us"), (9.996e-4, "1000 us")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_speeds_in_a_plot_are_relative_to_pytorch():
    rows = [r.to_dict() for r in ROWS if r.seconds is not None]
    assert plot.relative(rows, "chunked") == {
        "fastldm-auto": {"vqgan-4096": 4.0},
        "faiss": {"vqgan-4096": 2.0, "vqgan-65536": 4.0},
    }


def test_a_plot_for_every_operation(file, tmp_path):
    (path,) = plot.draw([file])
    assert path == tmp_path / "ops-vq_nearest.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no such folder"):
        plot.draw([file], tmp_path / "absent")


PEAK = """
import torch
from benchmarks import memory
memory.reuse()
small = torch.ones(1000)
def grows():
    work = torch.ones(16 << 20)
    return (work[:1000].clone(),)
def returns():
    return (torch.ones(16 << 20),)
def nothing():
    return (small,)
for run in (grows, returns, nothing):
    run()
    print(memory.peak_extra(run, "cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_peak_memory_counts_what_is_neither_there_before_nor_a_result():
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=machine.ROOT
    )
    grows, returns, nothing = (int(line) for line in done.stdout.split())
    assert 60e6 < grows < 80e6
    assert returns < 5e6
    assert nothing < 5e6


@pytest.mark.skipif(
    machine.revision()["sha"] is None, reason="not a git checkout: there is no other revision"
)
def test_two_trees_in_one_run(tmp_path, capsys):
    case = Case("vq_nearest", "one-code", "float32", "contiguous", "forward")
    out = tmp_path / "compare.json"
    assert compare.run("HEAD", [case], rounds=2, out=out, build=False) == 0
    document = report.read(out)
    assert document["base"]["sha"] == machine.revision()["sha"]
    (result,) = document["rows"]
    assert result["provider"] == "fastldm-auto"
    assert result["low"] <= result["ratio"] <= result["high"]
    assert [len(side["samples"]) for side in result["sides"].values()] == [2, 2]
    assert "x as fast" in capsys.readouterr().out
    with pytest.raises(InputError, match="plots are of"):
        plot.draw([out])


def test_a_revision_that_cannot_run_is_one_line(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "worker.py").write_text("import nothing_like_it")
    with pytest.raises(InputError, match="old cannot be measured: ModuleNotFoundError"):
        compare.Worker("old", tmp_path)


def test_the_same_cases_run_under_pytest_benchmark():
    name = "attention-demo-4px-self-d32-float32-contiguous-forward-fastldm-auto"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k", name]
    command += ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    # pytest-benchmark measures nothing inside a worker of pytest-xdist, which it knows by this variable.
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
