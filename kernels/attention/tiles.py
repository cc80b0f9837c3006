"""What the attention kernels share on the device: loading tiles, scores, masks.

A tile of head vectors, [rows, head dim], is held as up to three pieces, [rows, D0], [rows, D1], [rows, D2],
of powers of two, as `problem.pieces` gives them; a D of 0 is a piece that is not there, and its variable a
placeholder that nothing reads. Only the last piece can reach past the head dim; there it is 0.

Scores come in one of two units, so that the largest can be subtracted before anything is multiplied (it may
be 1e10: rounded before the subtraction, it would swallow the differences): without a bias as the bare product
q k, with one as scale * q k + bias. `unit` takes either to base 2: exp(x) = exp2(unit * x).
"""

import triton
import triton.language as tl

from ..common.rounding import INTERPRETED, rounded_to

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in float32."""
    if INTERPRETED:
        # numpy would multiply the bits of bfloat16. And its order of summation differs from element to
        # element, and between a product and its transpose: where scores are huge that shows in exp(score -
        # lse). A GPU adds in one order.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        if acc is not None:
            product += acc
        return product
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_piece(
    base,
    rows,
    row_count,
    stride,
    START: tl.constexpr,
    D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[len(rows), D] from column START on. EDGE: rows may pass row_count; they are 0."""
    columns = START + tl.arange(0, D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if START + D > HEAD_DIM:
        if EDGE:
            inside = (rows < row_count)[:, None] & (columns < HEAD_DIM)[None, :]
        else:
            inside = (columns < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif EDGE:
        tile = tl.load(pointers, mask=(rows < row_count)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_tile(
    base,
    rows,
    row_count,
    stride,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr,
):
    x0 = load_piece(base, rows, row_count, stride, 0, D0, HEAD_DIM, EDGE)
    x1, x2 = x0, x0
    if D1 > 0:
        x1 = load_piece(base, rows, row_count, stride, D0, D1, HEAD_DIM, EDGE)
    if D2 > 0:
        x2 = load_piece(base, rows, row_count, stride, D0 + D1, D2, HEAD_DIM, EDGE)
    return x0, x1, x2


@triton.jit
def store_piece(
    base, tile, rows, row_count, stride, START: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    columns = START + tl.arange(0, D)
    inside = (rows < row_count)[:, None]
    if START + D > HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, rounded_to(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(
    base,
    x0,
    x1,
    x2,
    rows,
    row_count,
    stride,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    store_piece(base, x0, rows, row_count, stride, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_piece(base, x1, rows, row_count, stride, D0, D1, HEAD_DIM)
    if D2 > 0:
        store_piece(base, x2, rows, row_count, stride, D0 + D1, D2, HEAD_DIM)


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Accumulators of a tile; one number for a piece that is not there, which a loop carries for free."""
    x0 = tl.zeros([ROWS, D0], tl.float32)
    x1, x2 = 0.0, 0.0
    if D1 > 0:
        x1 = tl.zeros([ROWS, D1], tl.float32)
    if D2 > 0:
        x2 = tl.zeros([ROWS, D2], tl.float32)
    return x0, x1, x2


@triton.jit
def inner(a0, a1, a2, b0, b1, b2, D1: tl.constexpr, D2: tl.constexpr):
    """a b^T over the head dim, in float32."""
    s = dot(a0, tl.trans(b0), None)
    if D1 > 0:
        s = dot(a1, tl.trans(b1), s)
    if D2 > 0:
        s = dot(a2, tl.trans(b2), s)
    return s


@triton.jit
def inner_chunks(
    a,
    a_rows,
    a_count,
    stride_a,
    b,
    b_rows,
    b_count,
    stride_b,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """a b^T over the head dim, [ROWS, COLUMNS]."""
    columns = tl.arange(0, CHUNK)
    a = a + a_rows.to(tl.int64)[:, None] * stride_a + columns[None, :]
    b = b + b_rows.to(tl.int64)[:, None] * stride_b + columns[None, :]
    a_inside = (a_rows < a_count)[:, None]
    b_inside = (b_rows < b_count)[:, None]
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        x = tl.load(a + start, mask=a_inside, other=0.0)
        y = tl.load(b + start, mask=b_inside, other=0.0)
        s = dot(x, tl.trans(y), s)
    return s


@triton.jit
def outer(w, x0, x1, x2, acc0, acc1, acc2, D1: tl.constexpr, D2: tl.constexpr):
    """acc + w x, over the rows of x."""
    acc0 = dot(w, x0, acc0)
    if D1 > 0:
        acc1 = dot(w, x1, acc1)
    if D2 > 0:
        acc2 = dot(w, x2, acc2)
    return acc0, acc1, acc2


@triton.jit
def scale_rows(factor, acc0, acc1, acc2, D1: tl.constexpr, D2: tl.constexpr):
    acc0 = acc0 * factor[:, None]
    if D1 > 0:
        acc1 = acc1 * factor[:, None]
    if D2 > 0:
        acc2 = acc2 * factor[:, None]
    return acc0, acc1, acc2


@triton.jit
def masked(
    s,
    rows,
    columns,
    queries,
    keys,
    mask,
    stride_mm,
    stride_mn,
    scale,
    NEGATE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores in the unit of this file from products s, -inf where a key is closed or past the end.

    `rows` and `columns`, numbers of queries and keys, broadcast to the shape of `s`. `scale` is positive,
    NEGATE its sign. MASK is "none", "keys" (the same for every query) or "full"; EDGE says that keys may be
    past the end; rows past the end get any score.
    """
    if NEGATE:
        s = -s
    if MASK != "none":
        offsets = columns.to(tl.int64) * stride_mn
        if MASK == "full":
            offsets = offsets + tl.minimum(rows, queries - 1).to(tl.int64) * stride_mm
        if EDGE:  # noqa: SIM108
            found = tl.load(mask + offsets, mask=columns < keys, other=0)
        else:
            found = tl.load(mask + offsets)
        if BIAS:
            # Whatever a closed key holds, infinity included, must not show.
            bias = found.to(tl.float32)
            s = tl.where(bias == -INFINITY, -INFINITY, s * scale + bias)
        else:
            s = tl.where(found != 0, s, -INFINITY)
    if EDGE:
        s = tl.where(columns < keys, s, -INFINITY)
    if CAUSAL:
        s = tl.where(columns <= rows, s, -INFINITY)
    return s
