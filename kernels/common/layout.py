"""Layouts of results, and the two dense ones in which group norm kernels read an (N, C, *spatial) tensor.

(batch, channels, pixels) and (batch, pixels, channels), with the pixels in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_layout(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy of it, in one of the two layouts, and whether that is the one with the channels last.

    The kernels trust what this says. What is in neither is copied into the nearer one.
    """
    if x.is_contiguous():
        return x, False
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    channels_last = _innermost_is_channels(x)
    # Pixels in any order, as long as they are dense: sorted by stride, they have to be contiguous.
    order = sorted(range(2, x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    order = (0, *order, 1) if channels_last else (0, 1, *order)
    if x.permute(order).is_contiguous():
        return x, channels_last
    if channels_last:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    return x.contiguous(), False


def _innermost_is_channels(x: Tensor) -> bool:
    return x.shape[1] > 1 and all(
        x.stride(1) <= x.stride(dim) for dim in range(2, x.dim()) if x.shape[dim] > 1
    )


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, of the shape of `like`, with the strides of `torch.empty_like(like)`; copies if it must.

    One of the two has to be dense.
    """
    if tensor.stride() == like.stride():
        return tensor
    wanted = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == wanted.stride() else wanted.copy_(tensor)
