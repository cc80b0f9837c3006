"""Attention with few keys, as in cross-attention to 77 words: k and v of a head stay on chip.

The keys are one or two tiles (77 = 64 + 16), so the softmax needs one pass, and what the backward needs of it
is found on the way: no log-sum-exp is read. A program walks many tiles of queries; it writes their dq and, in
float32, what they add to dk and dv, which `reduce_kernel` sums over the programs of a head in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, ceil_div, next_power_of_two
from ..common.rounding import rounded_to
from . import configs
from .problem import Problem, result_like, strides
from .tiles import INFINITY, inner, load_tile, masked, outer, scale_rows, store_tile, zeros

_INTEGERS = [
    *("heads", "queries", "keys", "tiles", "chunks", "tiles_per_chunk"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_vb", "stride_vh", "stride_vn", "stride_mb", "stride_mh", "stride_mm"),
]


@triton.jit
def softmax(s, t, unit, N1: tl.constexpr):
    """exp(score - top) of the scores s and, if N1, t; top and the sum, per row."""
    top = tl.max(s, 1)
    if N1 > 0:
        top = tl.maximum(top, tl.max(t, 1))
    # A row without an open key has top = -inf, and -inf - -inf would be NaN.
    reference = tl.where(top == -INFINITY, 0.0, top)[:, None]
    s = tl.exp2((s - reference) * unit)
    total = tl.sum(s, 1)
    if N1 > 0:
        t = tl.exp2((t - reference) * unit)
        total += tl.sum(t, 1)
    return s, t, top, total


@triton.jit(do_not_specialize=[*_INTEGERS, "stride_ob", "stride_oh", "stride_om"])
def short_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    unit,
    heads,
    queries,
    keys,
    tiles,
    chunks,
    tiles_per_chunk,
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
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
):
    """out and lse. Grid: chunks of query tiles x batch x heads. N1 is 0 or the second tile of keys."""
    program = tl.program_id(0)
    chunk = program % chunks
    both = program // chunks
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    out = out_ptr + batch * stride_ob * ALIGN + head * stride_oh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh

    a = tl.arange(0, N0)
    ka0, ka1, ka2 = load_tile(k, a, keys, stride_kn * ALIGN, D0, D1, D2, HEAD_DIM, N1 == 0)
    va0, va1, va2 = load_tile(v, a, keys, stride_vn * ALIGN, D0, D1, D2, HEAD_DIM, N1 == 0)
    if N1 > 0:
        b = N0 + tl.arange(0, N1)
        kb0, kb1, kb2 = load_tile(k, b, keys, stride_kn * ALIGN, D0, D1, D2, HEAD_DIM, True)
        vb0, vb1, vb2 = load_tile(v, b, keys, stride_vn * ALIGN, D0, D1, D2, HEAD_DIM, True)

    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q0, q1, q2 = load_tile(q, rows, queries, stride_qm * ALIGN, D0, D1, D2, HEAD_DIM, True)
        s = masked(
            inner(q0, q1, q2, ka0, ka1, ka2, D1, D2), rows[:, None], a[None, :], queries, keys, mask,
            stride_mm, stride_mn, scale, NEGATE, MASK, BIAS, CAUSAL, N1 == 0,
        )  # fmt: skip
        t = s
        if N1 > 0:
            t = masked(
                inner(q0, q1, q2, kb0, kb1, kb2, D1, D2), rows[:, None], b[None, :], queries, keys, mask,
                stride_mm, stride_mn, scale, NEGATE, MASK, BIAS, CAUSAL, True,
            )  # fmt: skip
        p, r, top, total = softmax(s, t, unit, N1)
        acc0, acc1, acc2 = zeros(BLOCK_M, D0, D1, D2)
        acc0, acc1, acc2 = outer(rounded_to(p, va0.dtype), va0, va1, va2, acc0, acc1, acc2, D1, D2)
        if N1 > 0:
            acc0, acc1, acc2 = outer(rounded_to(r, vb0.dtype), vb0, vb1, vb2, acc0, acc1, acc2, D1, D2)
        acc0, acc1, acc2 = scale_rows(1.0 / tl.where(total == 0.0, 1.0, total), acc0, acc1, acc2, D1, D2)
        store_tile(out, acc0, acc1, acc2, rows, queries, stride_om * ALIGN, D0, D1, D2, HEAD_DIM)
        if WRITE_LSE:
            if not BIAS:
                top = top * scale
            lse = tl.where(total == 0.0, -INFINITY, top + tl.log(total))
            tl.store(lse_ptr + both.to(tl.int64) * queries + rows, lse, mask=rows < queries)


@triton.jit(
    do_not_specialize=[
        *_INTEGERS,
        *("stride_gb", "stride_gh", "stride_gm", "stride_xb", "stride_xh", "stride_xm"),
    ]
)
def short_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,
    dq_ptr,
    partial_ptr,
    scale,
    unit,
    grad_scale,
    heads,
    queries,
    keys,
    tiles,
    chunks,
    tiles_per_chunk,
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
    RESTS: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq (strides x) and partial sums (2, chunks, B, H, Sk, D) of dk / scale and dv.

    WANT_K: dq and dk; WANT_V: dv; where they are too wide to be held together, they have a launch each.
    RESTS: dq takes dS in twice the precision.

    Scores are transposed, [keys, queries]: so P and dS are in the registers where the products that give dk
    and dv want them. Grid: chunks of query tiles x batch x heads.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    both = program // chunks
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
    k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
    v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
    g = g_ptr + batch * stride_gb * ALIGN + head * stride_gh * ALIGN
    dq = dq_ptr + batch * stride_xb * ALIGN + head * stride_xh * ALIGN
    mask = mask_ptr
    if MASK != "none":
        mask = mask_ptr + batch * stride_mb + head * stride_mh

    own = tl.arange(0, BLOCK_N)
    k0, k1, k2 = load_tile(k, own, keys, stride_kn * ALIGN, D0, D1, D2, HEAD_DIM, True)
    v0, v1, v2 = k0, k1, k2
    if WANT_K:
        v0, v1, v2 = load_tile(v, own, keys, stride_vn * ALIGN, D0, D1, D2, HEAD_DIM, True)
    dk0, dk1, dk2 = zeros(BLOCK_N, D0, D1, D2)
    dv0, dv1, dv2 = zeros(BLOCK_N, D0, D1, D2)

    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q0, q1, q2 = load_tile(q, rows, queries, stride_qm * ALIGN, D0, D1, D2, HEAD_DIM, True)
        g0, g1, g2 = load_tile(g, rows, queries, stride_gm * ALIGN, D0, D1, D2, HEAD_DIM, True)
        s = masked(
            inner(k0, k1, k2, q0, q1, q2, D1, D2), rows[None, :], own[:, None], queries, keys, mask,
            stride_mm, stride_mn, scale, NEGATE, MASK, BIAS, CAUSAL, True,
        )  # fmt: skip
        top = tl.max(s, 0)
        # A row without an open key has top = -inf, and -inf - -inf would be NaN.
        p = tl.exp2((s - tl.where(top == -INFINITY, 0.0, top)[None, :]) * unit)
        total = tl.sum(p, 0)
        p = p * (1.0 / tl.where(total == 0.0, 1.0, total))[None, :]
        if WANT_V:
            dv0, dv1, dv2 = outer(rounded_to(p, g0.dtype), g0, g1, g2, dv0, dv1, dv2, D1, D2)
        if WANT_K:
            dp = inner(v0, v1, v2, g0, g1, g2, D1, D2)
            if MASK != "none" or CAUSAL:
                # What stands where a key is closed may have made dP infinite.
                dp = tl.where(p == 0.0, 0.0, dp)
            exact = p * (dp - tl.sum(p * dp, 0)[None, :])
            ds = rounded_to(exact, q0.dtype)
            dq0, dq1, dq2 = zeros(BLOCK_M, D0, D1, D2)
            if RESTS:
                # Sums of huge keys that cancel would show the rounding of dS.
                rest = rounded_to(exact - ds.to(tl.float32), q0.dtype)
                dq0, dq1, dq2 = outer(tl.trans(rest), k0, k1, k2, dq0, dq1, dq2, D1, D2)
            dk0, dk1, dk2 = outer(ds, q0, q1, q2, dk0, dk1, dk2, D1, D2)
            dq0, dq1, dq2 = outer(tl.trans(ds), k0, k1, k2, dq0, dq1, dq2, D1, D2)
            dq0, dq1, dq2 = scale_rows(tl.zeros([BLOCK_M], tl.float32) + grad_scale, dq0, dq1, dq2, D1, D2)
            store_tile(dq, dq0, dq1, dq2, rows, queries, stride_xm * ALIGN, D0, D1, D2, HEAD_DIM)

    place = partial_ptr + (chunk.to(tl.int64) * (tl.num_programs(0) // chunks) + both) * keys * HEAD_DIM
    if WANT_K:
        store_tile(place, dk0, dk1, dk2, own, keys, HEAD_DIM, D0, D1, D2, HEAD_DIM)
    if WANT_V:
        place += tl.num_programs(0).to(tl.int64) * keys * HEAD_DIM
        store_tile(place, dv0, dv1, dv2, own, keys, HEAD_DIM, D0, D1, D2, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        *("heads", "keys", "tiles", "chunks"),
        *("stride_yb", "stride_yh", "stride_yn", "stride_zb", "stride_zh", "stride_zn"),
    ]
)
def reduce_kernel(
    partial_ptr,
    dk_ptr,
    dv_ptr,
    grad_scale,
    heads,
    keys,
    tiles,
    chunks,
    stride_yb,
    stride_yh,
    stride_yn,
    stride_zb,
    stride_zh,
    stride_zn,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk (strides y) and dv (strides z), the sums of the partial sums of all chunks. Grid: key tiles x batch
    x heads."""
    program = tl.program_id(0)
    both = (program // tiles).to(tl.int64)
    rows = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < keys)[:, None] & (columns < HEAD_DIM)[None, :]
    per_chunk = (tl.num_programs(0) // tiles).to(tl.int64) * keys * HEAD_DIM
    places = partial_ptr + both * keys * HEAD_DIM + rows[:, None] * HEAD_DIM + columns[None, :]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for chunk in range(chunks):
        dk += tl.load(places + chunk * per_chunk, mask=inside, other=0.0)
        dv += tl.load(places + (chunks + chunk) * per_chunk, mask=inside, other=0.0)
    batch, head = both // heads, both % heads
    rows = rows.to(tl.int64)[:, None]
    place = dk_ptr + batch * stride_yb * ALIGN + head * stride_yh * ALIGN
    place += rows * (stride_yn * ALIGN) + columns[None, :]
    tl.store(place, rounded_to(dk * grad_scale, dk_ptr.dtype.element_ty), mask=inside)
    place = dv_ptr + batch * stride_zb * ALIGN + head * stride_zh * ALIGN
    place += rows * (stride_zn * ALIGN) + columns[None, :]
    tl.store(place, rounded_to(dv, dv_ptr.dtype.element_ty), mask=inside)


def _shared(q, k, v, problem: Problem, config, chunks: int, tiles: int) -> dict:
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "scale": problem.size,
        "unit": problem.unit,
        "heads": problem.heads,
        "queries": problem.queries,
        "keys": problem.keys,
        "tiles": tiles,
        "chunks": chunks,
        "tiles_per_chunk": ceil_div(tiles, chunks),
        **problem.mask_arguments(),
        **problem.constants(),
        "BLOCK_M": config.block_m,
    }


def plan_short_forward(q, k, v, problem: Problem, need_lse: bool, target):
    """As `plan_forward`."""
    config = configs.choose("short-forward", problem, target)
    tiles = ceil_div(problem.queries, config.block_m)
    chunks = configs.chunks("short-forward", problem, target, tiles)
    out = result_like(q)
    lse = torch.empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32, device=q.device)
    n0, n1 = configs.key_pieces(problem.keys)
    arguments = {
        **_shared(q, k, v, problem, config, chunks, tiles),
        "N0": n0,
        "N1": n1,
        "out_ptr": out,
        "lse_ptr": lse,
        **strides(qm=q, kn=k, vn=v, om=out),
        "WRITE_LSE": need_lse,
    }
    grid = (chunks * problem.batch * problem.heads,)
    return [Launch(short_forward_kernel, grid, arguments, config.num_warps, config.num_stages)], out, lse


def plan_short_backward(grad_out, q, k, v, problem: Problem, target):
    """As `plan_backward`."""
    config = configs.choose("short-backward", problem, target)
    tiles = ceil_div(problem.queries, config.block_m)
    chunks = configs.chunks("short-backward", problem, target, tiles)
    both = problem.batch * problem.heads
    results = dq, dk, dv = result_like(q), result_like(k), result_like(v)
    partial = torch.empty((2, chunks, *k.shape), dtype=torch.float32, device=q.device)
    arguments = {
        **_shared(q, k, v, problem, config, chunks, tiles),
        "RESTS": problem.dtype == "float16",
        "BLOCK_N": max(16, next_power_of_two(problem.keys)),
        "g_ptr": grad_out,
        "dq_ptr": dq,
        "partial_ptr": partial,
        "grad_scale": problem.scale,
        **strides(qm=q, kn=k, vn=v, gm=grad_out, xm=dq),
    }
    launches = []
    for want_k, want_v in configs.passes("short-backward", problem, target):
        wanted = {**arguments, "WANT_K": want_k, "WANT_V": want_v}
        launches.append(
            Launch(short_backward_kernel, (chunks * both,), wanted, config.num_warps, config.num_stages)
        )
    block_d = next_power_of_two(problem.head_dim)
    block_n = max(1, 1024 // block_d)
    tiles = ceil_div(problem.keys, block_n)
    arguments = {
        "partial_ptr": partial,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "grad_scale": problem.scale,
        "heads": problem.heads,
        "keys": problem.keys,
        "tiles": tiles,
        "chunks": chunks,
        **strides(yn=dk, zn=dv),
        "HEAD_DIM": problem.head_dim,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
    }
    launches.append(Launch(reduce_kernel, (tiles * both,), arguments, num_warps=4))
    return launches, results
