"""Compiles kernel launches for GPUs that are not there, and reads what the compiler made of them.

Triton must not be interpreting (TRITON_INTERPRET) in the process.

`python -m fastldm.testing.aot attention|group_norm|vq CAPABILITY [thorough]` compiles what the tables and
heuristics choose for the layers of real models, if thorough for every dtype and option too, and prints a JSON
line for each launch.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastldm.kernels.common.launch import Launch
from fastldm.kernels.common.target import KNOWN
from fastldm.testing.shapes import ATTENTION_LAYERS, GROUP_NORM_LAYERS, VQ_LAYERS


@dataclass(frozen=True)
class Compiled:
    """What a launch became. `registers` a thread; `spilled` bytes of local memory a thread; `shared` bytes a
    block."""

    registers: int
    spilled: int
    shared: int
    ptx: str


class _Driver:
    """As much of a CUDA driver as Triton asks before a launch."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _pretending(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles through the steps of a real launch: the same specialisations of the same arguments."""
    with _pretending(capability):
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(registers, spilled, kernel.metadata.shared, kernel.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", answer.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {answer.stdout}{answer.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


_LAYERS = {
    "attention": ATTENTION_LAYERS,
    "group_norm": {name: (layer.shape, layer.num_groups) for name, layer in GROUP_NORM_LAYERS.items()},
    "vq": {name: (layer.rows, *layer.codebook) for name, layer in VQ_LAYERS.items()},
}


def main(op: str, capability: int, thorough: bool) -> None:
    cases = importlib.import_module(f"fastldm.kernels.{op}.cases")
    may_spill = getattr(cases, "may_spill", lambda launch, target: False)
    target = KNOWN[capability]
    for name, launch in cases.aot_launches(target, _LAYERS[op], thorough=thorough):
        compiled = compile_launch(launch, capability)
        line = {
            "name": name,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "registers": compiled.registers,
            "spilled": compiled.spilled,
            "may_spill": may_spill(launch, target),
            "shared": compiled.shared,
            "wgmma": "wgmma.mma_async" in compiled.ptx,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "thorough" in sys.argv[3:])
