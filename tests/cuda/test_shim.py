"""The device primitives mean under the shim what they mean on a GPU, and the shim sees what is wrong.

The kernels are those of csrc/cuda/selftest.cuh; the broken ones are made of them by a change of the source.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cuda.shim import ShimError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of fastldm::DType
SEEDS = range(3)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def matmul(shim, dtype, transposed, m, n, k, seed=0):
    """The product that the kernel makes, and the exact one of the same rounded factors."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    c = torch.full((m, n), torch.nan)
    stored = b.t().contiguous() if transposed else b
    shim("matmul", a, stored, c, m, n, k, DTYPES.index(dtype), transposed, seed=seed)
    if dtype is torch.float32:
        a, b = tf32(a), tf32(b)
    return c, a.double() @ b.double().t()


@pytest.mark.parametrize(
    ("dtype", "transposed"), [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]]
)
def test_matmul(shim, dtype, transposed):
    for seed, (m, n, k) in itertools.product(SEEDS, [(64, 64, 64), (72, 96, 80), (3, 8, 136)]):
        c, exact = matmul(shim("selftest"), dtype, transposed, m, n, k, seed)
        assert (c - exact).abs().max() <= 2e-5


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_cluster_sum(shim, unwritten, blocks):
    x, sums = torch.randn(3, 1000), unwritten(3)
    results = []
    for seed in SEEDS:
        shim("selftest")("cluster_sum", x, sums, 3, 1000, blocks, 90, seed=seed)
        results.append(sums.clone())
    assert (sums - x.double().sum(1)).abs().max() <= 2e-5
    assert all(torch.equal(result, results[0]) for result in results)


def histogram(shim, count, seed=0):
    values = torch.randint(2, 16, (count,), dtype=torch.int32)
    counts, first = torch.zeros(16, dtype=torch.int32), torch.tensor([2**62])
    least = torch.full((-(-count // 96),), -1, dtype=torch.int32)
    shim("histogram", values, counts, least, first, count, seed=seed)
    return values, counts, least, first


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram(shim, seed):
    values, counts, least, first = histogram(shim("selftest"), 1000, seed)
    assert torch.equal(counts.long(), torch.bincount(values, minlength=16))
    assert least.tolist() == [int(part.min()) for part in values.split(96)]
    assert first.item() == int(values.min()) << 32 | values.tolist().index(values.min())


def test_warp(shim, unwritten):
    x, out = torch.randn(32), unwritten(10, 32)
    shim("selftest")("warp", x, out)
    lanes = torch.arange(32)
    row, column = lanes // 4, 2 * (lanes % 4) + 1
    tree = x
    for distance in (16, 8, 4, 2, 1):
        tree = tree + tree[lanes ^ distance]
    expected = torch.stack(
        [
            x[lanes ^ 5],
            x[torch.where(lanes + 3 < 32, lanes + 3, lanes)],
            x[7].expand(32),
            (x > 0).float(),
            tree,
            x.view(4, 8).amax(1).repeat_interleave(8),
            x.argmax().float().expand(32),
            (float(x.max() > 2) + 2 * float(x.min() > -9)) * torch.ones(32),
            x.flip(0),
            4.0 * row * (column + 1) + 8 * (row + 1),
        ]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_copy(shim, unwritten):
    """At an address that is a multiple of 4 bytes only."""
    x, y = torch.randn(385)[1:], unwritten(385)
    for seed in SEEDS:
        y.fill_(torch.nan)
        shim("selftest")("copy", x, y[1:], 384, seed=seed)
        assert torch.equal(y[1:], x)
        assert y[0].isnan()


def test_math(shim, unwritten):
    special = torch.tensor([0.0, -0.0, 1e-8, 6e-8, 5.96e-8, 65504, 65519, 65520, 1e6, torch.inf, -torch.inf])
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-14 + 2**-25, 3 * 2**-25])
    x = torch.cat([special, ties, torch.randn(500) * 10 ** torch.linspace(-9, 1, 500)])
    out = unwritten(9, x.numel())
    shim("selftest")("math", x, out, x.numel())
    half = x.half().float()
    exact = x.double()
    expected = [half, x.bfloat16().float(), torch.where(x.isfinite(), tf32(x), x), half - 2 * half]
    for row, value in enumerate(expected):
        torch.testing.assert_close(out[row], value, rtol=0, atol=0, equal_nan=True)
    wanted = [exact.exp(), exact.abs().log2(), 1 / exact]
    for row, value in enumerate(wanted, start=4):
        torch.testing.assert_close(out[row].double(), value, rtol=2e-6, atol=1e-6, equal_nan=True)
    last = x / 3 * x.abs().sqrt() + torch.fmax(x, torch.fmin(torch.ones(()), x))
    torch.testing.assert_close(out[7], last, rtol=1e-6, atol=1e-7, equal_nan=True)
    square = torch.where(x.isfinite(), (exact / 3).square(), torch.nan).float()
    torch.testing.assert_close(out[8], square, rtol=0, atol=0, equal_nan=True)


def test_numbers_that_are_none(shim, unwritten):
    x, out = torch.tensor([torch.nan]), unwritten(9, 1)
    shim("selftest")("math", x, out, 1)
    assert out[:3].isnan().all()


def test_launches_that_no_gpu_takes(shim, unwritten):
    x, sums = torch.randn(2, 100), unwritten(2)
    with pytest.raises(ShimError, match="needs a device of capability 90, not 80"):
        shim("selftest")("cluster_sum", x, sums, 2, 100, 2, 80)
    with pytest.raises(ShimError, match="a cluster must be of 1 to 8 blocks"):
        shim("selftest")("cluster_sum", x, sums, 2, 100, 16, 90)
    with pytest.raises(ShimError, match="at least one block"):
        shim("selftest")("cluster_sum", x, sums, 0, 100, 1, 90)
    with pytest.raises(ShimError, match="whole vectors"):
        shim("selftest")("matmul", x, x, x, 2, 2, 7, 1, False)


BROKEN = {
    "a barrier is missing": (
        "      block_sync();\n      fetch_slice",
        "      fetch_slice",
        "matmul",
        "wait_group is missing|no barrier in between",
    ),
    "a wait for copies is missing": (
        "      wait_group<stages - 2>();\n",
        "",
        "matmul",
        "wait_group is missing",
    ),
    "a wait that ends too early": (
        "wait_group<stages - 2>()",
        "wait_group<stages - 1>()",
        "matmul",
        "wait_group is missing",
    ),
    "too few stages for the copies ahead": (
        "i < stages - 1; ++i",
        "i < stages; ++i",
        "matmul",
        "wait_group is missing|no barrier in between",
    ),
    "a row too many is read": (
        "row0 + row < rows",
        "row0 + row <= rows",
        "matmul",
        "global memory: .* outside",
    ),
    "a row too many is written": ("if (row < params.m &&", "if (row <= params.m &&", "matmul", "outside it"),
    "shared memory is left": (
        "to + row * pitch + column, from",
        "to + (row + Rows * 3) * pitch + column, from",
        "matmul",
        "shared memory: .* outside it",
    ),
    "an address that is not aligned": (
        "column = i % per_row * vector",
        "column = i % per_row * vector + 1",
        "matmul",
        "not aligned to 16",
    ),
    "fragments of other rows": ("lane % 16, a_column", "lane % 8, a_column", "matmul", "wrong"),
    "columns of other fragments": ("k + lane / 8 % 2 *", "k + lane / 8 % 4 / 2 *", "matmul", "wrong"),
    "lanes part before a product": (
        "          mma_16x8x16<T>(c[n], a_fragment, b_fragment);",
        "          if (lane < 16) mma_16x8x16<T>(c[n], a_fragment, b_fragment);",
        "matmul",
        "meet in different operations|wait for ever",
    ),
    "part of a block leaves before a barrier": (
        "    const int slices =",
        "    if (warp_id() == 3) return;\n    const int slices =",
        "matmul",
        "wait for ever: 96 at block_sync; 32 have ended",
    ),
    "a peer is read before it has begun": (
        "    cluster_sync();\n    float total",
        "    float total",
        "cluster_sum",
        "may not have begun",
    ),
    "a peer is read when it may have ended": (
        "    cluster_sync();\n    if (cluster_rank",
        "    if (cluster_rank",
        "cluster_sum",
        "may have ended",
    ),
    "a peer that is none": ("peer(part, rank)", "peer(part, rank + 1)", "cluster_sum", "a peer of rank 2"),
    "scratch is read before it is written": (
        "    counts.atomic_add(value, 1);",
        "    counts.store(value, counts.load(value) + 1);",
        "histogram",
        "no barrier in between",
    ),
    "an exchange with no warp_sync": ("    warp_sync();\n", "", "warp", "no barrier in between"),
    "a reversed index": (
        "exchanged.load(kWarp - 1 - lane)",
        "exchanged.load(kWarp - lane)",
        "warp",
        "outside it",
    ),
    "arrivals that are not enough": (
        "      named_arrive<1>(threads);\n",
        "",
        "copy",
        "wait for ever: 32 have ended; 32 at named_sync",
    ),
    "an arrival before the copies": (
        "      wait_group<0>();\n      named_arrive<1>(threads);",
        "      named_arrive<1>(threads);\n      wait_group<0>();",
        "copy",
        "wait_group is missing|no barrier in between",
    ),
    "vectors wider than the address allows": (
        "y.store_vector<4, 4, Cache",
        "y.store_vector<4, 16, Cache",
        "copy",
        "not aligned to 16",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_seen(broken_shim, unwritten, name):
    old, new, function, message = BROKEN[name]
    shim = broken_shim("selftest", {"cuda/selftest.cuh": (old, new)})

    def run(seed):
        if function == "matmul":
            c, exact = matmul(shim, torch.bfloat16, False, 60, 72, 160, seed)
            assert (c - exact).abs().max() <= 2e-5, "wrong"
        elif function == "cluster_sum":
            shim("cluster_sum", torch.randn(3, 1000), unwritten(3), 3, 1000, 2, 90, seed=seed)
        elif function == "histogram":
            histogram(shim, 500, seed)
        elif function == "warp":
            shim("warp", torch.randn(32), unwritten(10, 32), seed=seed)
        else:
            shim("copy", torch.randn(385)[1:], unwritten(385)[1:], 384, seed=seed)

    for seed in SEEDS:
        with pytest.raises(AssertionError, match=message):
            run(seed)


def test_a_barrier_missing_in_a_primitive(broken_shim, unwritten):
    """block_reduce frees its scratch with its last barrier: without it two in a row race."""
    once = "sum = block_reduce<threads>(sum, Sum(), scratch);"
    combined = "value = combine(value, scratch.load(warp));\n"
    changes = {
        "cuda/selftest.cuh": (once, f"{once}\n    {once}"),
        "cuda/common/block.h": (f"{combined}  block_sync();", combined),
    }
    shim = broken_shim("selftest", changes)
    with pytest.raises(ShimError, match="no barrier in between"):
        shim("cluster_sum", torch.randn(1, 200), unwritten(1), 1, 200, 1, 90)


def test_fibers_of_other_processors(broken_shim):
    """Where there is no x86-64 assembler, ucontext switches."""
    condition = "#if !defined(__x86_64__) || defined(FASTLDM_SHIM_UCONTEXT)"
    shim = broken_shim("selftest", {"cuda/shim/fiber.h": (condition, "#if 1")})
    c, exact = matmul(shim, torch.float16, False, 64, 64, 32)
    assert (c - exact).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("old", "new", "error"), [("not there", "", ValueError), ("#pragma once", "#error", RuntimeError)]
)
def test_changes_that_make_no_kernel(broken_shim, old, new, error):
    """Are no AssertionError, which tests of broken kernels take for a kernel that was seen."""
    with pytest.raises(error):
        broken_shim("vq_ema_update", {"cuda/vq_rows.cuh": (old, new)})
