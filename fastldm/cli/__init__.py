"""The command line: `fastldm sample | train | evaluate | reproduce | build | env`.

One file per subcommand, with `add_arguments(parser)` and `run(arguments)`. They import torch inside `run`, so
that `fastldm --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from fastldm._version import __version__
from fastldm.checks import did_you_mean
from fastldm.errors import FastLDMError

_COMMANDS = {
    "sample": "draw pictures from captions",
    "train": "train a first stage, latent diffusion, CLIP, a classifier or GLIDE",
    "evaluate": "measure how well pictures match captions of the built-in shapes",
    "reproduce": "run the experiment behind a claim of the field",
    "build": "compile the C++ and CUDA kernels for this machine",
    "env": "show versions, devices and which backends are live",
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and suggestions for flags and names that are close to known ones."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        known: list[str] = []
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        word = unknown[1].split("=")[0] if unknown else choice[1] if choice else ""
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
        hint = did_you_mean(word, known, f"see {self.prog} --help")
        print(f"fastldm: error: {' '.join(message.split())}; {hint}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for anything the user can put right, 130 after Ctrl-C."""
    parser = _Parser(prog="fastldm", description="Latent diffusion on fused kernels.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastldm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        module = importlib.import_module(f"fastldm.cli.{name}")
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)

    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when PyTorch loads its OpenMP. By default idle threads spin for milliseconds: on shared cores
        # that made sampling 15 to 30 times slower; 10 microseconds cost next to nothing on free ones.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parsed, rest = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides"):
        # argparse ends a list of positionals at a flag: `train vq --config X key=value` leaves some over.
        parsed.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parsed.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    warnings.showwarning = _show_warning
    try:
        parsed.run(parsed)
    except KeyboardInterrupt as interrupt:
        print(f"fastldm: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except FastLDMError as error:
        if os.environ.get("FASTLDM_TRACEBACK") == "1":
            raise
        print(f"fastldm: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class of its own for the memory of GPUs alone.
        words = str(error).lower()
        full = isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words
        if not full or os.environ.get("FASTLDM_TRACEBACK") == "1":
            raise
        print("fastldm: error: memory ran out; ask for fewer or smaller pictures at once", file=sys.stderr)
        return 2
    return 0


def _one_line(error: FastLDMError) -> str:
    # A DataLoader's worker hands on its whole traceback as the message; what was raised there is at its end.
    message = str(error)
    if "Original Traceback" in message:
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as one line without the source line that Python adds."""
    print(f"fastldm: warning: {' '.join(str(message).split())}", file=sys.stderr)
