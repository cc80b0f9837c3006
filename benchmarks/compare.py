"""This tree against another revision: a process for each, taking turns round by round.

Both sides are measured by this tree's `benchmarks/` and `fastldm/testing/`, laid over the other revision's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import memory, registry, report, timing
from benchmarks.machine import ROOT
from benchmarks.providers import AUTO
from benchmarks.registry import Case
from fastldm.errors import InputError

_MEASURING = ("benchmarks", "fastldm/testing")
# The other process's OpenMP threads spin this long after their work, at most, before they sleep.
_SETTLE = 0.03
HERE = "this tree"


class Worker:
    """A `benchmarks.worker` in a tree."""

    def __init__(self, name: str, tree: Path):
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        hello = self.ask("hello", threads=torch.get_num_threads())
        self.backends: dict[str, list[str]] = hello["backends"]
        if not Path(hello["fastldm"]).is_relative_to(tree):
            self.stop()
            raise InputError(
                f"{name}: fastldm comes from {hello['fastldm']}, not from {tree}; unset PYTHONPATH"
            )

    def ask(self, do: str, **request) -> dict:
        """Raises InputError with the worker's last words where it has none for us."""
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            words = self._log.read().strip().splitlines() or ["no message"]
            raise InputError(f"{self.name} cannot be measured: {words[-1]}")
        return json.loads(answer)

    def sample(self, loops: int) -> float:
        time.sleep(_SETTLE)
        return self.ask("sample", loops=loops)["seconds"]

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def run(
    revision: str,
    cases: Sequence[Case],
    names: Sequence[str] = (),
    *,
    rounds: int | None = None,
    out: Path | None = None,
    build: bool = True,
) -> int:
    """Measures `cases` on both, with the providers of these names (none: fastldm as a user gets it).

    With `build` the kernels of both are compiled first. The exit code: 1 where this tree's result is wrong.
    """
    sha = _resolve(revision)
    rows = []
    with ExitStack() as stack:
        tree = stack.enter_context(exported(sha))
        for name, folder in ((revision, tree), (HERE, ROOT)):
            if build:
                _build(name, folder)
        sides = [Worker(revision, tree)]
        stack.callback(sides[0].stop)
        sides.append(Worker(HERE, ROOT))
        stack.callback(sides[1].stop)
        head = report.header(f"compare {revision}", cases[0].device, memory.reuse())
        head["base"] = {"revision": revision, "sha": sha}
        head["backends"] = {side.name: side.backends for side in sides}
        for case in cases:
            op = registry.find(case.op)
            ours = [p.name for p in op.providers() if p.ours]
            wanted = [p.name for p in registry.providers(op, names)] if names else ours
            for provider in [AUTO] if AUTO in wanted and not names else wanted:
                rows.append(_measure(case, provider, sides, rounds))
                print(_line(rows[-1]), flush=True)
                if out:
                    report.write(out, head, rows, complete=case == cases[-1])
    return 1 if any(row["sides"][HERE]["fault"] for row in rows) else 0


def _resolve(revision: str) -> str:
    done = subprocess.run(
        [
            "git",
            "-C",
            str(ROOT),
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            f"{revision}^{{commit}}",
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(f"{revision!r} is not a commit of this repository; see git log")
    return done.stdout.strip()


@contextmanager
def exported(sha: str) -> Iterator[Path]:
    """A folder with the files of a commit, but for the measuring code, which is this tree's."""
    with tempfile.TemporaryDirectory(prefix="fastldm-compare-") as name:
        tree = Path(name).resolve()
        archive = tree / "tree.tar"
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", f"--output={archive}", sha]
        subprocess.run(command, check=True)
        with tarfile.open(archive) as files:
            files.extractall(tree, filter="data")
        archive.unlink()
        for part in _MEASURING:
            shutil.rmtree(tree / part, ignore_errors=True)
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        yield tree


def _build(name: str, tree: Path) -> None:
    """Compiles the tree's kernels, if it has any; a result of the cache where they are compiled already."""
    if not (tree / "fastldm" / "native" / "build.py").exists():
        return
    print(f"fastldm build for {name}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "fastldm", "build"], cwd=tree, stdout=sys.stderr)
    if done.returncode:
        print(f"{name} is measured without compiled kernels", file=sys.stderr, flush=True)


def _measure(case: Case, provider: str, sides: Sequence[Worker], rounds: int | None) -> dict:
    """One row. `ratio`: how many times faster this tree is; `low`, `high`: its quartiles over the rounds."""
    answers = {side.name: side.ask("prepare", case=asdict(case), provider=provider) for side in sides}
    row = {
        **asdict(case),
        "provider": provider,
        "threads": torch.get_num_threads(),
        "sides": {
            name: {key: answer.get(key) for key in ("refused", "fault", "error", "loops")}
            for name, answer in answers.items()
        },
        "ratio": None,
    }
    if any("loops" not in answer for answer in answers.values()):
        return row
    if rounds is None:
        rounds = timing.rounds_for(sum(answer["seconds"] + _SETTLE for answer in answers.values()))
    samples = {side.name: (side.sample, answers[side.name]["loops"]) for side in sides}
    seconds = timing.interleave(samples, rounds)
    for name, values in seconds.items():
        row["sides"][name] |= {"seconds": timing.statistics_of(values).median, "samples": values}
    base, here = (seconds[side.name] for side in sides)
    row["ratio"], row["low"], row["high"] = timing.statistics_of([b / h for b, h in zip(base, here)])
    return row


def _line(row: dict) -> str:
    label = f"{row['op']} {row['shape']} {row['dtype']} {row['layout']} {row['direction']} {row['provider']}"
    if row["ratio"] is not None:
        times = ", ".join(f"{name} {report.duration(side['seconds'])}" for name, side in row["sides"].items())
        return f"{label}: {row['ratio']:.3f}x as fast ({row['low']:.3f}..{row['high']:.3f}; {times})"
    reasons = (
        f"{name}: {'WRONG, ' + side['fault'] if side['fault'] else side['refused']}"
        for name, side in row["sides"].items()
        if side["fault"] or side["refused"]
    )
    return f"{label}: not measured; {'; '.join(reasons)}"
