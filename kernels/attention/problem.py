"""A call of attention as the kernels see it: sizes, pieces of the head dim, strides, kind of mask."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_IN_32_BITS = 2**31 - 1
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def pieces(size: int) -> tuple[int, int, int]:
    """At most three powers of two >= 16, descending, 0 for none, whose sum covers `size` tightly.

    40 = 32 + 16, 80 = 64 + 16, 104 = 64 + 32 + 16; what would take four pieces is rounded up.
    """
    rest = -(-size // 16)
    if rest.bit_count() > 3:
        return pieces(16 << rest.bit_length())
    found = [16 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return (*found, 0, 0)[:3]


class Problem(NamedTuple):
    """The facts behind one call. `mask` is None or 4-D, bool or float, in a dtype that a kernel reads."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    mask: Tensor | None
    is_causal: bool
    scale: float

    @property
    def mask_kind(self) -> str:
        """ "none", "keys" (the same for all queries) or "full"."""
        if self.mask is None:
            return "none"
        return "keys" if self.mask.shape[2] == 1 or self.mask.stride(2) == 0 else "full"

    @property
    def bias(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point()

    @property
    def size(self) -> float:
        """|scale|, kept off 0: kernels divide by it. What 1e-30 times a score adds to it is nothing."""
        return max(abs(self.scale), 1e-30)

    @property
    def unit(self) -> float:
        """See tiles.py."""
        return (1.0 if self.bias else self.size) * math.log2(math.e)

    def constants(self) -> dict:
        """The compile-time facts that all kernels take."""
        d0, d1, d2 = pieces(self.head_dim)
        return {
            "NEGATE": self.scale < 0.0,
            "HEAD_DIM": self.head_dim,
            "D0": d0,
            "D1": d1,
            "D2": d2,
            "MASK": self.mask_kind,
            "BIAS": self.bias,
            "CAUSAL": self.is_causal,
        }

    def mask_arguments(self) -> dict:
        """`mask_ptr` and its strides, 0 where it is broadcast."""
        names = ("stride_mb", "stride_mh", "stride_mm", "stride_mn")
        if self.mask is None:
            return {"mask_ptr": None, **dict.fromkeys(names, 0)}
        strides = (0 if n == 1 else stride for n, stride in zip(self.mask.shape, self.mask.stride()))
        return {"mask_ptr": self.mask, **dict(zip(names, strides))}


def problem_of(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Problem:
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, *_DTYPES):
        # float64, or 8 bits, which not every GPU can read. One that is expanded is not written out.
        repeated = tuple(slice(1) if stride == 0 else slice(None) for stride in attn_mask.stride())
        attn_mask = attn_mask[repeated].float()
    return Problem(
        *q.shape[:3],
        keys=k.shape[2],
        head_dim=q.shape[3],
        dtype=_DTYPES[q.dtype],
        mask=attn_mask,
        is_causal=is_causal,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
    )


def dense_last(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def result_like(x: Tensor) -> Tensor:
    """An empty tensor of the layout of `x`, or where the last dimension would not be dense, contiguous."""
    result = torch.empty_like(x)
    return result if result.stride(3) == 1 else x.new_empty(x.shape)


def strides(**tensors: Tensor) -> dict:
    """Strides of (B, H, S, D) tensors for a kernel, `stride_<letter><dimension>`, in units of ALIGN elements.

    ALIGN is the most that divides all of them, up to 16 bytes: a factor that is a constant in the kernel
    tells the compiler that it may load vectors, which the bare strides of 40 or 72 would not.
    """
    found = {
        f"stride_{name[0]}{dimension}": 0 if size == 1 else stride
        for name, x in tensors.items()
        for dimension, size, stride in zip(("b", "h", name[1:]), x.shape, x.stride())
    }
    align = math.gcd(16 // next(iter(tensors.values())).element_size(), *found.values())
    if any(x.stride(2) > _MOST_IN_32_BITS for x in tensors.values()):
        align = 1  # kernels multiply the stride of a row by ALIGN in the bits that it comes in
    return {"ALIGN": align, **{name: stride // align for name, stride in found.items()}}
