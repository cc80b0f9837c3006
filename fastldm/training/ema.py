"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Moving average of a module's state, in float32.

    Floating-point parameters and buffers are averaged, integer ones are copied. At update n (from 0) the
    decay is min(decay, (1 + n) / (10 + n)). CompVis/latent-diffusion's LitEma has that of n + 1.

    Args:
        module: the module to follow, on its device; its current state starts the average.
        decay: upper bound of the decay, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.average = {name: _as_average(value) for name, value in module.state_dict().items()}
        # Walking the state dict at every step takes milliseconds. The places are kept, not the tensors, which
        # an assignment to the module may replace.
        self._averaged, self._copied = [], []
        for name, average in self.average.items():
            owner, _, attribute = name.rpartition(".")
            place = (module.get_submodule(owner), attribute, average)
            (self._averaged if average.is_floating_point() else self._copied).append(place)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = [average for _, _, average in self._averaged]
        values = [getattr(owner, name).to(torch.float32) for owner, name, _ in self._averaged]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for owner, name, copy in self._copied:
            copy.copy_(getattr(owner, name))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module inside the block, and the trained weights back after it."""
        trained = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.module.load_state_dict(trained)

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
