"""The command line: `python -m benchmarks run | compare | tune | plot | prove`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastldm.errors import FastLDMError, InputError

if TYPE_CHECKING:
    from benchmarks.registry import Case, Selection


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"benchmarks: error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


_TUNED = ("triton", "cuda")
_SEVERAL = {"nargs": "+", "default": [], "metavar": "NAME"}


def _add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", **_SEVERAL, help="operations, or networks (default: all)")
    parser.add_argument("--shapes", **_SEVERAL, help="named shapes (default: the layers of real models)")
    parser.add_argument("--dtype", **_SEVERAL, help="float32, bfloat16, float16")
    parser.add_argument("--layout", **_SEVERAL, help="contiguous, channels-last, heads-last, packed")
    parser.add_argument("--direction", **_SEVERAL, help="forward, backward, forward+backward")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", default="ops", choices=["ops", "models"], help="default: ops")
    _add_cases(parser)
    parser.add_argument("--provider", **_SEVERAL, help="who does it (default: everyone installed)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: PyTorch's choice")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="default: as many as fit 20 s a case")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows, anew after every case")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", allow_abbrev=False, help="check and measure operations (ops) or whole networks (models)"
    )
    _add_selection(run)
    compare = commands.add_parser(
        "compare", allow_abbrev=False, help="this tree against another revision, in turns within one run"
    )
    compare.add_argument("revision", metavar="REV", help="anything git resolves to a commit")
    _add_selection(compare)
    compare.add_argument(
        "--no-build",
        action="store_true",
        help="use what is compiled, instead of running `fastldm build` for both",
    )
    tune = commands.add_parser(
        "tune",
        allow_abbrev=False,
        help="write tables: the best configurations of the Triton kernels, where CUDA C++ is the fastest",
    )
    _add_cases(tune)
    tune.add_argument(
        "--backend", nargs="+", choices=_TUNED, help="whose tables (default: of those that run here)"
    )
    tune.add_argument("--out", type=Path, metavar="FOLDER", help="of the tables (default: their place)")
    tune.set_defaults(group="ops", provider=[], threads=None)
    plot = commands.add_parser("plot", allow_abbrev=False, help="PNG bar plots of results, one per operation")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what run --out wrote")
    plot.add_argument("--folder", type=Path, help="of the PNG files (default: beside each FILE)")
    prove = commands.add_parser(
        "prove", allow_abbrev=False, help="everything that only a GPU can show: tests, sanitizer, tune, run"
    )
    prove.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of what is found; kept")
    prove.add_argument("--part", nargs="+", default=[], metavar="NAME", help="default: all, in their order")
    prove.add_argument("--again", action="store_true", help="also the parts that have passed already")
    prove.add_argument("--list", action="store_true", help="only name the parts")
    return parser


def _select(arguments: argparse.Namespace) -> tuple[list[Case], Selection]:
    """The cases asked for; sets the number of threads. Raises InputError before any work."""
    import torch

    from benchmarks.registry import Selection, cases

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices can be timed")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    selection = Selection(
        op=tuple(arguments.op),
        shapes=tuple(arguments.shapes),
        dtype=tuple(arguments.dtype),
        layout=tuple(arguments.layout),
        direction=tuple(arguments.direction),
        provider=tuple(arguments.provider),
        device=device,
    )
    if arguments.out and not arguments.out.parent.is_dir():
        raise InputError(f"cannot write {arguments.out}: there is no folder {arguments.out.parent}")
    return cases(arguments.group, selection), selection


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks import machine, memory, registry, report
    from benchmarks.measure import measure

    cases, selection = _select(arguments)
    head = report.header(f"run {arguments.group}", selection.device, memory.reuse())
    warning = machine.busy(head["machine"])
    if warning:
        print(f"benchmarks: warning: {warning}", file=sys.stderr)
    rows = []
    with tqdm(cases, unit="case", file=sys.stderr) as progress:
        for case in progress:
            progress.set_postfix_str(str(case))
            found = measure(
                case, registry.providers(registry.find(case.op), selection.provider), arguments.rounds
            )
            rows += found
            progress.write(report.table(found) + "\n", file=sys.stdout)
            if arguments.out:
                done = [row.to_dict() for row in rows]
                report.write(arguments.out, head, done, complete=case == cases[-1])
    findings = report.findings(rows)
    print("\n".join(findings))
    return 1 if any(row.ours and row.fault for row in rows) else 0


def _compare(arguments: argparse.Namespace) -> int:
    from benchmarks import compare

    cases, selection = _select(arguments)
    return compare.run(
        arguments.revision,
        cases,
        selection.provider,
        rounds=arguments.rounds,
        out=arguments.out,
        build=not arguments.no_build,
    )


def _tune(arguments: argparse.Namespace) -> int:
    cases, selection = _select(arguments)
    if not selection.device.startswith("cuda"):
        raise InputError(
            "tune times the Triton and CUDA kernels, which needs a CUDA GPU; the C++ kernels of the CPU have "
            "no tables to write"
        )
    from benchmarks import tune, tune_cuda
    from fastldm.testing import live_backends

    live = live_backends(cases[0].op)
    # Triton first: CUDA C++ has to beat its best.
    for name in arguments.backend or [name for name in _TUNED if name in live]:
        {"triton": tune, "cuda": tune_cuda}[name].run(cases, arguments.out)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from benchmarks import plot

    for path in plot.draw(arguments.files, arguments.folder):
        print(path)
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    import torch

    from benchmarks import prove

    if arguments.list:
        print("\n".join(part.name for part in prove.parts(arguments.part)))
        return 0
    if not torch.cuda.is_available():
        raise InputError("prove needs a CUDA GPU that PyTorch can use; `fastldm env` says what is there")
    return prove.run(arguments.out, arguments.part, again=arguments.again)


_COMMANDS = {"run": _run, "compare": _compare, "tune": _tune, "plot": _plot, "prove": _prove}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 where one of our kernels is wrong, 2 for bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except FastLDMError as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
