"""A kernel launch as data, so that the launch that runs on a GPU is the one that is compiled without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and all its arguments by name, compile-time constants included.

    The tensors may be on the device "meta": then it can be compiled, not run. `fuse_multiply_add`: whether
    the compiler may round a product and a sum once instead of twice; `tl.fma` always does.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    fuse_multiply_add: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fuse_multiply_add,
        }

    def run(self) -> None:
        """Launches on the current stream of the device of the tensors."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        if device.type != "cuda":
            self._launch()
        else:
            with torch.cuda.device(device):
                self._launch()

    def _launch(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
