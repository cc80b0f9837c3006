"""Compiles the drivers of the CUDA kernels (tests/cuda/drivers) against the shim, and calls them.

    shim = load("selftest")
    shim("warp", x, out, seed=3)

A driver is `drivers/<name>.cpp`: functions of extern "C" that take pointers, integers and doubles. What the
shim finds wrong is raised as ShimError.

With FASTLDM_SHIM_COVERAGE=1 the lines that run are counted, and

    python -m tests.cuda.shim --at-least 95

prints, file by file, which lines of the kernel bodies (csrc/cuda/*.cuh) never ran.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from fastldm.native.build import cache_folder, find_compiler

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DRIVERS = Path(__file__).resolve().parent / "drivers"

_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
_FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=off", *_WARNINGS, "-DFASTLDM_HOST_SHIM")


class ShimError(AssertionError):
    """What the shim found wrong with a kernel or its launch."""


class Shim:
    """The functions of one driver."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.shim_last_error.restype = ctypes.c_char_p

    def __call__(self, function: str, *arguments, seed: int = 0) -> None:
        """Calls a function of the driver: tensors on the CPU as pointers to their first element, None as a
        null pointer. `seed` orders the threads. Raises ShimError."""
        self._library.shim_set_seed(ctypes.c_uint64(seed))
        getattr(self._library, function)(*map(_as_c, arguments))
        error = self._library.shim_last_error().decode()
        if error:
            raise ShimError(error)

    def write_coverage(self) -> None:
        self._library.shim_write_coverage()


def _as_c(value):
    if value is None or isinstance(value, torch.Tensor):
        assert value is None or value.device.type == "cpu"
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(int(value))


def counting() -> bool:
    return os.environ.get("FASTLDM_SHIM_COVERAGE", "0") not in ("", "0")


def coverage_folder() -> Path:
    return cache_folder() / "shim-coverage"


@cache
def load(driver: str) -> Shim:
    """Compiles `drivers/<driver>.cpp` unless it is there already from these sources."""
    folder = coverage_folder() / driver if counting() else cache_folder() / "shim"
    # Lines are counted once: what is saved by compiling is more than what tests then take longer.
    return Shim(_compile(driver, folder, CSRC, ("-O0", "--coverage") if counting() else ("-O2",)))


def broken(driver: str, folder: Path, changes: Mapping[str, tuple[str, str]]) -> Shim:
    """The driver with changes to the sources: {path in csrc: (what stands there once, what shall)}.

    Raises ValueError where that does not stand there once; no AssertionError, for which tests of broken
    kernels wait.
    """
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    for name, (old, new) in changes.items():
        text = (sources / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} times: {old}")
        (sources / name).write_text(text.replace(old, new))
    # A variable that is used no more is part of what is broken.
    return Shim(_compile(driver, folder, sources, ("-O0", "-Wno-error")))


def _compile(driver: str, folder: Path, sources: Path, flags: tuple[str, ...]) -> Path:
    command = (*find_compiler().command, *_FLAGS)
    include = (f"-I{sources}", f"-I{DRIVERS}")
    machine = sorted(sources.glob("cuda/shim/*"))
    headers = [p for p in sources.glob("cuda/**/*.*h") if p not in machine]
    read = [DRIVERS / f"{driver}.cpp", *sorted(DRIVERS.glob("*.h")), *sorted(headers)]
    # The machine is made once for all drivers, at full speed.
    machine_object = cache_folder() / "shim" / f"machine-{_hash(command, machine)}.o"
    output = folder / f"{driver}-{_hash((command, flags, machine_object.name), read)}.so"
    folder.mkdir(parents=True, exist_ok=True)
    machine_object.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(machine_object.parent / "build.lock"):
        if not machine_object.is_file():
            partial = machine_object.with_suffix(".partial")
            _run(*command, *include, "-O2", "-c", str(sources / "cuda/shim/machine.cpp"), "-o", str(partial))
            partial.replace(machine_object)
    # Of each driver its own: workers compile side by side.
    with FileLock(output.with_suffix(".lock")):
        if not output.is_file():
            kernels, partial = output.with_suffix(".o"), output.with_suffix(".partial")
            _run(*command, *include, *flags, "-c", str(DRIVERS / f"{driver}.cpp"), "-o", str(kernels))
            _run(*command, *flags, "-shared", str(kernels), str(machine_object), "-o", str(partial))
            partial.replace(output)
    return output


def _hash(about: tuple, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(about).encode())
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def executable_lines(folder: Path) -> dict[str, dict[int, bool]]:
    """{kernel file: {line that code was made of: whether it ran in any instance of a template}}."""
    found: dict[str, dict[int, bool]] = {}
    for data in sorted(folder.rglob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", data.name]
        answer = subprocess.run(command, cwd=data.parent, capture_output=True, text=True, check=True)
        for document in answer.stdout.splitlines():
            for file in json.loads(document)["files"]:
                path = Path(data.parent, file["file"]).resolve()
                if path.parent == CSRC / "cuda" and path.suffix == ".cuh":
                    lines = found.setdefault(path.name, {})
                    for line in file["lines"]:
                        number = line["line_number"]
                        lines[number] = lines.get(number, False) or line["count"] > 0
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="line coverage of the CUDA kernel bodies under the shim")
    parser.add_argument("--at-least", type=float, default=0, metavar="PERCENT")
    wanted = parser.parse_args(arguments).at_least
    found = executable_lines(coverage_folder())
    unseen = sorted({path.name for path in (CSRC / "cuda").glob("*.cuh")} - set(found))
    short = bool(unseen) or not found
    for name in unseen:
        print(f"{name:<40} never ran")
    for name, lines in sorted(found.items()):
        missed = [number for number, ran in sorted(lines.items()) if not ran]
        percent = 100 * (1 - len(missed) / len(lines))
        short = short or percent < wanted
        where = f"  not run: {', '.join(map(str, missed))}" if missed else ""
        print(f"{name:<40} {len(lines):>5} lines {percent:6.1f} %{where}")
    if short:
        print(f"every file of kernels must have run, {wanted:g} % of its lines at least", file=sys.stderr)
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
