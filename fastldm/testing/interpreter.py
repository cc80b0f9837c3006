"""What Triton's interpreter can show of a launch beside its results, by replacing parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime.interpreter import InterpreterBuilder

from fastldm.kernels.common.launch import Launch


@contextmanager
def programs_from_the_last() -> Iterator[None]:
    """The programs of a grid run from the last to the first: what depends on the order, as where two of them
    write to one place, comes out differently."""
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def reversed_grid_idx(self, *place):
        set_grid_idx(self, *(size - 1 - i for size, i in zip(self.grid_dim, place)))

    InterpreterBuilder.set_grid_idx = reversed_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_grid_idx


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def checked_accesses() -> Iterator[None]:
    """AssertionError where a launch reads or writes outside of the tensors among its arguments."""
    launch = Launch._launch
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    extents: list[tuple[int, int]] = []

    def watched_launch(self):
        tensors = (a for a in self.arguments.values() if isinstance(a, torch.Tensor) and a.numel())
        extents[:] = map(_extent, tensors)
        launch(self)

    def check(pointers, mask):
        places = pointers.data[mask.data.astype(bool)]
        outside = ~sum((places >= first) & (places < end) for first, end in extents).astype(bool)
        assert not outside.any(), f"{outside.sum()} of {outside.size} accesses are outside of every tensor"

    def checked_load(self, pointers, mask, *arguments):
        check(pointers, mask)
        return load(self, pointers, mask, *arguments)

    def checked_store(self, pointers, value, mask, *arguments):
        check(pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    Launch._launch = watched_launch
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield
    finally:
        Launch._launch = launch
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
