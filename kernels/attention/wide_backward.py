"""Attention backward with a wide head; see wide.py."""

import torch
import triton
import triton.language as tl

from ..common.launch import Launch
from ..common.rounding import rounded_to
from . import configs
from .backward import score_gradients
from .problem import Problem, result_like, strides
from .statistics import load_statistics, plan_statistics
from .tiles import dot, inner_chunks, load_piece, masked, store_piece
from .wide import constants_of, padded, parts, place_of

_INTEGERS = [
    *("heads", "queries", "keys", "first_query", "query_tiles", "key_tiles"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_mb", "stride_mh", "stride_mm"),
]


@triton.jit(
    do_not_specialize=[
        *_INTEGERS,
        *("stride_vb", "stride_vh", "stride_vn", "stride_gb", "stride_gh", "stride_gm"),
    ]
)
def weight_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,
    statistics_ptr,
    weights_ptr,
    scale,
    unit,
    heads,
    queries,
    keys,
    first_query,
    query_tiles,
    key_tiles,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """P and dS, weights (2, B, H, rows, columns), of the queries from `first_query` on, 0 past the ends.

    `statistics` as `statistics_kernel` writes them. Grid: key tiles x query tiles x batch x heads.
    """
    key_tile, query_tile, both, batch, head = place_of(tl.program_id(0), key_tiles, query_tiles, heads)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    g = g_ptr + batch * stride_gb * ALIGN + head * stride_gh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh
    own = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_query + own
    columns = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    all_heads = (tl.num_programs(0) // (key_tiles * query_tiles)).to(tl.int64)
    statistics = statistics_ptr + both.to(tl.int64) * queries
    reference, factor, delta = load_statistics(statistics, all_heads * queries, rows, queries)

    s = inner_chunks(
        q, rows, queries, stride_qm * ALIGN, k, columns, keys, stride_kn * ALIGN,
        BLOCK_M, BLOCK_N, HEAD_DIM, CHUNK,
    )  # fmt: skip
    s = masked(
        s, rows[:, None], columns[None, :], queries, keys, mask, stride_mm, stride_mn, scale,
        NEGATE, MASK, BIAS, CAUSAL, True,
    )  # fmt: skip
    p = tl.exp2((s - reference[:, None]) * unit) * factor[:, None]
    width = query_tiles * BLOCK_M
    pitch = key_tiles * BLOCK_N
    weights = weights_ptr + both.to(tl.int64) * width * pitch
    places = weights + own.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(places, rounded_to(p, weights_ptr.dtype.element_ty))
    dp = inner_chunks(
        g, rows, queries, stride_gm * ALIGN, v, columns, keys, stride_vn * ALIGN,
        BLOCK_M, BLOCK_N, HEAD_DIM, CHUNK,
    )  # fmt: skip
    ds = score_gradients(p, dp, delta[:, None], MASK, CAUSAL)
    tl.store(places + all_heads * width * pitch, rounded_to(ds, weights_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        *("heads", "tiles", "count", "terms", "first_row", "first_term", "width", "pitch"),
        *("stride_xb", "stride_xh", "stride_xn", "stride_yb", "stride_yh", "stride_ym"),
    ]
)
def product_kernel(
    weights_ptr,
    x_ptr,
    y_ptr,
    sums_ptr,
    factor,
    heads,
    tiles,
    count,
    terms,
    first_row,
    first_term,
    width,
    pitch,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_yb,
    stride_yh,
    stride_ym,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = factor * w x, with w the weights (B, H, width, pitch) or their transpose.

    Row i of the product is row first_row + i of y, which has `count`; its term j is row first_term + j of x,
    which has `terms` up to where the weights end. Unless FIRST and LAST, `sums` (B, H, rows, D) in float32
    carries the product from launch to launch. Grid: parts of the head dim x tiles x batch x heads.
    """
    program = tl.program_id(0)
    part = program % (HEAD_DIM // BLOCK_D)
    tile = program // (HEAD_DIM // BLOCK_D) % tiles
    both = (program // (HEAD_DIM // BLOCK_D) // tiles).to(tl.int64)
    batch, head = both // heads, both % heads
    own = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_N)
    weights = weights_ptr + both * width * pitch
    x = x_ptr + batch * stride_xb * ALIGN + head * stride_xh * ALIGN + part * BLOCK_D
    sums = sums_ptr
    if not (FIRST and LAST):
        columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
        places = (both * (tiles * BLOCK_M) + own)[:, None] * HEAD_DIM + columns[None, :]
    if FIRST:  # noqa: SIM108
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        acc = tl.load(sums + places)
    for start in range(0, tl.minimum(terms - first_term, width if TRANSPOSED else pitch), BLOCK_N):
        if TRANSPOSED:
            w = tl.load(weights + (start + offsets).to(tl.int64)[:, None] * pitch + own[None, :])
            w = tl.trans(w)
        else:
            w = tl.load(weights + own.to(tl.int64)[:, None] * pitch + (start + offsets)[None, :])
        tile_x = load_piece(
            x, first_term + start + offsets, terms, stride_xn * ALIGN, 0, BLOCK_D, HEAD_DIM, True
        )
        acc = dot(w, tile_x, acc)
    if LAST:
        y = y_ptr + batch * stride_yb * ALIGN + head * stride_yh * ALIGN + part * BLOCK_D
        store_piece(y, acc * factor, first_row + own, count, stride_ym * ALIGN, 0, BLOCK_D, HEAD_DIM)
    else:
        tl.store(sums + places, acc)


def plan_wide_backward(grad_out, q, k, v, out, lse, problem: Problem, target):
    """As `plan_backward`."""
    tile = configs.choose("wide-gradients", problem, target)
    both = problem.batch * problem.heads
    results = dq, dk, dv = result_like(q), result_like(k), result_like(v)
    launch, statistics = plan_statistics(grad_out, q, k, v, out, lse, problem, target)
    launches = [launch]
    pitch = padded(problem.keys)
    portions = parts(problem, 2, q.element_size())
    most = padded(portions[0][1])
    weights = torch.empty(2 * both * most * pitch, dtype=q.dtype, device=q.device)
    sums = (None, None)
    if len(portions) > 1:
        sums = torch.empty((2, both, pitch, problem.head_dim), dtype=torch.float32, device=q.device)
    for i, (first, count) in enumerate(portions):
        rows = padded(count)
        arguments = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "g_ptr": grad_out,
            "statistics_ptr": statistics,
            "weights_ptr": weights,
            "scale": problem.size,
            "unit": problem.unit,
            "heads": problem.heads,
            "queries": problem.queries,
            "keys": problem.keys,
            "first_query": first,
            "query_tiles": rows // tile.block_m,
            "key_tiles": pitch // tile.block_n,
            **strides(qm=q, kn=k, vn=v, gm=grad_out),
            **problem.mask_arguments(),
            **constants_of(problem),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "CHUNK": tile.block_d,
        }
        grid = (pitch // tile.block_n * (rows // tile.block_m) * both,)
        launches.append(Launch(weight_gradient_kernel, grid, arguments, tile.num_warps, tile.num_stages))
        p, ds = weights[: both * rows * pitch], weights[both * rows * pitch :]
        ends = {"FIRST": i == 0, "LAST": i == len(portions) - 1}
        alone = {"FIRST": True, "LAST": True}
        for w, x, y, carried, factor, number, of_x, first_row, first_term, transposed, place in (
            (p, grad_out, dv, sums[0], 1.0, problem.keys, problem.queries, 0, first, True, ends),
            (ds, q, dk, sums[1], problem.scale, problem.keys, problem.queries, 0, first, True, ends),
            (ds, k, dq, None, problem.scale, problem.queries, problem.keys, first, 0, False, alone),
        ):
            config = configs.choose("wide-transposed" if transposed else "wide-product", problem, target)
            tiles = (pitch if transposed else rows) // config.block_m
            arguments = {
                "weights_ptr": w,
                "x_ptr": x,
                "y_ptr": y,
                "sums_ptr": carried,
                "factor": factor,
                "heads": problem.heads,
                "tiles": tiles,
                "count": number,
                "terms": of_x,
                "first_row": first_row,
                "first_term": first_term,
                "width": rows,
                "pitch": pitch,
                **strides(xn=x, ym=y),
                "HEAD_DIM": problem.head_dim,
                "TRANSPOSED": transposed,
                **place,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_D": config.block_d,
            }
            grid = (problem.head_dim // config.block_d * tiles * both,)
            launches.append(Launch(product_kernel, grid, arguments, config.num_warps, config.num_stages))
    return launches, results
