"""`fastldm build`: compile the C++ kernels for this machine."""

from __future__ import annotations

import argparse

from fastldm.errors import BuildError, UnsupportedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="compile again, even if nothing has changed")
    parser.add_argument(
        "--if-possible",
        action="store_true",
        help="where it cannot be done, say why and succeed: everything runs without it, only slower",
    )


def run(arguments: argparse.Namespace) -> None:
    try:
        _build(arguments.force)
    except BuildError as error:
        if not arguments.if_possible:
            raise
        print(f"fastldm: going on without the C++ kernels: {error}")


def _build(force: bool) -> None:
    import time

    from tqdm import tqdm

    from fastldm.native.build import build

    start = time.perf_counter()
    with tqdm(desc="compiling the C++ kernels", unit="file", delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = build(progress, force=force)
    # Loaded after it is built: the choice of the instruction set is part of what may go wrong.
    from fastldm.native.library import load

    try:
        isa = load().isa()
    except UnsupportedError as error:
        raise BuildError(str(error)) from error
    print(f"{path} ({time.perf_counter() - start:.0f} s), instruction set in use: {isa}")
