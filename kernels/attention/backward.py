"""Attention backward without atomics (FlashAttention-2, arXiv 2307.08691, algorithm 2, dQ in its own pass).

With P = softmax(scores) and g the gradient of out:
    dv = P^T g,   dP = g v^T,   dS = P * (dP - delta),   dq = scale * dS k,   dk = scale * dS^T q
`statistics_kernel` finds per query what P and dS take: P = exp(score - reference) * factor,
delta = sum(P * dP) = sum(g * out). Then `key_kernel` walks the queries for a tile of keys and `query_kernel`
the keys for a tile of queries; both compute the scores again. Every sum has a fixed order.
"""

import triton
import triton.language as tl

from ..common.launch import Launch, ceil_div
from ..common.rounding import rounded_to
from . import configs
from .problem import Problem, result_like, strides
from .statistics import LARGE, load_statistics, plan_statistics
from .tiles import (
    INFINITY,
    inner,
    load_tile,
    masked,
    outer,
    scale_rows,
    store_tile,
    zeros,
)

_INTEGERS = [
    *("heads", "queries", "keys", "tiles"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_vb", "stride_vh", "stride_vn", "stride_gb", "stride_gh", "stride_gm"),
    *("stride_mb", "stride_mh", "stride_mm"),
]


@triton.jit
def score_gradients(p, dp, delta, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """dS. What stands where a key is closed may have made dP infinite."""
    ds = p * (dp - delta)
    if MASK != "none" or CAUSAL:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def add_queries(
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    dk0,
    dk1,
    dk2,
    dv0,
    dv1,
    dv2,
    columns,
    start,
    queries,
    keys,
    q,
    g,
    stride_qm,
    stride_gm,
    statistics,
    per_kind,
    mask,
    stride_mm,
    stride_mn,
    scale,
    unit,
    BLOCK_M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
):
    """What a tile of queries from `start` on gives to dk and dv; scores are transposed, [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    q0, q1, q2 = load_tile(q, rows, queries, stride_qm, D0, D1, D2, HEAD_DIM, True)
    g0, g1, g2 = load_tile(g, rows, queries, stride_gm, D0, D1, D2, HEAD_DIM, True)
    reference, factor, delta = load_statistics(statistics, per_kind, rows, queries)
    s = masked(
        inner(k0, k1, k2, q0, q1, q2, D1, D2), rows[None, :], columns[:, None], queries, keys, mask,
        stride_mm, stride_mn, scale, NEGATE, MASK, BIAS, CAUSAL, False,
    )  # fmt: skip
    p = tl.exp2((s - reference[None, :]) * unit) * factor[None, :]
    if WANT_V:
        dv0, dv1, dv2 = outer(rounded_to(p, g0.dtype), g0, g1, g2, dv0, dv1, dv2, D1, D2)
    if WANT_K:
        dp = inner(v0, v1, v2, g0, g1, g2, D1, D2)
        ds = score_gradients(p, dp, delta[None, :], MASK, CAUSAL)
        dk0, dk1, dk2 = outer(rounded_to(ds, q0.dtype), q0, q1, q2, dk0, dk1, dk2, D1, D2)
    return dk0, dk1, dk2, dv0, dv1, dv2


@triton.jit(
    do_not_specialize=[
        *_INTEGERS,
        *("stride_yb", "stride_yh", "stride_yn", "stride_zb", "stride_zh", "stride_zn"),
    ]
)
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,
    statistics_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    unit,
    grad_scale,
    heads,
    queries,
    keys,
    tiles,
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
    stride_yb,
    stride_yh,
    stride_yn,
    stride_zb,
    stride_zh,
    stride_zn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk (strides y), dv (strides z) or both. Grid: key tiles x batch x heads."""
    program = tl.program_id(0)
    tile = program % tiles
    both = program // tiles
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    g = g_ptr + batch * stride_gb * ALIGN + head * stride_gh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh
    statistics = statistics_ptr + both.to(tl.int64) * queries
    per_kind = (tl.num_programs(0) // tiles).to(tl.int64) * queries

    own = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k0, k1, k2 = load_tile(k, own, keys, stride_kn * ALIGN, D0, D1, D2, HEAD_DIM, True)
    v0, v1, v2 = k0, k1, k2
    if WANT_K:
        v0, v1, v2 = load_tile(v, own, keys, stride_vn * ALIGN, D0, D1, D2, HEAD_DIM, True)
    dk0, dk1, dk2 = zeros(BLOCK_N, D0, D1, D2)
    dv0, dv1, dv2 = zeros(BLOCK_N, D0, D1, D2)
    # Rows past the last key take its mask and are not stored.
    columns = tl.minimum(own, keys - 1)

    first = 0
    if CAUSAL:
        # Earlier queries see no key of this tile, those from `first` on all of them.
        diagonal = tile * BLOCK_N // BLOCK_M * BLOCK_M
        first = tl.minimum(
            tl.cdiv((tile + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, tl.cdiv(queries, BLOCK_M) * BLOCK_M
        )
        for start in tl.range(diagonal, first, BLOCK_M, num_stages=1):
            dk0, dk1, dk2, dv0, dv1, dv2 = add_queries(
                k0, k1, k2, v0, v1, v2, dk0, dk1, dk2, dv0, dv1, dv2, columns, start, queries, keys,
                q, g, stride_qm * ALIGN, stride_gm * ALIGN, statistics, per_kind, mask, stride_mm, stride_mn,
                scale, unit, BLOCK_M, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, True, WANT_K, WANT_V,
            )  # fmt: skip
    for start in range(first, queries, BLOCK_M):
        dk0, dk1, dk2, dv0, dv1, dv2 = add_queries(
            k0, k1, k2, v0, v1, v2, dk0, dk1, dk2, dv0, dv1, dv2, columns, start, queries, keys,
            q, g, stride_qm * ALIGN, stride_gm * ALIGN, statistics, per_kind, mask, stride_mm, stride_mn,
            scale, unit, BLOCK_M, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, False, WANT_K, WANT_V,
        )  # fmt: skip

    if WANT_K:
        factor = tl.zeros([BLOCK_N], tl.float32) + grad_scale
        dk0, dk1, dk2 = scale_rows(factor, dk0, dk1, dk2, D1, D2)
        dk = dk_ptr + batch * stride_yb * ALIGN + head * stride_yh * ALIGN
        store_tile(dk, dk0, dk1, dk2, own, keys, stride_yn * ALIGN, D0, D1, D2, HEAD_DIM)
    if WANT_V:
        dv = dv_ptr + batch * stride_zb * ALIGN + head * stride_zh * ALIGN
        store_tile(dv, dv0, dv1, dv2, own, keys, stride_zn * ALIGN, D0, D1, D2, HEAD_DIM)


@triton.jit
def add_keys(
    q0,
    q1,
    q2,
    g0,
    g1,
    g2,
    dq0,
    dq1,
    dq2,
    reference,
    factor,
    delta,
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
    REST: tl.constexpr,
):
    """What a tile of keys from `start` on gives to dq; REST: what the rounding of dS takes from that."""
    columns = start + tl.arange(0, BLOCK_N)
    k0, k1, k2 = load_tile(k, columns, keys, stride_kn, D0, D1, D2, HEAD_DIM, EDGE)
    v0, v1, v2 = load_tile(v, columns, keys, stride_vn, D0, D1, D2, HEAD_DIM, EDGE)
    s = masked(
        inner(q0, q1, q2, k0, k1, k2, D1, D2), rows[:, None], columns[None, :], queries, keys, mask,
        stride_mm, stride_mn, scale, NEGATE, MASK, BIAS, CAUSAL, EDGE,
    )  # fmt: skip
    p = tl.exp2((s - reference[:, None]) * unit) * factor[:, None]
    dp = inner(g0, g1, g2, v0, v1, v2, D1, D2)
    ds = score_gradients(p, dp, delta[:, None], MASK, CAUSAL)
    if REST:
        ds = ds - rounded_to(ds, k0.dtype).to(tl.float32)
    return outer(rounded_to(ds, k0.dtype), k0, k1, k2, dq0, dq1, dq2, D1, D2)


@triton.jit(do_not_specialize=[*_INTEGERS, "stride_xb", "stride_xh", "stride_xm"])
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,
    statistics_ptr,
    dq_ptr,
    scale,
    unit,
    grad_scale,
    heads,
    queries,
    keys,
    tiles,
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
    stride_xb,
    stride_xh,
    stride_xm,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    LARGE: tl.constexpr,
    RESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq (strides x). Grid: query tiles x batch x heads.

    RESTS: tiles with rows whose |lse| > LARGE take dS in twice the precision.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    both = program // tiles
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    g = g_ptr + batch * stride_gb * ALIGN + head * stride_gh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh
    statistics = statistics_ptr + both.to(tl.int64) * queries
    per_kind = (tl.num_programs(0) // tiles).to(tl.int64) * queries

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q0, q1, q2 = load_tile(q, rows, queries, stride_qm * ALIGN, D0, D1, D2, HEAD_DIM, True)
    g0, g1, g2 = load_tile(g, rows, queries, stride_gm * ALIGN, D0, D1, D2, HEAD_DIM, True)
    reference, factor, delta = load_statistics(statistics, per_kind, rows, queries)
    inside = (rows < queries) & (reference != INFINITY)
    dq0, dq1, dq2 = zeros(BLOCK_M, D0, D1, D2)

    last = keys
    if CAUSAL:
        last = tl.minimum(last, (tile + 1) * BLOCK_M)
    whole = last // BLOCK_N * BLOCK_N
    if CAUSAL:
        whole = tl.minimum(whole, (tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        dq0, dq1, dq2 = add_keys(
            q0, q1, q2, g0, g1, g2, dq0, dq1, dq2, reference, factor, delta, rows, start, queries, keys,
            k, v, stride_kn * ALIGN, stride_vn * ALIGN, mask, stride_mm, stride_mn, scale, unit,
            BLOCK_N, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, False, False, False,
        )  # fmt: skip
    for start in tl.range(whole, last, BLOCK_N, num_stages=1):
        dq0, dq1, dq2 = add_keys(
            q0, q1, q2, g0, g1, g2, dq0, dq1, dq2, reference, factor, delta, rows, start, queries, keys,
            k, v, stride_kn * ALIGN, stride_vn * ALIGN, mask, stride_mm, stride_mn, scale, unit,
            BLOCK_N, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, CAUSAL, True, False,
        )  # fmt: skip
    if RESTS:  # noqa: SIM102
        # Where scores are huge, so may the keys be, and sums that cancel show the rounding of dS.
        if tl.max((tl.abs(reference * (unit * 0.6931472)) > LARGE).to(tl.int32) * inside.to(tl.int32), 0) > 0:
            for start in tl.range(0, last, BLOCK_N, num_stages=1):
                dq0, dq1, dq2 = add_keys(
                    q0, q1, q2, g0, g1, g2, dq0, dq1, dq2, reference, factor, delta, rows, start, queries,
                    keys, k, v, stride_kn * ALIGN, stride_vn * ALIGN, mask, stride_mm, stride_mn, scale, unit,
                    BLOCK_N, D0, D1, D2, HEAD_DIM, NEGATE, MASK, BIAS, CAUSAL, True, True,
                )  # fmt: skip

    dq0, dq1, dq2 = scale_rows(tl.zeros([BLOCK_M], tl.float32) + grad_scale, dq0, dq1, dq2, D1, D2)
    dq = dq_ptr + batch * stride_xb * ALIGN + head * stride_xh * ALIGN
    store_tile(dq, dq0, dq1, dq2, rows, queries, stride_xm * ALIGN, D0, D1, D2, HEAD_DIM)


def plan_long_backward(grad_out, q, k, v, out, lse, problem: Problem, target) -> tuple[list[Launch], tuple]:
    """The launches, and dq, dk, dv (of `result_like`) that they write."""
    both = problem.batch * problem.heads
    results = dq, dk, dv = result_like(q), result_like(k), result_like(v)
    launch, statistics = plan_statistics(grad_out, q, k, v, out, lse, problem, target)
    launches = [launch]
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "g_ptr": grad_out,
        "statistics_ptr": statistics,
        "scale": problem.size,
        "unit": problem.unit,
        "grad_scale": problem.scale,
        "heads": problem.heads,
        "queries": problem.queries,
        "keys": problem.keys,
        **problem.mask_arguments(),
        **problem.constants(),
    }
    config = configs.choose("backward-keys", problem, target)
    tiles = ceil_div(problem.keys, config.block_n)
    for want_k, want_v in configs.passes("backward-keys", problem, target):
        arguments = {
            **shared,
            "dk_ptr": dk,
            "dv_ptr": dv,
            "tiles": tiles,
            **strides(qm=q, kn=k, vn=v, gm=grad_out, yn=dk, zn=dv),
            "WANT_K": want_k,
            "WANT_V": want_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        launches.append(Launch(key_kernel, (tiles * both,), arguments, config.num_warps, config.num_stages))
    config = configs.choose("backward-queries", problem, target)
    tiles = ceil_div(problem.queries, config.block_m)
    arguments = {
        **shared,
        "dq_ptr": dq,
        "tiles": tiles,
        **strides(qm=q, kn=k, vn=v, gm=grad_out, xm=dq),
        "LARGE": LARGE[problem.dtype],
        "RESTS": problem.dtype == "float16",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    launches.append(Launch(query_kernel, (tiles * both,), arguments, config.num_warps, config.num_stages))
    return launches, results
