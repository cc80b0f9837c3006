"""Runs a recipe with ninja, which compiles only what has changed since the last time.

Importing this module imports neither torch nor anything outside the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastldm.errors import BuildError

Progress = Callable[[int, int], None]
# The files of csrc that a compiler reads.
_SOURCES = (".cpp", ".cu", ".cuh", ".h")
_LINKED = "linked.so"
_STATUS = re.compile(r"fastldm (\d+) of (\d+)\b")


def silent(done: int, total: int) -> None:
    """The progress report of nobody."""


@dataclass(frozen=True)
class Recipe:
    """What has to be run: one command per object file, with the name of that file, and the link command.

    Commands run beside a copy of the sources, where they name what they compile ("csrc/cpu/vq.cpp"). What
    they write, and what is linked, is added to them.

    `isas`: the instruction sets of CPUs, or the architectures of GPUs, that the binary is for.
    """

    objects: dict[str, tuple[str, ...]]
    link: tuple[str, ...]
    isas: tuple[str, ...]


def find_ninja() -> str:
    """The one of the Python package, else of the PATH. Raises BuildError where there is none."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.is_file():
            return str(packaged)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found; install it by `pip install ninja`")
    return found


def run(recipe: Recipe, sources: Path, folder: Path, output: Path, progress: Progress) -> dict[str, str]:
    """Compiles and links into `output`, which appears at once when it is whole.

    Args:
        sources: the folder csrc.
        folder: where object files stay, for the next time; of one compiler and one recipe.
        progress: called with how many of the commands that are needed have ended, at first with 0.

    Returns:
        What the compiler said of each object file, now or when it was made.

    Raises:
        BuildError: with the compiler's first error.
    """
    ninja = find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    _mirror(sources, folder / "csrc")
    (folder / "build.ninja").write_text(_rules(recipe))
    linked = folder / _LINKED
    # Also where nothing else is to be done there is something to link.
    linked.unlink(missing_ok=True)
    command = [ninja, "-C", str(folder), f"-j{_usable_cores()}"]
    environment = {**os.environ, "NINJA_STATUS": "fastldm %f of %t "}
    said, started = [], False
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if status := _STATUS.match(line):
                done, total = map(int, status.groups())
                if not started:
                    progress(0, total)
                    started = True
                progress(done, total)
            else:
                said.append(line.rstrip("\n"))
    if process.returncode != 0:
        raise BuildError(f"compiling the C++ kernels failed: {_reason(said)}")
    if not linked.is_file():
        raise BuildError(f"{recipe.link[0]} ended without an error, but wrote nothing")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    shutil.copyfile(linked, partial)
    os.replace(partial, output)
    return {stem: (folder / f"{stem}.said").read_text(errors="replace") for stem in recipe.objects}


def _mirror(sources: Path, copy: Path) -> None:
    """Makes `copy` hold the sources, touching only files that differ: ninja goes by times, and those of an
    installed or restored file may be older than what was compiled of another."""
    wanted = {p.relative_to(sources) for p in sources.rglob("*") if p.suffix in _SOURCES and p.is_file()}
    for path in [p for p in copy.rglob("*") if p.is_file() and p.relative_to(copy) not in wanted]:
        path.unlink()
    for name in wanted:
        source, target = sources / name, copy / name
        content = source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _rules(recipe: Recipe) -> str:
    """build.ninja. What a compiler says is kept beside its object file, and shown where it fails."""
    lines = ["ninja_required_version = 1.8", ""]
    for stem, command in recipe.objects.items():
        words = _quoted((*command, "-MD", "-MF", f"{stem}.d", "-o", f"{stem}.o"))
        lines += [
            f"rule {stem}",
            f"  command = {words} > {stem}.said 2>&1 || {{ cat {stem}.said; exit 1; }}",
            f"  description = {stem}",
            f"  depfile = {stem}.d",
            "  deps = gcc",
            f"build {stem}.o | {stem}.said: {stem}",
            "",
        ]
    files = [f"{stem}.o" for stem in recipe.objects]
    link = _quoted((*recipe.link, "-o", _LINKED, *files))
    lines += ["rule link", f"  command = {link}", f"  description = {_LINKED}"]
    lines += [f"build {_LINKED}: link {' '.join(files)}", ""]
    return "\n".join(lines)


def _quoted(command: tuple[str, ...]) -> str:
    return shlex.join(command).replace("$", "$$")


def _reason(said: list[str]) -> str:
    """The first error in what ninja printed, and the command that it is of."""
    failed = next((i for i, line in enumerate(said) if line.startswith("FAILED:")), None)
    if failed is None:
        return "; ".join(said) or "ninja said nothing"
    command, *words = said[failed + 1 :]
    words = [line for line in words if line and not line.startswith("ninja: ")]
    errors = [line for line in words if "error" in line] or words or ["it said nothing"]
    return f"{errors[0]} (command: {command.partition(' > ')[0]})"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
