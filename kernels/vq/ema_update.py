"""vq_ema_update: counts and sums per code, in a fixed order. Contract: fastldm/ops/vq.py.

The rows are sorted by code, equal ones in their order. The segment of a code is cut into units of `unit`
rows from its beginning. One program for each code adds its first unit, and one for each multiple q >= 1
of `unit` adds the later unit that begins among the sorted rows q unit .. (q + 1) unit - 1; there is no
more than one, as a code has at most one beginning in so many rows, and another code's later unit begins
`unit` rows after that code. So no program adds more than `unit` rows, however they fall on the codes.
Later units of a code have places that follow one another, and a last kernel adds them up in that order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, ceil_div
from ..common.rows import Rows, rows_of
from ..common.support import refuse
from ..common.target import Target, target_of
from . import configs


def supports(z: Tensor, indices: Tensor, num_codes: int) -> str | None:
    return refuse(z)


def forward(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    flat = indices.reshape(-1)
    ordered, order = torch.sort(flat.int() if num_codes < 1 << 31 else flat, stable=True)
    codes = torch.arange(num_codes + 1, dtype=ordered.dtype, device=z.device)
    starts = torch.searchsorted(ordered, codes)
    launches, sums = plan_sums(rows_of(z), ordered, order, starts, target_of(z.device))
    for launch in launches:
        launch.run()
    return starts.diff(), sums


def plan_sums(
    rows: Rows, ordered: Tensor, order: Tensor, starts: Tensor, target: Target
) -> tuple[list[Launch], Tensor]:
    """The launches, and sums (K, D) that they write.

    `order`, the rows sorted by code; `ordered`, their codes; `starts` (K + 1), where the segment of each code
    begins. Rows before the first segment and after the last have indices that are no codes.
    """
    num_codes = starts.shape[0] - 1
    config = configs.ema_update(rows.dim, num_codes, rows.count, target)
    later_units = ceil_div(rows.count, config.unit)
    dim_blocks = ceil_div(rows.dim, config.block_d)
    sums = rows.tensor.new_empty((num_codes, rows.dim), dtype=torch.float32)
    partials = sums.new_empty((later_units, rows.dim))
    shared = {
        "starts_ptr": starts,
        "sums_ptr": sums,
        "partials_ptr": partials,
        "num_codes": num_codes,
        "dim": rows.dim,
        "UNIT": config.unit,
        "BLOCK_R": config.block_r,
        "BLOCK_D": config.block_d,
    }
    add_units = Launch(
        sum_units,
        (num_codes + later_units - 1, dim_blocks),
        {**rows.arguments(), "ordered_ptr": ordered, "order_ptr": order, **shared},
        num_warps=config.num_warps,
    )
    if later_units == 1:
        return [add_units], sums
    add_partials = Launch(sum_partials, (num_codes, dim_blocks), shared, num_warps=config.num_warps)
    return [add_units, add_partials], sums


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes"])
def sum_units(
    z_ptr,
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    ordered_ptr,
    order_ptr,
    starts_ptr,
    sums_ptr,
    partials_ptr,
    num_codes,
    dim,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program k < K: the first unit of code k to sums. Program K + q - 1: the later unit of place q to
    partials."""
    pid = tl.program_id(0)
    if pid < num_codes:
        begin = tl.load(starts_ptr + pid)
        end = tl.load(starts_ptr + pid + 1)
        to = sums_ptr + pid.to(tl.int64) * dim
        wanted = True
    else:
        place = (pid - num_codes + 1).to(tl.int64)
        at = place * UNIT
        code = tl.load(ordered_ptr + at)
        is_code = (code >= 0) & (code < num_codes)
        code = tl.where(is_code, code, 0)
        first = tl.load(starts_ptr + code)
        end = tl.load(starts_ptr + code + 1)
        begin = at + (UNIT - (at - first) % UNIT) % UNIT
        to = partials_ptr + place * dim
        wanted = is_code & (first < at) & (begin < end)
    if wanted:
        end = tl.minimum(end, begin + UNIT)
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for position in range(begin, end, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            row = tl.load(order_ptr + at, mask=at < end, other=0)
            start = (row // inner) * stride_outer + (row % inner) * stride_inner
            mask = (at < end)[:, None] & (d < dim)[None, :]
            total += tl.load(z_ptr + start[:, None] + d[None, :] * stride_d, mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(to + d, tl.sum(total, axis=0), mask=d < dim)


@triton.jit(do_not_specialize=["num_codes"])
def sum_partials(
    starts_ptr,
    sums_ptr,
    partials_ptr,
    num_codes,
    dim,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the later units of code k to sums."""
    code = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts_ptr + code)
    count = tl.load(starts_ptr + code + 1) - begin
    later = (count + UNIT - 1) // UNIT - 1
    if later > 0:
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        first = begin // UNIT + 1
        for unit in range(0, later, BLOCK_R):
            at = unit + tl.arange(0, BLOCK_R)
            mask = (at < later)[:, None] & (d < dim)[None, :]
            total += tl.load(partials_ptr + (first + at)[:, None] * dim + d[None, :], mask=mask, other=0.0)
        to = sums_ptr + code * dim + d
        tl.store(to, tl.load(to, mask=d < dim, other=0.0) + tl.sum(total, axis=0), mask=d < dim)
