"""What fastldm finds on this machine, for `fastldm env` and for bug reports."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from fastldm import dispatch
from fastldm._version import __version__
from fastldm.errors import UnsupportedError
from fastldm.native import library

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "accelerate",
    "diffusers",
    "transformers",
)


# How far each backend is proven, on the ladder of CONTRIBUTING.md. Rung 6 takes a committed result of
# `python -m benchmarks prove`.
PROVEN = {
    "reference": "rung 1 of 6: against float64 formulas and PyTorch's autograd",
    "torch": "on the CPU only: against the reference",
    "cpu": "rung 2 of 6: against the reference on every instruction set",
    "triton": "rungs 3 and 4 of 6: against the reference in Triton's interpreter, and compiled for six GPUs; "
    "no GPU has run it",
    "cuda": "rung 5 of 6: compiled for sm_80, sm_90a and PTX within limits of registers, and the source run "
    "on the CPU against the reference; no GPU has run it",
}


@dataclass(frozen=True)
class Report:
    """Versions, hardware, backends and settings; print it or read the fields.

    `backends` is {backend: {operation: None where it is live, else in one line why it is not}}, `proven` how
    far the kernels of a backend are proven.
    """

    versions: dict[str, str]
    cpu: str
    gpu: list[str]
    backends: dict[str, dict[str, str | None]]
    proven: dict[str, str]
    variables: dict[str, str]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:<13}{version}" for name, version in self.versions.items()]
        lines += [f"{'CPU':<13}{self.cpu}"]
        lines += [f"{'GPU':<13}{name}" for name in self.gpu or ["none that PyTorch can use"]]
        lines += ["", "backends"]
        for backend, ops in self.backends.items():
            reasons = {op: reason for op, reason in ops.items() if reason is not None}
            live = [op for op in ops if op not in reasons]
            if live:
                lines.append(f"  {backend:<11}live: {', '.join(live)}")
            for reason in dict.fromkeys(reasons.values()):
                absent = ", ".join(op for op in reasons if reasons[op] == reason)
                lines.append(f"  {backend:<11}not live: {absent} ({reason})")
        lines += ["", "proven", *(f"  {name:<11}{rung}" for name, rung in self.proven.items())]
        lines += ["", "settings"]
        lines += [f"  {name}={value}" for name, value in self.variables.items()] or [
            "  no FASTLDM_* variable is set"
        ]
        return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {"fastldm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__
    return versions


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    line = f"{model}, {os.cpu_count()} cores, PyTorch uses {capability}, threads: {threads}"
    try:
        return f"{line}, the C++ kernels use {library.load().isa()}"
    except UnsupportedError:
        return line


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return found


def _reason(backend: str, op: str) -> str | None:
    found = dispatch.find(backend, op)
    return found if isinstance(found, str) else None


def report() -> Report:
    """Looks at this machine. Imports every backend and may start CUDA."""
    return Report(
        versions=_versions(),
        cpu=_cpu(),
        gpu=_gpu(),
        proven=PROVEN,
        backends={name: {op: _reason(name, op) for op in dispatch.OPS} for name in dispatch.BACKENDS},
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTLDM_")},
    )
