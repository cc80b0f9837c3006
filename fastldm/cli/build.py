"""`fastldm build`: compile the C++ and the CUDA kernels for this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastldm.errors import BuildError, UnsupportedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="compile again, even if nothing has changed")
    parser.add_argument(
        "--if-possible",
        action="store_true",
        help="where it cannot be done, say why and succeed: everything runs without it, only slower",
    )
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="fail where the CUDA kernels cannot be built; without it they are built where nvcc and a CUDA "
        "build of PyTorch are found",
    )


def run(arguments: argparse.Namespace) -> None:
    try:
        _build(arguments.force)
    except BuildError as error:
        if not arguments.if_possible:
            raise
        print(f"fastldm: going on without the C++ kernels: {error}")
    from fastldm.native import build_cuda

    missing = build_cuda.missing()
    if missing is not None and not arguments.cuda:
        print(f"fastldm: going on without the CUDA kernels: {missing}")
        return
    try:
        _build_cuda(arguments.force)
    except BuildError as error:
        if arguments.cuda or not arguments.if_possible:
            raise
        print(f"fastldm: going on without the CUDA kernels: {error}")


def _build(force: bool) -> None:
    from fastldm.native.build import build

    path, seconds = _timed(build, "compiling the C++ kernels", force)
    # Loaded after it is built: the choice of the instruction set is part of what may go wrong.
    from fastldm.native.library import load

    try:
        isa = load().isa()
    except UnsupportedError as error:
        raise BuildError(str(error)) from error
    print(f"{path} ({seconds:.0f} s), instruction set in use: {isa}")


def _build_cuda(force: bool) -> None:
    from fastldm.native import build_cuda

    path, seconds = _timed(build_cuda.build, "compiling the CUDA kernels", force)
    from fastldm.native.library import load_cuda

    try:
        load_cuda()
    except UnsupportedError as error:
        raise BuildError(str(error)) from error
    print(f"{path} ({seconds:.0f} s)")


def _timed(build: Callable[..., Path], what: str, force: bool) -> tuple[Path, float]:
    import time

    from tqdm import tqdm

    start = time.perf_counter()
    with tqdm(desc=what, unit="file", delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = build(progress, force=force)
    return path, time.perf_counter() - start
