"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Moving average of a module's state, in float32.

    Floating-point parameters and buffers are averaged, integer ones are copied. At update n (from 0) the
    decay is min(decay, (1 + n) / (10 + n)), as in CompVis/latent-diffusion's LitEma.

    Args:
        module: the module to follow; its current state starts the average.
        decay: upper bound of the decay, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: _as_average(value) for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in module.state_dict().items():
            average = self.average[name]
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), 1 - decay)
            else:
                average.copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into `module` inside the block, and the trained weights back after it."""
        trained = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.average)
        try:
            yield
        finally:
            module.load_state_dict(trained)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor], updates: int) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
        self.updates = updates


def _as_average(value: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to(dtype, copy=True)
