"""Attention with a wide head, as the one head of 512 of an autoencoder.

A tile of queries cannot be held: 64 rows of out are 128 kB of float32, all registers of a multiprocessor, and
to split the head dim among programs is to compute the scores once for each. At this width a weight costs 1024
multiply-adds to compute, and 2 or 4 bytes to write down. So the weights are written down, for as many queries
at a time as `WORKSPACE` holds, and everything is a matrix product with nothing computed twice:

forward    `weight_kernel`: exp(score - top), top the largest of the row in this tile, and statistics
           `value_kernel`: out = sum over tiles of exp(top - largest top) * weights v, over the total
backward   `weight_gradient_kernel`: P and dS
           `product_kernel`: dv = P^T g, dk = scale * dS^T q, dq = scale * dS k

dk and dv go on from one part of the queries to the next in float32.
"""

import triton
import triton.language as tl

from ..common.launch import ceil_div
from .problem import Problem

# Bytes of weights that are written down at once.
WORKSPACE = 128 << 20
# Rows and columns of the weights are filled up to this, with zeros.
PAD = 128


@triton.jit
def place_of(program, key_tiles, query_tiles, heads):
    """Numbers of the tile of keys, tile of queries, (batch, head) together, batch and head of a program.

    Key tiles of one tile of queries run next to each other.
    """
    key_tile = program % key_tiles
    query_tile = program // key_tiles % query_tiles
    both = program // key_tiles // query_tiles
    return key_tile, query_tile, both, (both // heads).to(tl.int64), (both % heads).to(tl.int64)


def padded(n: int) -> int:
    return ceil_div(n, PAD) * PAD


def parts(problem: Problem, copies: int, element_size: int) -> list[tuple[int, int]]:
    """(first, number) of queries whose weights fit into WORKSPACE together."""
    per_row = copies * element_size * problem.batch * problem.heads * padded(problem.keys)
    rows = max(PAD, WORKSPACE // per_row // PAD * PAD)
    return [(i, min(rows, problem.queries - i)) for i in range(0, problem.queries, rows)]


def constants_of(problem: Problem) -> dict:
    found = problem.constants()
    return {name: value for name, value in found.items() if name not in ("D0", "D1", "D2")}
