"""The CUDA kernels of vq_nearest and vq_ema_update under the shim, on the plans of several GPUs.

The contract itself is tests/ops/test_vq.py; here it is every path of the kernels. Inputs that float32 ranks
wrongly are those of tests/kernels/test_vq.py.
"""

from __future__ import annotations

import itertools
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastldm.kernels.common.rows import rows_of

from fastldm import dispatch, ops
from fastldm.native import cuda
from fastldm.native.cuda import vq
from fastldm.reference import vq as reference
from fastldm.testing import assert_as_accurate, poisoned_memory
from fastldm.testing.inputs import VQ_KINDS, vq_inputs
from fastldm.testing.shapes import VQ_LAYERS, VQShape
from tests.cuda.shim import ShimError
from tests.kernels.test_vq import (
    cut_off_by_tensor_cores,
    near_ties,
    order_of_addition,
    shuffled,
    wrong_in_float32,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of fastldm::DType
GPUS = [80, 89, 90]


def unwritten_memory(size):
    """Bytes that are NaN as floats and -1 as integers."""
    return torch.full((size,), 255, dtype=torch.uint8)


def nearest(shim, z, codebook, capability=90, seed=0):
    rows = rows_of(z)
    index, size = torch.full(z.shape[:-1], -7), torch.zeros(1, dtype=torch.int64)
    given = (rows.tensor, DTYPES.index(z.dtype), *rows[1:2], *rows[3:], rows.dim)
    codes = (codebook, DTYPES.index(codebook.dtype), *codebook.stride(), codebook.shape[0])
    shim("vq_nearest", *given, *codes, None, None, size, capability)
    memory = unwritten_memory(size.item())
    shim("vq_nearest", *given, *codes, memory, index, size, capability, seed=seed)
    return index


def check(shim, z, codebook, capability=90, seeds=(0,)):
    expected = reference.vq_nearest(z, codebook)
    for seed in seeds:
        assert torch.equal(nearest(shim, z, codebook, capability, seed), expected)
    return expected


@pytest.fixture
def search(shim):
    return shim("vq_nearest")


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 17, 31, 32, 33, 64, 100])
def test_dimensions(search, dim):
    """Every kernel for few dimensions, exact and padded; slices of many, whole and not."""
    for seed, (dtype, kind) in enumerate(zip(DTYPES, ("normal", "ties", "offset"))):
        check(search, *vq_inputs(9, VQShape(150, dim), dtype, kind=kind, seed=seed))


@pytest.mark.parametrize("dim", [3, 20])
def test_numbers_of_rows_and_codes_around_a_tile(search, dim):
    unit = 32 if dim == 3 else 64
    for num_codes in (1, 2, unit - 1, unit, unit + 1, 3 * unit - 1, 3 * unit + 1):
        check(search, *vq_inputs(17, VQShape(num_codes, dim), kind="ties"))
    for num_rows in (1, 63, 64, 65, 129, 257):
        check(search, *vq_inputs(num_rows, VQShape(2 * unit + 5, dim), kind="trained"))


@pytest.mark.parametrize("kind", VQ_KINDS)
@pytest.mark.parametrize("dim", [4, 24])
def test_kinds(search, dim, kind):
    for capability in GPUS:
        check(search, *vq_inputs(60, VQShape(700, dim), kind=kind), capability)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 6, 8, 12, 16])
def test_many_rows_of_few_dimensions(search, dim):
    """8 rows in a thread; several chunks of codes."""
    dtype, num_codes = DTYPES[dim % 3], 1500 if dim < 12 else 4000
    z, codebook = vq_inputs(1100, VQShape(num_codes, dim), dtype, kind="trained")
    check(search, z, codebook, 80)


def test_rows_that_a_warp_finishes_one_after_the_other(search):
    """4 of few dimensions, 2 of many; they have their codes in other splits than their neighbours."""
    check(search, *vq_inputs(2700, VQShape(70, 2), kind="ties"), 86)
    check(search, *vq_inputs(1350, VQShape(200, 17), kind="duplicates"), 86)


def test_many_codes_of_few_dimensions(search):
    check(search, *vq_inputs(30, VQShape(17000, 3)))


def test_many_rows_of_many_dimensions(search):
    """128 rows in a block, on each GPU; several rows in a warp that finishes."""
    for capability, (count, num_codes, dim) in zip(GPUS, [(420, 1900, 20), (520, 1900, 24), (530, 1700, 17)]):
        z, codebook = vq_inputs(count, VQShape(num_codes, dim))
        z[::2] = vq_inputs(count, VQShape(num_codes, dim), kind="ties")[0][::2]
        codebook[900:1000] = codebook[1000:1100]
        check(search, z, codebook, capability)
    check(search, *vq_inputs(1800, VQShape(40, 17)), 80)


@pytest.mark.parametrize(("dim", "capability"), [(300, 89), (800, 90)])
def test_dimensions_in_chunks(search, dim, capability):
    """Where not all of them have room in shared memory."""
    z, codebook = vq_inputs(66, VQShape(140, dim))
    z[::3] = codebook[:22] + 0.001
    codebook[70:80] = codebook[:10]
    check(search, z, codebook, capability)
    nchw = z.t().contiguous().t()
    check(search, nchw, codebook, capability)


def test_the_plan_refuses_what_it_has_no_kernel_for(search):
    z = torch.zeros(2, 5000)
    with pytest.raises(ShimError, match="4096 dimensions"):
        nearest(search, z, z)


@pytest.mark.parametrize("dim", [3, 24])
def test_layouts_and_mixed_dtypes(search, dim):
    z, codebook = vq_inputs(70, VQShape(150, dim))
    expected = check(search, z, codebook)
    images = z.view(2, 5, 7, dim)
    codes = torch.full((150, 2 * dim), torch.nan)
    codes[:, ::2] = codebook
    rows = torch.full((140, dim + 3), torch.nan)
    rows[::2, 3:] = z
    for view in (images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), images, rows[::2, 3:]):
        assert torch.equal(nearest(search, view, codebook).flatten(), expected)
        assert torch.equal(nearest(search, view, codes[:, ::2]).flatten(), expected)
    assert (nearest(search, z[:1].expand(50, dim), codebook.t().contiguous().t()) == expected[0]).all()
    for z_dtype, codebook_dtype in itertools.product(DTYPES, DTYPES):
        check(search, z[:20].to(z_dtype), codebook.to(codebook_dtype))


@pytest.mark.parametrize("dim", [3, 20])
def test_the_order_of_threads_does_not_matter(search, dim):
    z, codebook = vq_inputs(70, VQShape(300, dim), kind="duplicates")
    check(search, z, codebook, seeds=range(4))


@pytest.mark.parametrize("dim", [2, 3, 8, 20])
def test_near_ties_at_the_error_bound(search, dim):
    for z, codebook in near_ties(dim):
        check(search, z, codebook)


@pytest.mark.parametrize("dim", [3, 20])
def test_rows_that_float32_ranks_wrongly(search, dim):
    z, codebook = (torch.nn.functional.pad(x, (0, dim - 3)) for x in wrong_in_float32())
    check(search, z, codebook)


def test_roundings_of_the_float64_distance(search):
    z, codebook = order_of_addition()
    check(search, *shuffled(z, codebook))
    check(search, *(torch.nn.functional.pad(x, (0, 20)) for x in shuffled(z, codebook)))


@pytest.mark.parametrize("dim", [3, 24])
def test_extreme_values(search, dim):
    """Subnormal codes, codes at the end of float32, both at once, and codes that differ in size."""
    z, codebook = vq_inputs(12, VQShape(100, dim))
    largest = torch.finfo(torch.float32).max
    check(search, 1e-44 * z.round(), 1e-44 * codebook.round())
    check(search, 1e-12 * z, 1e-12 * codebook)
    check(search, (1e38 * z).clamp(-largest, largest), (1e38 * codebook).clamp(-largest, largest))
    size = 10.0 ** torch.linspace(-9, 6, 100).unsqueeze(1)
    check(search, z * 10.0 ** torch.linspace(-8, 5, 12).unsqueeze(1), codebook * size)
    codebook[:50] *= 1e-44
    codebook[60] = largest
    z[3:6] *= 1e38
    check(search, z.clamp(-largest, largest), codebook)
    halves = (60000.0 * z).clamp(-65000, 65000).half()
    check(search, halves, (30000.0 * codebook).clamp(-65000, 65000).half())


@pytest.mark.parametrize("dim", [3, 24])
def test_rows_that_are_not_finite_get_0(search, dim):
    z, codebook = vq_inputs(40, VQShape(300, dim))
    expected = check(search, z, codebook)
    for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        z[start::7, start] = bad
        expected[start::7] = 0
    assert torch.equal(nearest(search, z, codebook), expected)
    assert torch.equal(nearest(search, z.t().contiguous().t(), codebook), expected)


def test_all_codes_equal(search):
    for dim, value in itertools.product((2, 30), (0.0, -7.3)):
        z = vq_inputs(20, VQShape(1, dim))[0]
        assert (nearest(search, z, torch.full((700, dim), value)) == 0).all()


# Tensor cores at their worst: in steps of 4 products, these and the accumulator are aligned to the largest
# and lose what is below 24 bits, and so does their sum.
EXACT = """\
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
"""
CUTTING = """\
    for (int k = 0; k < depth; k += 4) {
      for (int column = 0; column < 8; ++column) {
        const auto cut = [](double x, int exponent) {
          const double unit = __builtin_ldexp(1.0, exponent - 24);
          return unit * __builtin_trunc(x / unit);
        };
        double terms[5] = {d[row][column]}, sum = 0.0;
        int exponent = -1000, own;
        for (int i = 0; i < 4; ++i) terms[i + 1] = static_cast<double>(a[row][k + i]) * b[k + i][column];
        for (const double term : terms) {
          if (term != 0.0) __builtin_frexp(term, &own), exponent = own > exponent ? own : exponent;
        }
        for (const double term : terms) sum += cut(term, exponent);
        __builtin_frexp(sum, &own);
        d[row][column] = static_cast<float>(cut(sum, own));
      }
    }
"""
WORST = {"cuda/shim/machine.cpp": (EXACT, CUTTING)}


def test_tensor_cores_that_cut_off(broken_shim):
    cutting = broken_shim("vq_nearest", WORST)
    assert (check(cutting, *cut_off_by_tensor_cores()) == 2).all()
    for kind in ("normal", "vqgan-init", "trained"):
        check(cutting, *vq_inputs(20, VQShape(100, 64), kind=kind))


FEW, MANY = "cuda/vq_nearest_few.cuh", "cuda/vq_nearest_many.cuh"
FINISH, PACK = "cuda/vq_nearest_finish.cuh", "cuda/vq_nearest_pack.cuh"
BOUND = (FINISH, "2.0f * (1.0f + 0x1p-9f) * error", "0.25f * error")
BROKEN = {
    "bound an eighth": (*BOUND, "wrong"),
    "bound an eighth on tensor cores": (*BOUND, "cut off"),
    "other splits": (
        FINISH,
        "if (!(params.found.least.load(at) > limit))",
        "if (params.found.least.load(at) <= least)",
        "wrong",
    ),
    "largest of the first block": (
        FINISH,
        "i < params.largest_count; i += kWarp",
        "i < 1; i += kWarp",
        "later",
    ),
    "highest index": (FINISH, "b.code < a.code) ? b : a", "b.code > a.code) ? b : a", "ties"),
    "fused squares": (
        FINISH,
        "total += multiply(difference, difference)",
        "total = fused_multiply_add(difference, difference, total)",
        "order",
    ),
    "other places": (FEW, "max_number(best[r], least[r])", "others[r]", "equal"),
    "no wait for codes": (FEW, "      wait_group<0>();\n", "", "ties"),
    "no barrier for codes": (FEW, "wait_group<0>();\n      block_sync();", "wait_group<0>();", "ties"),
    "mid hi is missing": (
        MANY,
        "            mma_16x8x16<float16>(small[m][2 * pair + j], mid[m], b_hi);\n",
        "",
        "gaps",
    ),
    "no barrier for rows": (
        MANY,
        "          block_sync();\n          split_rows",
        "          split_rows",
        "chunks",
    ),
    "other lanes": (MANY, "max_number(a.least, b.least))", "vq_infinity())", "many equal"),
    "an overtaken code is forgotten": (
        MANY,
        "max_number(best[r].least, score)",
        "score > best[r].least ? score : best[r].others",
        "overtaken",
    ),
    "largest of the last rows": (
        PACK,
        "largest_norm = max_number(largest_norm, norm)",
        "largest_norm = norm",
        "first",
    ),
    "squares of every other dimension": (
        MANY,
        "tile.scratch.load(row) + tile.scratch.load(Rows + row)",
        "tile.scratch.load(row)",
        "odd",
    ),
    "the task of a neighbour": (FINISH, "shuffle_from(task, i)", "shuffle_from(task, i & ~1)", "many rows"),
    "codes past the last one": (
        PACK,
        "code < params.codebook.count ? norm : vq_infinity()",
        "norm",
        "near 0",
    ),
}


def equal_in_float32():
    """Codes 32 apart, so in two places of one split, of which the second is nearer by about the rounding of a
    score."""
    codebook = torch.nn.functional.normalize(torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)))
    pairs = torch.stack([codebook.view(32, 32, 3), codebook.view(32, 32, 3) * (1.0 + 2.0**-23)], dim=1)
    return 3.0 * codebook[:60], pairs.view(2048, 3)


def large_codes_later():
    """The codes of `wrong_in_float32` after more zeros than one block packs, placed so that the centre, the
    mean of every fourth code, stays 0."""
    z, codes = wrong_in_float32()
    both = torch.cat([codes, codes])
    codebook = torch.zeros(256, 3)
    codebook[128::4] = both[:32]
    codebook[128:].view(32, 4, 3)[:, 1:] = both[32:].view(32, 3, 3)
    return z, codebook


def equal_in_other_lanes():
    z, codebook = (torch.nn.functional.pad(x[:30], (0, 17)) for x in equal_in_float32())
    return z, torch.cat([codebook, codebook * (1.0 + 2.0**-23)])


def overtaken_in_their_lane():
    """Each code of eight is nearer than the one 8 further on by about the rounding of a score: a lane that
    takes the later one has to remember the earlier."""
    z, codebook = (torch.nn.functional.pad(x, (0, 17)) for x in equal_in_float32())
    pairs = codebook.view(32, 2, 4, 8, 20).flip(1).transpose(1, 2)
    return z, pairs.reshape(2048, 20)


def large_codes_first():
    """Of each 64 codes the last 8 are in the centre, where they say nothing of the largest."""
    z, codes = wrong_in_float32()
    codes = codes.repeat(2, 1)[:56]
    codebook = torch.cat([codes, codes.double().mean(dim=0).float().expand(8, 3)])
    return tuple(torch.nn.functional.pad(x, (0, 17)) for x in (z, codebook))


def strided_in_odd_dimensions():
    """The rows that float32 ranks wrongly, where one of two threads of a row has all of it."""
    z, codebook = (x.new_zeros(len(x), 20) for x in wrong_in_float32())
    for padded, given in zip((z, codebook), wrong_in_float32()):
        padded[:, 1:7:2] = given
    return z.t().contiguous().t(), codebook


def beside_the_bisector():
    """Rows far out between two codes, nearer to one by half more than what has all codes looked at: the
    scores alone decide."""
    generator = torch.Generator().manual_seed(0)
    one, other, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    distance = 5.0 + 50.0 * torch.rand(60, 1, dtype=torch.float64, generator=generator)
    gap = 1.5 * 2.0 * (32 + 6) * 2.0**-22 * (1.0 + 2.0 * distance)
    z = distance * (one + other) / 2.0**0.5 + gap / 4.0 * (one - other)
    codebook = torch.stack([other, -other, one, -one])
    return tuple(torch.nn.functional.pad(x, (0, 17)).float() for x in (z, codebook))


INPUTS = {
    "wrong": (wrong_in_float32, 90),
    "cut off": (cut_off_by_tensor_cores, 90),
    "later": (large_codes_later, 90),
    "first": (large_codes_first, 90),
    "odd": (strided_in_odd_dimensions, 90),
    "overtaken": (overtaken_in_their_lane, 90),
    "many rows": (lambda: vq_inputs(2700, VQShape(70, 2), kind="ties"), 86),
    "ties": (lambda: vq_inputs(30, VQShape(300, 3), kind="ties"), 90),
    "near 0": (lambda: tuple(x * s for x, s in zip(vq_inputs(9, VQShape(100, 20)), (0.001, 1.0))), 90),
    "many equal": (equal_in_other_lanes, 90),
    "order": (lambda: shuffled(*order_of_addition()), 90),
    "equal": (equal_in_float32, 90),
    "gaps": (beside_the_bisector, 90),
    "chunks": (lambda: vq_inputs(66, VQShape(140, 300)), 89),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_the_broken_kernels(search, name):
    make, capability = INPUTS[name]
    check(search, *make(), capability)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_seen(broken_shim, name):
    path, before, after, inputs = BROKEN[name]
    make, capability = INPUTS[inputs]
    shim = broken_shim("vq_nearest", {path: (before, after), **(WORST if inputs == "cut off" else {})})
    with pytest.raises(AssertionError):
        check(shim, *make(), capability, seeds=range(3))


def ema_update(shim, z, indices, num_codes, seed=0):
    rows = rows_of(z)
    ordered, order, starts = vq.sorted_by_code(indices, num_codes)
    sums, size = torch.full((num_codes, rows.dim), torch.nan), torch.zeros(1, dtype=torch.int64)
    given = (rows.tensor, DTYPES.index(z.dtype), *rows[1:2], *rows[3:], rows.dim)
    rest = (ordered, order, starts, num_codes)
    shim("vq_ema_update", *given, *rest, None, None, size, 90)
    shim("vq_ema_update", *given, *rest, unwritten_memory(size.item()), sums, size, 90, seed=seed)
    return starts.diff(), sums


def check_sums(shim, z, indices, num_codes):
    counts, sums = ema_update(shim, z, indices, num_codes)
    flat = z.reshape(-1, z.shape[-1])
    one_hot = torch.nn.functional.one_hot(indices.reshape(-1), num_codes)
    assert torch.equal(counts, one_hot.sum(dim=0))
    exact = one_hot.double().T @ flat.double()
    assert_as_accurate(sums, exact, one_hot.float().T @ flat.float(), "sums", terms=max(1, int(counts.max())))
    assert (sums[counts == 0] == 0).all()
    assert torch.equal(ema_update(shim, z, indices, num_codes, seed=1)[1], sums)
    return sums


@pytest.fixture
def summing(shim):
    return shim("vq_ema_update")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 17, 32, 65])
def test_sums(summing, dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    z = (torch.randn(500, dim, generator=generator) + 3.0).to(dtype)
    indices = torch.randint(13, (500,), generator=generator)
    indices[indices == 5] = 6
    sums = check_sums(summing, z, indices, 13)
    pixels = z.view(5, 100, dim).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ema_update(summing, pixels, indices.view(5, 100), 13)[1], sums)


UNIT = 64  # of up to 32 rows a code on average


@pytest.mark.parametrize("num_rows", [1, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT - 1, 2 * UNIT, 4 * UNIT + 1])
def test_sums_of_segments_around_a_unit(summing, num_rows):
    """One code has all rows, or all but some at the beginning or at the end."""
    z = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(num_rows))
    for before in (0, 1, UNIT - 1, UNIT, UNIT + 1):
        indices = torch.full((num_rows,), 4)
        indices[:before] = 3
        check_sums(summing, z, indices, 20)
        check_sums(summing, z, indices.flip(0), 20)


def test_sums_of_random_segments(summing):
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        weights = torch.rand(50, generator=generator) ** 6
        indices = torch.multinomial(weights, 900, replacement=True, generator=generator)
        check_sums(summing, vq_inputs(900, VQShape(1, 5), seed=seed)[0], indices, 50)


def test_sums_with_indices_that_are_no_codes(summing):
    """On a GPU they are not checked; their rows are left out."""
    z, indices = torch.randn(700, 3), torch.randint(-3, 9, (700,))
    indices[:2] = torch.tensor([-(2**40), 2**40 + 2])
    counts, sums = ema_update(summing, z, indices, 6)
    inside = (indices >= 0) & (indices < 6)
    assert torch.equal(counts, torch.bincount(indices[inside], minlength=6))
    torch.testing.assert_close(sums, torch.zeros(6, 3).index_add_(0, indices[inside], z[inside]))


def test_sums_of_what_is_no_number(summing):
    z, indices = torch.randn(20, 3), torch.arange(20) % 4
    z[5, 1], z[6, 2] = torch.nan, torch.inf
    _, sums = ema_update(summing, z, indices, 4)
    assert sums.isnan().nonzero().tolist() == [[1, 1]]
    assert sums.isposinf().nonzero().tolist() == [[2, 2]]


BROKEN_SUMS = {
    "later units lost": ("if (later > 0)", "if (later > 1)"),
    "a unit begins late": (
        "(params.unit - (at - first) % params.unit) % params.unit",
        "params.unit - (at - first) % params.unit",
    ),
    "a row too many": ("at < unit.end;", "at <= unit.end;"),
    "rows of a warp": ("distance >= dims;", "distance > dims;"),
}


@pytest.mark.parametrize("name", BROKEN_SUMS)
def test_broken_sums_are_seen(broken_shim, name):
    shim = broken_shim("vq_ema_update", {"cuda/vq_ema_update.cuh": BROKEN_SUMS[name]})
    generator = torch.Generator().manual_seed(0)
    z, indices = torch.randn(2 * UNIT, 3, generator=generator), torch.full((2 * UNIT,), 5)
    with pytest.raises(AssertionError):
        check_sums(shim, z, indices, 20)


@pytest.fixture
def called(monkeypatch, shim):
    """`ops` with the backend "cuda" on the CPU: the kernels run under the shim."""
    kernels = types.SimpleNamespace()

    def memory_of(driver, function, arguments):
        size = torch.zeros(1, dtype=torch.int64)
        shim(driver)(function, *arguments, None, None, size, 90)
        return size.item()

    def nearest_arguments(z, rows, layout, codebook):
        given = (z, DTYPES.index(z.dtype), rows, *layout, z.shape[-1])
        return *given, codebook, DTYPES.index(codebook.dtype), *codebook.stride(), codebook.shape[0]

    def vq_nearest_memory(z, rows, codebook):
        arguments = nearest_arguments(z, rows, (rows, 0, 0, 0), codebook)
        return memory_of("vq_nearest", "vq_nearest", arguments)

    def vq_nearest(z, rows, *rest):
        *layout, codebook, memory, index = rest
        arguments = nearest_arguments(z, rows, layout, codebook)
        shim("vq_nearest")("vq_nearest", *arguments, memory, index, torch.zeros(1, dtype=torch.int64), 90)

    def sums_arguments(z, rows, layout, *rest):
        return z, DTYPES.index(z.dtype), rows, *layout, z.shape[-1], *rest

    def vq_ema_update_memory(rows, num_codes, dim):
        z = torch.empty(1, dim)
        arguments = sums_arguments(z, rows, (rows, 0, 0, 0), None, None, None, num_codes)
        return memory_of("vq_ema_update", "vq_ema_update", arguments)

    def vq_ema_update(z, rows, *rest):
        *layout, ordered, order, starts, memory, sums = rest
        arguments = sums_arguments(z, rows, layout, ordered, order, starts, sums.shape[0])
        size = torch.zeros(1, dtype=torch.int64)
        shim("vq_ema_update")("vq_ema_update", *arguments, memory, sums, size, 90)

    for function in (vq_nearest_memory, vq_nearest, vq_ema_update_memory, vq_ema_update):
        setattr(kernels, function.__name__, function)
    monkeypatch.setattr(vq, "load_cuda", lambda: kernels)
    monkeypatch.setattr(vq, "refuse", lambda *tensors: None)
    monkeypatch.setattr(cuda, "load_cuda", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {op: cuda.implementation(op) for op in ("vq_nearest", "vq_ema_update")}
    monkeypatch.setattr(dispatch, "find", lambda name, op: found[op])


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("dim", [4, 20])
def test_the_operations(dim):
    z, codebook = vq_inputs(2 * 5 * 7, VQShape(100, dim), kind="trained")
    images = z.view(2, 5, 7, dim).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    with poisoned_memory():
        indices = ops.vq_nearest(images, codebook, backend="cuda")
        counts, sums = ops.vq_ema_update(images, indices, 100, backend="cuda")
    assert torch.equal(indices, reference.vq_nearest(images, codebook))
    exact_counts, exact_sums = reference.vq_ema_update(images, indices, 100)
    assert torch.equal(counts, exact_counts)
    torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-6, atol=1e-6)


def test_keys_and_refusals():
    z, codebook = vq_inputs(300, VQShape(1000, 8), torch.float16)
    expected = {"dtype": "float16", "dim": 8, "codes": 1024, "rows": 512}
    assert vq.nearest_key("forward", (z, codebook)) == expected
    indices = torch.zeros(300, dtype=torch.int64)
    assert vq.ema_update_key("forward", (z, indices, 100000)) == {**expected, "codes": 65536}
    nearest_supports = vq.nearest_implementation().supports
    sums_support = vq.ema_update_implementation().supports
    assert nearest_supports(z, codebook) == sums_support(z, indices, 9) == "runs on CUDA devices, not on cpu"
    assert "not torch.float64" in nearest_supports(z.double(), codebook)
    wide, many = torch.empty(1, 5000, device="meta"), torch.empty((1 << 28) + 1, 1, device="meta")
    assert "4096 dimensions" in nearest_supports(wide, wide)
    assert "2^28 codes" in nearest_supports(many[:1], many)
    assert "2^28 codes" in sums_support(z, indices, 1 << 29)
    broad = torch.empty(1, 32 * 65535 + 1, device="meta")
    assert "2097120 dimensions" in sums_support(broad, indices, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", VQ_KINDS)
@pytest.mark.parametrize("name", [name for name in VQ_LAYERS if name.endswith(("-4096", "-65536"))])
def test_layers_on_the_gpu(name, kind):
    """At their own size; the same bits again."""
    rows, shape = VQ_LAYERS[name]
    for dtype in DTYPES:
        z, codebook = (x.cuda() for x in vq_inputs(rows, shape, dtype, kind=kind))

        def compute(z=z, codebook=codebook):
            with poisoned_memory():
                indices = ops.vq_nearest(z, codebook, backend="cuda")
                return indices, *ops.vq_ema_update(z, indices, len(codebook), backend="cuda")

        indices, counts, sums = results = compute()
        assert all(torch.equal(a, b) for a, b in zip(results, compute()))
        some = torch.arange(0, rows, max(1, rows // 2048), device=z.device)
        assert torch.equal(indices[some], reference.vq_nearest(z[some], codebook))
        exact_counts, exact_sums = reference.vq_ema_update(z, indices, len(codebook))
        assert torch.equal(counts, exact_counts)
        plain = torch.zeros_like(sums).index_add_(0, indices, z.float())
        assert_as_accurate(sums, exact_sums, plain, "sums", terms=max(1, int(counts.max())))


@pytest.mark.gpu
def test_near_ties_on_the_gpu():
    """Real tensor cores, and float64 that must not be fused."""
    hard = [shuffled(*order_of_addition()), cut_off_by_tensor_cores(), wrong_in_float32()]
    for z, codebook in itertools.chain(hard, *map(near_ties, (3, 16, 17, 64, 256))):
        found = ops.vq_nearest(z.cuda(), codebook.cuda(), backend="cuda")
        assert torch.equal(found.cpu(), reference.vq_nearest(z, codebook))


@pytest.mark.gpu
def test_threads_launch_a_kernel_in_two_sizes_at_once():
    """How much shared memory a kernel may take is one number, whichever thread sets it."""
    calls = [[x.cuda() for x in vq_inputs(256, VQShape(256, dim))] for dim in (64, 256)]

    def search_often(call):
        expected = reference.vq_nearest(*call)
        return all(torch.equal(ops.vq_nearest(*call, backend="cuda"), expected) for _ in range(200))

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(search_often, calls))
