"""Everything that only a GPU can show, in parts that each end inside nine minutes: tests, compute-sanitizer,
tuning, measurements.

The folder keeps what is done, so that a killed run goes on where it stopped: `prove.json` has one entry for
each part, `<part>.log` what it printed, and the measurements have files of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import report
from benchmarks.machine import ROOT
from fastldm.errors import InputError
from fastldm.io import atomic_write

_LIMIT = 520.0  # seconds of one part
# What stands together in one folder of kernels and one file of tests.
_OPS = {"attention": ("attention",), "group_norm": ("group_norm",), "vq": ("vq_nearest", "vq_ema_update")}


@dataclass(frozen=True)
class Part:
    """A command of the module `python -m <module>`. `tool` has to be on the PATH, and then runs it."""

    name: str
    module: str
    arguments: tuple[str, ...]
    tool: tuple[str, ...] = ()
    out: str | None = None  # file in the folder that the command writes


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "timed out" or "absent" (its tool is), and its last words."""

    part: str
    status: str = "not run"
    seconds: float = 0.0
    last: str = ""


def parts(names: Sequence[str] = ()) -> list[Part]:
    """All parts, the most valuable first, or those named. Raises InputError for an unknown name."""
    found = [*_tests(), *_sanitizer(), *_measurements(""), *_tuning(), *_measurements("-tuned"), *_models()]
    known = [part.name for part in found]
    for name in names:
        if name not in known:
            raise InputError(f"unknown part {name!r}; use one of: {', '.join(known)}")
    return [part for part in found if not names or part.name in names]


def _tests() -> list[Part]:
    """A part of the CUDA C++ kernels fails where they are not built: no test is left."""
    quiet = ("-q", "-p", "no:cacheprovider")
    on_gpu = (*quiet, "--device", "cuda")
    return [
        Part("build-cuda", "fastldm", ("build", "--cuda")),
        *(
            Part(f"kernels-{word}", "pytest", (*quiet, "-m", "gpu", f"tests/kernels/test_{word}.py"))
            for word in _OPS
        ),
        *(
            Part(f"ops-{word}", "pytest", (*on_gpu, "-k", "not cuda", f"tests/ops/test_{word}.py"))
            for word in _OPS
        ),
        Part("kernels-cuda", "pytest", (*quiet, "-m", "gpu", "tests/cuda")),
        *(
            Part(f"ops-{word}-cuda", "pytest", (*on_gpu, "-k", "cuda", f"tests/ops/test_{word}.py"))
            for word in _OPS
        ),
        Part("contract", "pytest", (*on_gpu, "-k", "triton or cuda", "tests/ops/test_contract.py")),
    ]


def _sanitizer() -> list[Part]:
    """On the small shapes of tests/ops, every instruction being watched."""
    found = []
    for backend, check in itertools.product(("triton", "cuda"), ("memcheck", "racecheck", "synccheck")):
        tool = ("compute-sanitizer", "--tool", check, "--error-exitcode", "1")
        chosen = f"{backend} and (shapes or argmin or ema)"
        arguments = ("-q", "-x", "--device", "cuda", "-k", chosen, "tests/ops")
        found.append(Part(f"sanitizer-{backend}-{check}", "pytest", arguments, tool))
    return found


def _measurements(suffix: str) -> list[Part]:
    found = []
    for word, ops in _OPS.items():
        dtype = "float32" if word == "vq" else "bfloat16"
        name = f"{word}-{dtype}{suffix}"
        arguments = ("run", "ops", "--device", "cuda", "--op", *ops, "--dtype", dtype, "--rounds", "7")
        found.append(Part(name, "benchmarks", arguments, out=f"{name}.json"))
    return found


def _tuning() -> list[Part]:
    """Triton's configurations first, as CUDA C++ has to beat the best of them."""
    return [
        Part(f"tune-{backend}-{word}", "benchmarks", ("tune", "--backend", backend, "--op", *ops))
        for backend in ("triton", "cuda")
        for word, ops in _OPS.items()
    ]


def _models() -> list[Part]:
    found = []
    for op in ("unet-step", "vae-decode"):
        name = f"{op}-bfloat16"
        arguments = (
            "run",
            "models",
            "--device",
            "cuda",
            "--op",
            op,
            "--shapes",
            "sd15",
            "--dtype",
            "bfloat16",
        )
        found.append(Part(name, "benchmarks", (*arguments, "--rounds", "7"), out=f"{name}.json"))
    return found


def run(folder: Path, names: Sequence[str] = (), *, again: bool = False, limit: float = _LIMIT) -> int:
    """Runs the parts that have not passed yet (`again`: all of them) and prints a table.

    The exit code: 1 where a part failed or timed out.
    """
    chosen = parts(names)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "prove.json"
    known = {} if again or not record.is_file() else _read(record)
    for part in chosen:
        if known.get(part.name, Outcome(part.name)).status == "passed":
            continue
        print(f"{part.name} ...", flush=True)
        known[part.name] = _run(part, folder, limit)
        atomic_write(record, json.dumps([asdict(outcome) for outcome in known.values()], indent=1) + "\n")
        print(f"{part.name} {known[part.name].status}: {known[part.name].last}", flush=True)
    outcomes = [known[part.name] for part in chosen]
    print("\n".join(table(outcomes)))
    return 1 if any(outcome.status in ("failed", "timed out") for outcome in outcomes) else 0


def _read(record: Path) -> dict[str, Outcome]:
    try:
        found = [Outcome(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{record} is not what prove writes; give an empty folder, or --again") from error
    return {outcome.part: outcome for outcome in found}


def _run(part: Part, folder: Path, limit: float) -> Outcome:
    if part.tool and shutil.which(part.tool[0]) is None:
        return Outcome(part.name, "absent", last=f"{part.tool[0]} is not on the PATH")
    out = ("--out", str(folder.resolve() / part.out)) if part.out else ()
    command = (*part.tool, sys.executable, "-m", part.module, *part.arguments, *out)
    log = folder / f"{part.name}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=os.name == "posix"
        )
        try:
            status = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _kill(process)
            status = "timed out"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    outcome = Outcome(part.name, status, round(time.monotonic() - start, 1))
    return replace(outcome, last=lines[-1].strip()[:200] if lines else "printed nothing")


def _kill(process: subprocess.Popen) -> None:
    """With its children: the workers of a test run, the program under compute-sanitizer."""
    if os.name == "posix":
        import signal

        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """What was shown, a line for each part."""
    rows = [("part", "status", "seconds", "last words")]
    rows += [(o.part, o.status, f"{o.seconds:.0f}", o.last) for o in outcomes]
    return report.aligned(rows)
