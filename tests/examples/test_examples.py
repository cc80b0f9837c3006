"""The scripts in examples/ run as they are, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    # One thread: beside other tests on two cores, threads that wait for each other take minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def largest_differences(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^largest difference.*: (\S+)$", output, re.MULTILINE)]


def test_all_of_them_are_run_here():
    names = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert names == {path.stem for path in EXAMPLES.glob("*.py")}


def test_diffusers_pipeline(tmp_path):
    output = run("diffusers_pipeline", "--out", str(tmp_path / "picture.png"))
    assert "replaced: 10 attention, 27 group_norm; skipped: 0" in output
    (difference,) = largest_differences(output)
    assert 0 < difference < 1e-4
    assert Image.open(tmp_path / "picture.png").size == (16, 16)


def test_own_module():
    output = run("own_module")
    assert "replaced: 2 group_norm; skipped: 1" in output
    assert "replaced: 1 attention, 2 group_norm; skipped: 0" in output
    assert output.count(" ok\n") == 3
    assert all(0 < difference < 1e-5 for difference in largest_differences(output))


def test_training():
    output = run("training")
    assert "replaced: 4 attention, 13 group_norm; skipped: 0" in output
    losses = re.findall(r"loss of the first step (\S+), of the last (\S+)", output)
    (plain_first, plain_last), (first, last) = ([float(x) for x in pair] for pair in losses)
    assert abs(first - plain_first) < 1e-5
    assert last < 0.5 * first
    assert abs(last - plain_last) < 1e-3
