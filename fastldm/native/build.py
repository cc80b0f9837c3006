"""Compiles `csrc/` into the extension that holds the C++ CPU kernels; `build_cuda` does the same for CUDA.

`fastldm build` and, with FASTLDM_BUILD=1, `setup.py` both come here. The extension speaks PyTorch's stable
ABI, so one binary serves every Python and every PyTorch from 2.11 on; kernels are compiled once per
instruction set, and the best one that the machine has is chosen when the extension is loaded
(csrc/cpu/isa.cpp).

Importing this module imports neither torch nor anything outside the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastldm.errors import BuildError
from fastldm.native import ninja
from fastldm.native.ninja import Progress, Recipe, silent

# The oldest PyTorch whose stable ABI the extension uses: 2.11, in the encoding of torch/headeronly/version.h.
TORCH_TARGET_VERSION = "0x020b000000000000"

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-DNDEBUG")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
# Instruction sets in the order in which each needs the ones before it.
_X86 = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
}
# The instruction sets, beside plain C++, that each source of kernels gains from.
_KERNELS = {
    "cpu/attention.cpp": ("avx2", "avx512", "avx512_bf16", "amx"),
    "cpu/group_norm.cpp": ("avx2", "avx512"),
    "cpu/vq.cpp": ("avx2", "avx512"),
}


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str


@cache
def sources_folder() -> Path:
    """`csrc/` of the checkout, or its copy in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "csrc", package.parent / "csrc"
    return installed if installed.is_dir() else checkout


@cache
def sources_hash() -> str:
    """Of what is compiled and how: the sources, the flags and the kind of machine."""
    folder = sources_folder()
    paths = [folder / "bindings.cpp", *folder.glob("common/*.h"), *folder.glob("cpu/*")]
    return hash_of((_FLAGS, _X86, _KERNELS), paths)


def hash_of(flags: tuple, paths: Iterable[Path]) -> str:
    """Of flags, of source files with their names, and of the kind of machine."""
    digest = hashlib.sha256(repr((*flags, platform.system(), platform.machine())).encode())
    folder = sources_folder()
    for path in sorted(paths):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path | None:
    """Where `fastldm build` keeps what it compiled: FASTLDM_CACHE, else `fastldm` in the user's cache.

    None for a user without a home, as a container may have.
    """
    chosen = os.environ.get("FASTLDM_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastldm"
    except RuntimeError:
        return None


def binary_name() -> str:
    return f"fastldm_cpu-{sources_hash()}.so"


def find_binary(name: str | None = None) -> Path | None:
    """The extension made of exactly these sources, or that of another name: inside the package, else the
    latest in the cache."""
    name = name or binary_name()
    packaged = Path(__file__).parent / name
    if packaged.is_file():
        return packaged
    folder = cache_folder()
    built = [path for path in folder.glob(f"*/{name}") if _is_whole(path)] if folder else []
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def _is_whole(path: Path) -> bool:
    """Whether a binary of the cache has the size that was noted beside it: loading half of one kills the
    process."""
    try:
        return json.loads(path.with_suffix(".json").read_text())["bytes"] == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_compiler() -> Compiler:
    """CXX, else the first of c++, g++ and clang++. Raises BuildError where there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        try:
            command = tuple(shlex.split(name))
        except ValueError as error:
            raise BuildError(f"CXX={name} cannot be read: {error}") from error
        if command and shutil.which(command[0]):
            answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
            if answer.returncode == 0 and answer.stdout:
                return Compiler(command, answer.stdout.splitlines()[0])
    given = (
        f"CXX={wanted} is not a C++ compiler" if wanted else "no C++ compiler (c++, g++ or clang++) was found"
    )
    raise BuildError(f"{given}; install g++ 9 or clang++ 11, or newer, or name one in CXX")


def torch_folder() -> Path:
    """Where PyTorch is installed. Raises BuildError where it, or its headers, are not."""
    torch = importlib.util.find_spec("torch")
    folder = Path(torch.origin).parent if torch and torch.origin else None
    if folder is None or not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError("PyTorch 2.11 or newer must be installed, with its headers, to compile against")
    return folder


def recipe(compiler: Compiler) -> Recipe:
    """How to compile and link the extension. Raises BuildError without PyTorch's headers."""
    include = torch_folder() / "include"
    folder = sources_folder()
    if not (folder / "bindings.cpp").is_file():
        raise BuildError(f"the C++ sources are not in {folder}; install fastldm again")
    isas = ("plain", *_supported(compiler))
    compile_ = (*compiler.command, *_FLAGS, "-c")
    bindings = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-isystem{include}")
    built = tuple(f"-DFASTLDM_BUILT_{isa}" for isa in isas)
    objects = {
        "bindings": (*compile_, *bindings, "csrc/bindings.cpp"),
        "isa": (*compile_, *built, "csrc/cpu/isa.cpp"),
    }
    for source, gains in _KERNELS.items():
        for isa in isas:
            if isa == "plain" or isa in gains:
                flags = (f"-DFASTLDM_ISA={isa}", *_X86.get(isa, ()))
                objects[f"{Path(source).stem}-{isa}"] = (*compile_, *flags, f"csrc/{source}")
    if platform.system() == "Darwin":
        shared = ("-dynamiclib", "-undefined", "dynamic_lookup")
    else:
        # By name alone: the loader takes the libtorch_cpu.so that is in the process already, of any version.
        shared = ("-shared", f"-L{include.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu")
    return Recipe(objects, (*compiler.command, *shared), isas)


def _supported(compiler: Compiler) -> Iterator[str]:
    """The instruction sets of this kind of machine that the compiler knows, up to the first it does not."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    for isa, flags in _X86.items():
        command = [*compiler.command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return
        yield isa


def compile_extension(
    output: Path, compiler: Compiler, objects: Path, progress: Progress = silent
) -> dict[str, object]:
    """Compiles and links into `output` as `ninja.run` does, object files in `objects`; what is in it."""
    plan = recipe(compiler)
    ninja.run(plan, sources_folder(), objects, output, progress)
    return {"instruction_sets": plan.isas}


def build(progress: Progress = silent, *, force: bool = False) -> Path:
    """Compiles into the cache unless it is there already from these sources and this compiler; its path.

    Processes that build at once wait for each other. Raises BuildError.
    """
    return keep(binary_name(), find_compiler(), compile_extension, progress, force=force)


def keep(
    name: str,
    compiler: Compiler,
    compile_: Callable[[Path, Compiler, Path, Progress], dict[str, object]],
    progress: Progress,
    *,
    force: bool,
) -> Path:
    """The binary `name` that this compiler made, in the cache, after `compile_` if need be.

    What `compile_` returns is noted in a JSON file beside it. `force`: with no object file of before. Raises
    BuildError.
    """
    from filelock import FileLock

    key = hashlib.sha256(repr(compiler).encode()).hexdigest()[:8]
    folder = cache_folder()
    if folder is None:
        raise BuildError("this user has no home folder to keep the C++ kernels in; set FASTLDM_CACHE")
    output = folder / key / name
    objects = output.parent / f"{name.partition('-')[0]}-objects"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.parent / "build.lock"):
            if force:
                shutil.rmtree(objects, ignore_errors=True)
            if force or not _is_whole(output):
                about = {
                    "compiler": compiler.version,
                    "command": compiler.command,
                    **compile_(output, compiler, objects, progress),
                    "bytes": output.stat().st_size,
                }
                output.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
            # The latest is the one that is loaded.
            output.touch()
    except OSError as error:
        raise BuildError(
            f"cannot write to {output.parent}: {error.strerror or error}; set FASTLDM_CACHE"
        ) from error
    return output
