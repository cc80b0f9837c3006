"""Memory that starts as NaN, so that an element that a kernel does not write fails the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _poison(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor:  # a fake tensor has no memory
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)


def _poisoning(allocate: Callable) -> Callable:
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(tensor) if caller.startswith("fastldm.") and caller != __name__ else tensor

    return poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what fastldm's own code gets from torch.empty, torch.empty_like and Tensor.new_empty with NaN.

    Integers start as the lowest one of their dtype. Memory that PyTorch or a kernel takes by itself is not
    reached.
    """
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    torch.empty, torch.empty_like, Tensor.new_empty = map(_poisoning, (empty, empty_like, new_empty))
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty
