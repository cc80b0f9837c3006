"""What a backend hands to the dispatcher, the layout rule that all keep, and what several do to arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _no_objection(*args) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One operation on one backend.

    `forward`, `supports` and `slower` take the arguments of the operation, the others those of its backward
    operation (schemas: `fastldm/ops`). The `supports` functions return None, or in one line why not; they
    look at metadata only. The `slower` functions say in one line why "auto" had better pass this backend by,
    from what was measured (benchmarks/results); asked for by name it still runs.

    `composite`, which only PyTorch's own backend can have, is the forward in operations that PyTorch
    differentiates itself. It returns None except for tensors so small that an autograd function in Python
    around a kernel costs more than the computing.
    """

    forward: Callable
    backward: Callable | None = None
    supports: Callable[..., str | None] = _no_objection
    supports_backward: Callable[..., str | None] = _no_objection
    slower: Callable[..., str | None] = _no_objection
    slower_backward: Callable[..., str | None] = _no_objection
    composite: Callable[..., Tensor | None] = _no_objection


def in_layout_of(result: Tensor, like: Tensor) -> Tensor:
    """`result`, of the shape of `like`, with the strides of `torch.empty_like(like)`; copies only if it
    must."""
    if result.stride() == like.stride() and like.is_contiguous():
        return result
    wanted = torch.empty_like(like, dtype=result.dtype)
    strides = list(zip(result.shape, result.stride(), wanted.stride()))
    if all(have == want for _, have, want in strides):
        return result
    if all(size == 1 or have == want for size, have, want in strides):
        # Only dimensions of size 1 differ: the memory is already right.
        return result.as_strided(wanted.shape, wanted.stride())
    return wanted.copy_(result)


def readable_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An attention mask in a dtype that compiled kernels read: bool, float32 or `dtype`, that of the queries;
    any other in float32, of size 1 along dimensions in which it repeats."""
    if mask is None or mask.dtype in (torch.bool, torch.float32, dtype):
        return mask
    # A mask of keys may be expanded to all scores, which would be gigabytes.
    return mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())].float()
