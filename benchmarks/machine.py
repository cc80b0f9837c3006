"""What stands at the head of every result: machine, versions, revision, settings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from fastldm._version import __version__
from fastldm.errors import UnsupportedError
from fastldm.native import library as native

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = ("numpy", "triton", "diffusers", "faiss-cpu", "openvino")
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)
_VARIABLES = re.compile(r"FASTLDM_|OMP_|KMP_|GOMP_|MKL_|ONEDNN_|DNNL_|MALLOC_|ATEN_CPU_CAPABILITY|LD_PRELOAD")


def describe(device: str) -> dict:
    """The machine: processor, GPU if it is measured, and how busy it was."""
    info = _processor()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in info.get("flags", info.get("Features", "")).split()],
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "fastldm_instruction_set": _instruction_set(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "system": platform.platform(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "variables": {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)},
    }


def busy(described: dict) -> str | None:
    """A warning in one line where other work was under way as `describe` looked."""
    load, cores = described["load_average"], described["cores"]
    if load is None or load[0] <= 0.5 * cores:
        return None
    return f"the machine is busy (load {load[0]:.1f} on {cores} cores): these times are not to be relied on"


def _instruction_set() -> str:
    """Of the compiled CPU kernels, or why there are none."""
    try:
        return native.load().isa()
    except UnsupportedError as error:
        return str(error)


def _processor() -> dict[str, str]:
    """/proc/cpuinfo of the first core; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def versions() -> dict[str, str]:
    """Of fastldm, Python, PyTorch, its CUDA, and of the installed packages that are measured."""
    found = {
        "fastldm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision() -> dict:
    """Commit of this tree, and whether tracked files differ from it; None for both outside of git."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"sha": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
