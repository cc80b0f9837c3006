"""Compiles `csrc/cuda` with nvcc into a second extension, so that the CPU's depends on nothing of CUDA.

It speaks PyTorch's stable ABI like the first and brings its own CUDA runtime, so that one binary serves
every PyTorch from 2.11 on that is built for the same major version of CUDA. It holds machine code for sm_80
(which all of 8.x runs) and sm_90a, and PTX that the driver compiles for anything newer.

Importing this module imports neither torch nor anything outside the standard library.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastldm.errors import BuildError
from fastldm.native import ninja
from fastldm.native.build import (
    TORCH_TARGET_VERSION,
    Compiler,
    find_binary,
    hash_of,
    keep,
    sources_folder,
    torch_folder,
)
from fastldm.native.ninja import Progress, Recipe, silent

_FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DNDEBUG", "-DUSE_CUDA")
_MACHINE_CODE = ("80", "90a")
# PTX for what is newer, from the first nvcc that knows it: 12.8 has 100, and code for 100 runs on 120 too.
_PTX = {(12, 8): "100", (12, 0): "90"}


class Usage(NamedTuple):
    """What one thread or block of a kernel takes, as ptxas says. `spilled`: bytes, stores and loads."""

    registers: int
    spilled: int
    static_shared: int


@cache
def sources_hash() -> str:
    folder = sources_folder()
    cuda = [path for path in folder.glob("cuda/**/*") if path.suffix in (".cu", ".cuh", ".h")]
    compiled = [path for path in cuda if "shim" not in path.parts]
    return hash_of((_FLAGS, _MACHINE_CODE, tuple(_PTX)), [*folder.glob("common/*.h"), *compiled])


def binary_name() -> str:
    return f"fastldm_cuda-{sources_hash()}.so"


def find_cuda_binary() -> Path | None:
    """The extension made of exactly these sources: inside the package, else the latest in the cache."""
    return find_binary(binary_name())


def find_nvcc() -> Compiler:
    """CUDACXX, else nvcc of CUDA_HOME, of the PATH or of /usr/local/cuda. Raises BuildError."""
    wanted = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    inside = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    for name in [wanted] if wanted else [*inside[:-1], "nvcc", inside[-1]]:
        try:
            command = tuple(shlex.split(name))
        except ValueError as error:
            raise BuildError(f"CUDACXX={name} cannot be read: {error}") from error
        if command and shutil.which(command[0]):
            answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
            found = re.search(r"release (\d+\.\d+), (V\S+)", answer.stdout)
            if answer.returncode == 0 and found:
                return Compiler(command, f"nvcc {found[2]}")
    given = f"CUDACXX={wanted} is not nvcc" if wanted else "no nvcc was found"
    raise BuildError(f"{given}; install the CUDA toolkit, 12.0 or newer, or name its nvcc in CUDACXX")


def _version_of(compiler: Compiler) -> tuple[int, int]:
    major, minor = re.search(r"V(\d+)\.(\d+)", compiler.version).groups()
    return int(major), int(minor)


def torch_cuda_version() -> str | None:
    """Which CUDA the installed PyTorch is built for, as "13.0"; None for a build without CUDA."""
    folder = torch_folder()
    if not (folder / "lib/libtorch_cuda.so").is_file():
        return None
    found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", (folder / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def find_tools() -> Compiler:
    """An nvcc that fits the installed PyTorch. Raises BuildError saying what is missing."""
    built_for = torch_cuda_version()
    if built_for is None:
        raise BuildError("the installed PyTorch is built without CUDA; install a CUDA build of torch")
    compiler = find_nvcc()
    major, minor = _version_of(compiler)
    if major != int(built_for.split(".")[0]):
        raise BuildError(
            f"the installed PyTorch is built for CUDA {built_for}, but nvcc is of CUDA {major}.{minor}; "
            f"install a toolkit of the same major version, or name its nvcc in CUDACXX"
        )
    if (major, minor) < min(_PTX):
        raise BuildError(f"nvcc is of CUDA {major}.{minor}; install the CUDA toolkit 12.0 or newer")
    return compiler


def missing() -> str | None:
    """In one line what is missing to compile the CUDA kernels here; None where nothing is."""
    try:
        find_tools()
    except BuildError as error:
        return str(error)
    return None


def recipe(compiler: Compiler) -> Recipe:
    """How to compile and link the extension. Raises BuildError without PyTorch's headers."""
    folder, torch = sources_folder(), torch_folder()
    sources = sorted(folder.glob("cuda/*.cu"))
    if not sources:
        raise BuildError(f"the CUDA sources are not in {folder}; install fastldm again")
    ptx = next(arch for since, arch in _PTX.items() if _version_of(compiler) >= since)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _MACHINE_CODE]
    codes.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    headers = ("-Icsrc", "-isystem", str(torch / "include"))
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    objects = {
        path.stem: (*compiler.command, *_FLAGS, target, *codes, *headers, "-c", f"csrc/cuda/{path.name}")
        for path in sources
    }
    # By name alone, like the CPU's: the loader takes PyTorch's libraries that are in the process already.
    libraries = (f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda")
    link = (*compiler.command, "-shared", "-cudart=static", *libraries)
    return Recipe(objects, link, (*(f"sm_{arch}" for arch in _MACHINE_CODE), f"compute_{ptx}"))


def compile_extension(
    output: Path, compiler: Compiler, objects: Path, progress: Progress = silent
) -> dict[str, object]:
    """Compiles and links into `output` as `ninja.run` does, object files in `objects`; what is in it: its
    architectures and, kernel by kernel, `Usage`."""
    plan = recipe(compiler)
    usage = {}
    for text in ninja.run(plan, sources_folder(), objects, output, progress).values():
        usage.update(read_usage(text))
    return {
        "architectures": plan.isas,
        "resources": [{"kernel": k, "arch": a, **u._asdict()} for (k, a), u in sorted(usage.items())],
    }


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def read_usage(text: str) -> dict[tuple[str, str], Usage]:
    """What `ptxas -v` said: {(kernel, architecture): Usage}, kernels by their C++ names where c++filt is at
    hand."""
    found, entry, spilled = {}, None, 0
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry, spilled = (match[1], match[2]), 0
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := _USED.search(line)) and entry:
            found[entry] = Usage(int(match[1]), spilled, int(match[2] or 0))
            entry = None
    names = _readable(sorted({mangled for mangled, _ in found}))
    return {(names[mangled], arch): usage for (mangled, arch), usage in found.items()}


def _readable(mangled: list[str]) -> dict[str, str]:
    """Kernel<...> of `void fastldm::cuda::entry<fastldm::cuda::Kernel<...> >(...)`."""
    if not mangled or not shutil.which("c++filt"):
        return dict(zip(mangled, mangled))
    answer = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = {}
    for symbol, line in zip(mangled, answer.stdout.splitlines()):
        inside = re.search(r"entry<(.*?) ?>\(", line)
        names[symbol] = re.sub(r"fastldm::(cuda::)?", "", inside[1]).replace("> >", ">>") if inside else line
    return names


def build(progress: Progress = silent, *, force: bool = False) -> Path:
    """Compiles into the cache unless it is there already from these sources and this nvcc; its path.

    Processes that build at once wait for each other. Raises BuildError.
    """
    return keep(binary_name(), find_tools(), compile_extension, progress, force=force)


def resources(binary: Path) -> dict[tuple[str, str], Usage]:
    """The resource report of a binary that `build` made: {(kernel, architecture): Usage}."""
    rows = json.loads(binary.with_suffix(".json").read_text())["resources"]
    return {(row.pop("kernel"), row.pop("arch")): Usage(**row) for row in rows}
