"""Attention forward with an online softmax (arXiv 1805.02867; FlashAttention, arXiv 2205.14135).

A program holds a tile of queries and walks the keys. Per row it keeps the largest score so far, `top`, the
sum `total` of exp(score - top) and the sum `acc` of exp(score - top) v; when `top` grows, both sums shrink.
out = acc / total, lse = top + log(total).

Where queries and heads are too few to fill the GPU, the keys are split among programs: each writes its top,
total and acc, and `combine_kernel` adds them in the order of the keys.
"""

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, ceil_div, next_power_of_two
from ..common.rounding import rounded_to
from . import configs
from .problem import Problem, result_like, strides
from .tiles import INFINITY, inner, load_tile, masked, outer, scale_rows, store_tile, zeros


@triton.jit
def attend(
    q0,
    q1,
    q2,
    acc0,
    acc1,
    acc2,
    top,
    total,
    rows,
    start,
    queries,
    keys,
    k,
    v,
    stride_kn,
    stride_vn,
    mask,
    stride_mm,
    stride_mn,
    scale,
    unit,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One tile of keys from `start` on joins the sums."""
    columns = start + tl.arange(0, BLOCK_N)
    k0, k1, k2 = load_tile(k, columns, keys, stride_kn, D0, D1, D2, HEAD_DIM, EDGE)
    s = inner(q0, q1, q2, k0, k1, k2, D1, D2)
    s = masked(
        s, rows[:, None], columns[None, :], queries, keys, mask, stride_mm, stride_mn, scale,
        NEGATE, MASK, BIAS, CAUSAL, EDGE,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row without an open key so far has top = -inf, and -inf - -inf would be NaN.
    reference = tl.where(new_top == -INFINITY, 0.0, new_top)
    p = tl.exp2((s - reference[:, None]) * unit)
    shrink = tl.exp2((top - reference) * unit)
    total = total * shrink + tl.sum(p, 1)
    acc0, acc1, acc2 = scale_rows(shrink, acc0, acc1, acc2, D1, D2)
    v0, v1, v2 = load_tile(v, columns, keys, stride_vn, D0, D1, D2, HEAD_DIM, EDGE)
    acc0, acc1, acc2 = outer(rounded_to(p, v0.dtype), v0, v1, v2, acc0, acc1, acc2, D1, D2)
    return acc0, acc1, acc2, new_top, total


_INTEGERS = [
    *("heads", "queries", "keys", "tiles", "splits", "keys_per_split"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_vb", "stride_vh", "stride_vn", "stride_ob", "stride_oh", "stride_om"),
    *("stride_mb", "stride_mh", "stride_mm"),
]


@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    sums_ptr,
    statistics_ptr,
    scale,
    unit,
    heads,
    queries,
    keys,
    tiles,
    splits,
    keys_per_split,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: query tiles x splits x batch x heads. Tiles of a head, which read the same keys, are neighbours.

    SPLIT: writes sums (splits, B, H, Sq, D) and statistics (2, splits, B, H, Sq), top and total, all float32,
    in place of out and lse. Strides of q, k, v and out are in units of ALIGN elements.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    split = (program // tiles) % splits
    both = (program // tiles) // splits
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q0, q1, q2 = load_tile(q, rows, queries, stride_qm * ALIGN, D0, D1, D2, HEAD_DIM, True)
    acc0, acc1, acc2 = zeros(BLOCK_M, D0, D1, D2)
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    first, last = 0, keys
    if CAUSAL:
        last = tl.minimum(last, (tile + 1) * BLOCK_M)
    # Key tiles before `whole` are open to every row of this tile, as far as `keys` and the diagonal go.
    whole = last // BLOCK_N * BLOCK_N
    if CAUSAL:
        whole = tl.minimum(whole, (tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    if SPLIT:
        first = split * keys_per_split
        last = tl.minimum(last, first + keys_per_split)
        whole = tl.minimum(whole, last)
    for start in range(first, whole, BLOCK_N):
        acc0, acc1, acc2, top, total = attend(
            q0, q1, q2, acc0, acc1, acc2, top, total, rows, start, queries, keys,
            k, v, stride_kn * ALIGN, stride_vn * ALIGN, mask, stride_mm, stride_mn, scale, unit,
            BLOCK_N, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, False, False,
        )  # fmt: skip
    for start in tl.range(tl.maximum(first, whole), last, BLOCK_N, num_stages=1):
        acc0, acc1, acc2, top, total = attend(
            q0, q1, q2, acc0, acc1, acc2, top, total, rows, start, queries, keys,
            k, v, stride_kn * ALIGN, stride_vn * ALIGN, mask, stride_mm, stride_mn, scale, unit,
            BLOCK_N, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, CAUSAL, True,
        )  # fmt: skip

    inside = rows < queries
    if SPLIT:
        both_split = split.to(tl.int64) * (tl.num_programs(0) // (tiles * splits)) + both
        sums = sums_ptr + both_split * queries * HEAD_DIM
        store_tile(sums, acc0, acc1, acc2, rows, queries, HEAD_DIM, D0, D1, D2, HEAD_DIM)
        place = statistics_ptr + both_split * queries + rows
        tl.store(place, top, mask=inside)
        tl.store(place + (tl.num_programs(0) // tiles).to(tl.int64) * queries, total, mask=inside)
    else:
        acc0, acc1, acc2 = scale_rows(1.0 / tl.where(total == 0.0, 1.0, total), acc0, acc1, acc2, D1, D2)
        out = out_ptr + batch * stride_ob * ALIGN + head * stride_oh * ALIGN
        store_tile(out, acc0, acc1, acc2, rows, queries, stride_om * ALIGN, D0, D1, D2, HEAD_DIM)
        if WRITE_LSE:
            if not BIAS:
                top = top * scale
            lse = tl.where(total == 0.0, -INFINITY, top + tl.log(total))
            tl.store(lse_ptr + both.to(tl.int64) * queries + rows, lse, mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "tiles", "splits", "stride_ob", "stride_oh", "stride_om"])
def combine_kernel(
    sums_ptr,
    statistics_ptr,
    out_ptr,
    lse_ptr,
    scale,
    unit,
    heads,
    queries,
    tiles,
    splits,
    stride_ob,
    stride_oh,
    stride_om,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse from the sums and statistics of all splits. Grid: query tiles x batch x heads."""
    program = tl.program_id(0)
    both = (program // tiles).to(tl.int64)
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = rows < queries
    inside_2d = inside[:, None] & (columns < HEAD_DIM)[None, :]
    per_split = (tl.num_programs(0) // tiles).to(tl.int64) * queries
    places = both * queries + rows

    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    for split in range(splits):
        part = tl.load(statistics_ptr + split * per_split + places, mask=inside, other=0.0)
        top = tl.maximum(top, part)
    reference = tl.where(top == -INFINITY, 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        places_split = split * per_split + places
        part = tl.load(statistics_ptr + places_split, mask=inside, other=0.0)
        part_total = tl.load(statistics_ptr + splits * per_split + places_split, mask=inside, other=0.0)
        weight = tl.exp2((part - reference) * unit)
        total += weight * part_total
        offsets = places_split[:, None] * HEAD_DIM + columns[None, :]
        acc += weight[:, None] * tl.load(sums_ptr + offsets, mask=inside_2d, other=0.0)

    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out = out_ptr + both // heads * stride_ob + both % heads * stride_oh
    offsets = rows.to(tl.int64)[:, None] * stride_om + columns[None, :]
    tl.store(out + offsets, rounded_to(acc, out_ptr.dtype.element_ty), mask=inside_2d)
    if WRITE_LSE:
        if not BIAS:
            top = top * scale
        lse = tl.where(total == 0.0, -INFINITY, top + tl.log(total))
        tl.store(lse_ptr + places, lse, mask=inside)


def plan_long_forward(q, k, v, problem: Problem, need_lse: bool, target):
    """The launches, and out (of `result_like`) and lse (B, H, Sq) that they write; an empty lse if not
    needed."""
    config = configs.choose("forward", problem, target)
    splits = configs.splits(problem, target, config)
    batch, heads, queries, head_dim = q.shape
    out = result_like(q)
    lse = torch.empty((batch, heads, queries) if need_lse else (0,), dtype=torch.float32, device=q.device)
    sums = statistics = None
    if splits > 1:
        sums = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        statistics = torch.empty((2, splits, batch, heads, queries), dtype=torch.float32, device=q.device)
    tiles = ceil_div(queries, config.block_m)
    launches = [
        Launch(
            forward_kernel,
            (tiles * splits * batch * heads,),
            {
                "q_ptr": q,
                "k_ptr": k,
                "v_ptr": v,
                "out_ptr": out,
                "lse_ptr": lse,
                "sums_ptr": sums,
                "statistics_ptr": statistics,
                "scale": problem.size,
                "unit": problem.unit,
                "heads": heads,
                "queries": queries,
                "keys": problem.keys,
                "tiles": tiles,
                "splits": splits,
                "keys_per_split": ceil_div(ceil_div(problem.keys, splits), config.block_n) * config.block_n,
                **strides(qm=q, kn=k, vn=v, om=out),
                **problem.mask_arguments(),
                **problem.constants(),
                "SPLIT": splits > 1,
                "WRITE_LSE": need_lse,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            },
            config.num_warps,
            config.num_stages,
        )
    ]
    if splits > 1:
        block_d = next_power_of_two(head_dim)
        block_m = max(1, 2048 // block_d)
        tiles = ceil_div(queries, block_m)
        launches.append(
            Launch(
                combine_kernel,
                (tiles * batch * heads,),
                {
                    "sums_ptr": sums,
                    "statistics_ptr": statistics,
                    "out_ptr": out,
                    "lse_ptr": lse,
                    "scale": problem.size,
                    "unit": problem.unit,
                    "heads": heads,
                    "queries": queries,
                    "tiles": tiles,
                    "splits": splits,
                    "stride_ob": out.stride(0),
                    "stride_oh": out.stride(1),
                    "stride_om": out.stride(2),
                    "HEAD_DIM": head_dim,
                    "BIAS": problem.bias,
                    "WRITE_LSE": need_lse,
                    "BLOCK_M": block_m,
                    "BLOCK_D": block_d,
                },
                num_warps=4,
            )
        )
    return launches, out, lse
