"""Attention forward with a wide head; see wide.py."""

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, ceil_div
from ..common.rounding import rounded_to
from . import configs
from .problem import Problem, result_like, strides
from .tiles import INFINITY, dot, inner_chunks, load_piece, masked, store_piece
from .wide import constants_of, padded, parts, place_of

_INTEGERS = [
    *("heads", "queries", "keys", "first_query", "query_tiles", "key_tiles"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_mb", "stride_mh", "stride_mm"),
]


@triton.jit(do_not_specialize=_INTEGERS)
def weight_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    weights_ptr,
    statistics_ptr,
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
    """weights (B, H, rows, columns) of the queries from `first_query` on, statistics (2, B, H, key tiles,
    rows): top and total of a row in a tile. Grid: key tiles x query tiles x batch x heads."""
    key_tile, query_tile, both, batch, head = place_of(tl.program_id(0), key_tiles, query_tiles, heads)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh
    own = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_query + own
    columns = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    s = inner_chunks(
        q, rows, queries, stride_qm * ALIGN, k, columns, keys, stride_kn * ALIGN,
        BLOCK_M, BLOCK_N, HEAD_DIM, CHUNK,
    )  # fmt: skip
    s = masked(
        s, rows[:, None], columns[None, :], queries, keys, mask, stride_mm, stride_mn, scale,
        NEGATE, MASK, BIAS, CAUSAL, True,
    )  # fmt: skip
    top = tl.max(s, 1)
    p = tl.exp2((s - tl.where(top == -INFINITY, 0.0, top)[:, None]) * unit)

    width = query_tiles * BLOCK_M
    pitch = key_tiles * BLOCK_N
    weights = weights_ptr + both.to(tl.int64) * width * pitch
    places = weights + own.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(places, rounded_to(p, weights_ptr.dtype.element_ty))
    place = statistics_ptr + (both.to(tl.int64) * key_tiles + key_tile) * width + own
    tl.store(place, top)
    tl.store(place + tl.num_programs(0).to(tl.int64) * BLOCK_M, tl.sum(p, 1))


@triton.jit(
    do_not_specialize=[
        *("heads", "queries", "keys", "first_query", "rows", "key_tiles", "tiles"),
        *("stride_vb", "stride_vh", "stride_vn", "stride_ob", "stride_oh", "stride_om"),
    ]
)
def value_kernel(
    weights_ptr,
    statistics_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale,
    unit,
    heads,
    queries,
    keys,
    first_query,
    rows,
    key_tiles,
    tiles,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    KEYS_PER_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse from the weights and statistics of `weight_kernel`, for `rows` queries.

    Grid: parts of the head dim x query tiles x batch x heads. A step of BLOCK_N keys lies in one of the tiles
    of KEYS_PER_TILE keys that the statistics speak of.
    """
    program = tl.program_id(0)
    part = program % (HEAD_DIM // BLOCK_D)
    tile = program // (HEAD_DIM // BLOCK_D) % tiles
    both = (program // (HEAD_DIM // BLOCK_D) // tiles).to(tl.int64)
    batch, head = both // heads, both % heads
    per_kind = (tl.num_programs(0) // (HEAD_DIM // BLOCK_D) // tiles).to(tl.int64) * key_tiles * rows
    own = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    statistics = statistics_ptr + both * key_tiles * rows + own

    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    for key_tile in range(key_tiles):
        top = tl.maximum(top, tl.load(statistics + key_tile * rows))
    reference = tl.where(top == -INFINITY, 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    for key_tile in range(key_tiles):
        place = statistics + key_tile * rows
        total += tl.load(place + per_kind) * tl.exp2((tl.load(place) - reference) * unit)

    pitch = key_tiles * KEYS_PER_TILE
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN + part * BLOCK_D
    weights = weights_ptr + (both * rows + own)[:, None] * pitch + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        factor = tl.exp2((tl.load(statistics + start // KEYS_PER_TILE * rows) - reference) * unit)
        p = tl.load(weights + start).to(tl.float32) * factor[:, None]
        columns = start + tl.arange(0, BLOCK_N)
        tile_v = load_piece(v, columns, keys, stride_vn * ALIGN, 0, BLOCK_D, HEAD_DIM, True)
        acc = dot(rounded_to(p, v_ptr.dtype.element_ty), tile_v, acc)
    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]

    queries_here = first_query + own
    out = out_ptr + batch * stride_ob * ALIGN + head * stride_oh * ALIGN + part * BLOCK_D
    store_piece(out, acc, queries_here, queries, stride_om * ALIGN, 0, BLOCK_D, HEAD_DIM)
    if WRITE_LSE and part == 0:
        if not BIAS:
            top = top * scale
        lse = tl.where(total == 0.0, -INFINITY, top + tl.log(total))
        tl.store(lse_ptr + both * queries + queries_here, lse, mask=queries_here < queries)


def plan_wide_forward(q, k, v, problem: Problem, need_lse: bool, target):
    """As `plan_forward`."""
    tile = configs.choose("wide-weights", problem, target)
    product = configs.choose("wide-values", problem, target)
    both = problem.batch * problem.heads
    out = result_like(q)
    lse = torch.empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32, device=q.device)
    pitch = padded(problem.keys)
    portions = parts(problem, 1, q.element_size())
    rows = padded(portions[0][1])
    weights = torch.empty((both, rows, pitch), dtype=q.dtype, device=q.device)
    key_tiles = pitch // tile.block_n
    statistics = torch.empty((2, both, key_tiles, rows), dtype=torch.float32, device=q.device)
    launches = []
    for first, count in portions:
        rows = padded(count)
        arguments = {
            "q_ptr": q,
            "k_ptr": k,
            "weights_ptr": weights,
            "statistics_ptr": statistics,
            "scale": problem.size,
            "unit": problem.unit,
            "heads": problem.heads,
            "queries": problem.queries,
            "keys": problem.keys,
            "first_query": first,
            "query_tiles": rows // tile.block_m,
            "key_tiles": key_tiles,
            **strides(qm=q, kn=k),
            **problem.mask_arguments(),
            **constants_of(problem),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "CHUNK": tile.block_d,
        }
        grid = (key_tiles * (rows // tile.block_m) * both,)
        launches.append(Launch(weight_kernel, grid, arguments, tile.num_warps, tile.num_stages))
        tiles = ceil_div(count, product.block_m)
        arguments = {
            "weights_ptr": weights,
            "statistics_ptr": statistics,
            "v_ptr": v,
            "out_ptr": out,
            "lse_ptr": lse,
            "scale": problem.size,
            "unit": problem.unit,
            "heads": problem.heads,
            "queries": problem.queries,
            "keys": problem.keys,
            "first_query": first,
            "rows": rows,
            "key_tiles": key_tiles,
            "tiles": tiles,
            **strides(vn=v, om=out),
            "HEAD_DIM": problem.head_dim,
            "BIAS": problem.bias,
            "WRITE_LSE": need_lse,
            "KEYS_PER_TILE": tile.block_n,
            "BLOCK_M": product.block_m,
            "BLOCK_N": min(product.block_n, tile.block_n),
            "BLOCK_D": product.block_d,
        }
        grid = (problem.head_dim // product.block_d * tiles * both,)
        launches.append(Launch(value_kernel, grid, arguments, product.num_warps, product.num_stages))
    return launches, out, lse
