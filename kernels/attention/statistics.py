"""What the backward needs of every query, found before it."""

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, ceil_div
from . import configs
from .problem import Problem, strides
from .tiles import INFINITY, inner, inner_chunks, load_tile, masked

# exp(score - lse) is off by half a last place of lse. Beyond this, where that is more than 5e-7, or 4e-6
# beside rounding to 16 bits, the largest score and the sum are found anew.
LARGE = {"float32": 16.0, "bfloat16": 64.0, "float16": 64.0}

_INTEGERS = [
    *("heads", "queries", "keys", "tiles"),
    *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
    *("stride_vb", "stride_vh", "stride_vn", "stride_gb", "stride_gh", "stride_gm"),
    *("stride_mb", "stride_mh", "stride_mm"),
    *("stride_ob", "stride_oh", "stride_om"),
]


@triton.jit(do_not_specialize=_INTEGERS)
def statistics_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    g_ptr,
    lse_ptr,
    statistics_ptr,
    scale,
    unit,
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
    stride_ob,
    stride_oh,
    stride_om,
    stride_gb,
    stride_gh,
    stride_gm,
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
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes reference, factor and delta, statistics (3, B, H, Sq). Grid: query tiles x batch x heads.

    reference is lse and factor 1, except where |lse| > LARGE: there exp(score - lse) has lost bits to the
    rounding of lse, all of them where a finite mask of -1e9 covers a row, and the largest score, one over the
    sum of exp(score - largest) and delta are found from the scores. CHUNK > 0: the head dim is read in such
    steps.
    """
    program = tl.program_id(0)
    tile = program % tiles
    both = program // tiles
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < queries
    out = out_ptr + batch * stride_ob * ALIGN + head * stride_oh * ALIGN
    g = g_ptr + batch * stride_gb * ALIGN + head * stride_gh * ALIGN
    places = both.to(tl.int64) * queries + rows

    if CHUNK > 0:
        far = rows.to(tl.int64)[:, None]
        near = tl.arange(0, CHUNK)[None, :]
        delta = tl.zeros([BLOCK_M], tl.float32)
        for step in range(0, HEAD_DIM, CHUNK):
            x = tl.load(g + far * (stride_gm * ALIGN) + near + step, mask=inside[:, None], other=0.0)
            y = tl.load(out + far * (stride_om * ALIGN) + near + step, mask=inside[:, None], other=0.0)
            delta += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    else:
        g0, g1, g2 = load_tile(g, rows, queries, stride_gm * ALIGN, D0, D1, D2, HEAD_DIM, True)
        o0, o1, o2 = load_tile(out, rows, queries, stride_om * ALIGN, D0, D1, D2, HEAD_DIM, True)
        delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        if D2 > 0:
            delta += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
    lse = tl.load(lse_ptr + places, mask=inside, other=0.0)
    reference = lse
    if not BIAS:
        reference = lse / scale
    # A row with every key closed: exp(-inf - inf) is 0, exp(-inf + inf) would be NaN.
    reference = tl.where(lse == -INFINITY, INFINITY, reference)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)

    large = (tl.abs(lse) > LARGE) & (lse != -INFINITY)
    if tl.max(large.to(tl.int32), 0) > 0:
        q = q_ptr + batch * stride_qb * ALIGN + head * stride_qh * ALIGN
        k = k_ptr + batch * stride_kb * ALIGN + head * stride_kh * ALIGN
        v = v_ptr + batch * stride_vb * ALIGN + head * stride_vh * ALIGN
        mask = mask_ptr
        if MASK != "none":
            mask = mask_ptr + batch * stride_mb + head * stride_mh
        if CHUNK == 0:
            q0, q1, q2 = load_tile(q, rows, queries, stride_qm * ALIGN, D0, D1, D2, HEAD_DIM, True)
        top = tl.full([BLOCK_M], -INFINITY, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, keys, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            if CHUNK > 0:
                s = inner_chunks(
                    q, rows, queries, stride_qm * ALIGN, k, columns, keys, stride_kn * ALIGN,
                    BLOCK_M, BLOCK_N, HEAD_DIM, CHUNK,
                )  # fmt: skip
                dp = inner_chunks(
                    g, rows, queries, stride_gm * ALIGN, v, columns, keys, stride_vn * ALIGN,
                    BLOCK_M, BLOCK_N, HEAD_DIM, CHUNK,
                )  # fmt: skip
            else:
                k0, k1, k2 = load_tile(k, columns, keys, stride_kn * ALIGN, D0, D1, D2, HEAD_DIM, True)
                s = inner(q0, q1, q2, k0, k1, k2, D1, D2)
                v0, v1, v2 = load_tile(v, columns, keys, stride_vn * ALIGN, D0, D1, D2, HEAD_DIM, True)
                dp = inner(g0, g1, g2, v0, v1, v2, D1, D2)
            s = masked(
                s, rows[:, None], columns[None, :], queries, keys, mask, stride_mm, stride_mn, scale,
                NEGATE, MASK, BIAS, CAUSAL, True,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == -INFINITY, 0.0, new_top)
            p = tl.exp2((s - base[:, None]) * unit)
            shrink = tl.exp2((top - base) * unit)
            total = total * shrink + tl.sum(p, 1)
            weighted = weighted * shrink + tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
            top = new_top
        reference = tl.where(large, top, reference)
        factor = tl.where(large, 1.0 / total, factor)
        delta = tl.where(large, weighted / total, delta)

    per_kind = (tl.num_programs(0) // tiles).to(tl.int64) * queries
    tl.store(statistics_ptr + places, reference, mask=inside)
    tl.store(statistics_ptr + per_kind + places, factor, mask=inside)
    tl.store(statistics_ptr + 2 * per_kind + places, delta, mask=inside)


@triton.jit
def load_statistics(statistics, per_kind, rows, queries):
    """reference, factor and delta; such that P and dS are 0 past the end."""
    inside = rows < queries
    reference = tl.load(statistics + rows, mask=inside, other=INFINITY)
    factor = tl.load(statistics + per_kind + rows, mask=inside, other=0.0)
    delta = tl.load(statistics + 2 * per_kind + rows, mask=inside, other=0.0)
    return reference, factor, delta


def plan_statistics(grad_out, q, k, v, out, lse, problem: Problem, target) -> tuple[Launch, torch.Tensor]:
    """The launch, and the statistics (3, B, H, Sq) that it writes."""
    chunk = 0
    if configs.is_wide(problem):
        # As where the scores are found again: so they are rounded alike.
        chunk = configs.choose("wide-gradients", problem, target).block_d
    config = configs.choose("backward-statistics", problem, target)
    tiles = ceil_div(problem.queries, config.block_m)
    statistics = torch.empty((3, *q.shape[:3]), dtype=torch.float32, device=q.device)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "g_ptr": grad_out,
        "lse_ptr": lse,
        "statistics_ptr": statistics,
        "scale": problem.size,
        "unit": problem.unit,
        "heads": problem.heads,
        "queries": problem.queries,
        "keys": problem.keys,
        "tiles": tiles,
        **strides(qm=q, kn=k, vn=v, om=out, gm=grad_out),
        **problem.mask_arguments(),
        **problem.constants(),
        "CHUNK": chunk,
        "LARGE": LARGE[problem.dtype],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (tiles * problem.batch * problem.heads,)
    return Launch(statistics_kernel, grid, arguments, config.num_warps, config.num_stages), statistics
