"""The rows of a tensor (..., D) as kernels address them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Row r of `tensor` begins `r // inner * stride_outer + r % inner * stride_inner` elements after its
    data.

    So the NHWC view of a contiguous NCHW tensor needs no copy.
    """

    tensor: Tensor
    count: int
    dim: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_dim: int

    def arguments(self) -> dict[str, int | Tensor]:
        """As the kernels name them."""
        return {
            "z_ptr": self.tensor,
            "num_rows": self.count,
            "inner": self.inner,
            "stride_outer": self.stride_outer,
            "stride_inner": self.stride_inner,
            "stride_d": self.stride_dim,
        }


def rows_of(z: Tensor) -> Rows:
    """The rows of z (..., D); a copy of z where its leading dimensions do not merge into two."""
    merged = _merge_leading(z)
    if len(merged) > 2:
        z = z.contiguous()
        merged = _merge_leading(z)
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(merged)) + merged
    return Rows(z, outer * inner, z.shape[-1], inner, stride_outer, stride_inner, z.stride(-1))


def _merge_leading(z: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, neighbours merged into one where a single stride does for
    both."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(z.shape[:-1], z.stride()):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged
