"""The compiled vq_nearest and vq_ema_update: what is special to their blocks, chunks, lanes and error bound.

The contract itself is checked for every backend in tests/ops/test_vq.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import assert_as_accurate, live_backends
from fastldm.testing.inputs import VQ_KINDS, vq_inputs
from fastldm.testing.shapes import VQShape

pytestmark = pytest.mark.skipif(
    "cpu" not in live_backends("vq_nearest"), reason="the C++ kernels are not built: `fastldm build`"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(z, codebook):
    indices = ops.vq_nearest(z, codebook, backend="cpu")
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="reference"))
    return indices


@st.composite
def calls(draw):
    """z and codebook of any supported dtype, strides and magnitude, with ties, duplicates and bad rows."""
    shape = VQShape(draw(st.integers(1, 600)), draw(st.integers(1, 24) | st.integers(60, 70)))
    rows = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(VQ_KINDS))
    z, codebook = vq_inputs(rows, shape, kind=kind, seed=draw(st.integers(0, 2**31)))
    if kind != "ties":
        z = z * 2.0 ** draw(st.integers(-160, 120))
        codebook = codebook * 2.0 ** draw(st.integers(-160, 120))
    z, codebook = z.to(draw(st.sampled_from(DTYPES))), codebook.to(draw(st.sampled_from(DTYPES)))
    codebook = codebook.nan_to_num(posinf=1.0, neginf=-1.0)  # overflow of float16
    if draw(st.booleans()):
        z[draw(st.integers(0, rows - 1)), draw(st.integers(0, shape.dim - 1))] = torch.nan
    if draw(st.booleans()):
        z, codebook = z.t().contiguous().t(), codebook.repeat(1, 2)[:, : shape.dim]
    return z, codebook


@settings(max_examples=300, deadline=None)
@given(calls())
def test_any_call(call):
    check(*call)


def test_every_number_of_codes_around_a_block():
    """Panels, blocks and lanes that are full, almost full and just begun."""
    for dim in (1, 3, 8, 9):
        for num_codes in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 513):
            check(*vq_inputs(29, VQShape(num_codes, dim)))


def test_every_number_of_rows_around_a_block():
    for dim in (4, 20):
        codebook = vq_inputs(1, VQShape(50, dim))[1]
        z = vq_inputs(200, VQShape(50, dim), seed=1)[0]
        expected = ops.vq_nearest(z, codebook, backend="reference")
        for rows in (*range(1, 27), 63, 64, 65, 95, 96, 97, 191, 192, 193):
            assert torch.equal(ops.vq_nearest(z[:rows], codebook, backend="cpu"), expected[:rows])


@pytest.mark.parametrize("shape", [VQShape(40000, 5), VQShape(2300, 80)])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "vqgan-init"])
def test_codebook_packed_in_several_chunks(shape, kind):
    z, codebook = vq_inputs(150, shape, kind=kind)
    # The lowest index wins across chunks too, and a row that is not finite stays at 0.
    codebook[-100:] = codebook[:100]
    z[:100] = codebook[:100] + 0.01
    z[50] = torch.inf
    indices = check(z, codebook)
    assert indices[50] == 0


def test_many_rows_with_several_chunks():
    """More rows than one round over the chunks takes."""
    z, codebook = vq_inputs(5000, VQShape(2300, 65), kind="trained")
    indices = ops.vq_nearest(z, codebook, backend="cpu")
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="torch"))
    some = torch.arange(0, 5000, 97)
    assert torch.equal(indices[some], ops.vq_nearest(z[some], codebook, backend="reference"))


@pytest.mark.parametrize("dim", [1, 3, 8, 9, 64])
def test_duplicates_anywhere(dim):
    """Pairs in one lane, one block, neighbouring lanes and blocks: the gap between them is zero, and seen."""
    z, codebook = vq_inputs(60, VQShape(700, dim))
    for distance in (1, 2, 8, 16, 17, 32, 64, 128, 256, 300, 512):
        doubled = codebook.clone()
        doubled[distance:] = torch.where(
            torch.arange(700 - distance).unsqueeze(1) % 3 == 0, codebook[:-distance], codebook[distance:]
        )
        check(z, doubled)


@pytest.mark.parametrize("dim", [2, 3, 4, 8, 9])
def test_near_ties_at_the_error_bound(dim):
    """Codes on a sphere around z are equally far to within their own rounding, so that float32 puts many of
    them before the nearest. Fails if the bound in csrc/cpu/vq_codes.h is eight times too small."""
    generator = torch.Generator().manual_seed(dim)
    for radius in (1.0, 1.001, 1.4e-20, 3e15):
        directions = torch.randn(2000, dim, dtype=torch.float64, generator=generator)
        directions = torch.cat([directions, -directions])
        codebook = (radius * directions / directions.norm(dim=1, keepdim=True)).float()
        z = (radius * 3e-8 * torch.randn(400, dim, generator=generator)).float()
        check(z, codebook)
        check(z + 0.01 * radius, codebook)


@pytest.mark.parametrize("dim", [3, 16])
def test_extreme_values(dim):
    """Subnormal codes, codes at the end of float32, and both at once."""
    z, codebook = vq_inputs(30, VQShape(300, dim))
    largest = torch.finfo(torch.float32).max
    check(1e-44 * z.round(), 1e-44 * codebook.round())
    check(1e-40 * z, 1e-40 * codebook)
    check((1e38 * z).clamp(-largest, largest), (1e38 * codebook).clamp(-largest, largest))
    codebook[:100] *= 1e-44
    codebook[200] = largest
    z[3:6] *= 1e38
    check(z.clamp(-largest, largest), codebook)


def test_bad_rows_between_good_ones():
    for dim in (3, 12):
        z, codebook = vq_inputs(100, VQShape(300, dim))
        expected = ops.vq_nearest(z, codebook, backend="reference")
        for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            z[start::7, start] = bad
            expected[start::7] = 0
        assert torch.equal(ops.vq_nearest(z, codebook, backend="cpu"), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_all_codes_equal(value):
    for dim in (2, 30):
        z, _ = vq_inputs(20, VQShape(1, dim))
        assert (ops.vq_nearest(z, torch.full((700, dim), value), backend="cpu") == 0).all()


def test_thread_counts_and_threads():
    z, codebook = vq_inputs(3000, VQShape(600, 20), kind="ties")
    indices = ops.vq_nearest(z, codebook)
    sums = ops.vq_ema_update(z, indices, 600, backend="cpu")[1]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(check(z, codebook), indices)
            assert torch.equal(ops.vq_ema_update(z, indices, 600, backend="cpu")[1], sums)
    finally:
        torch.set_num_threads(before)

    def call(_):
        found = ops.vq_nearest(z, codebook, backend="cpu")
        return found, ops.vq_ema_update(z, indices, 600, backend="cpu")[1]

    with ThreadPoolExecutor(4) as pool:
        for found, found_sums in pool.map(call, range(12)):
            assert torch.equal(found, indices)
            assert torch.equal(found_sums, sums)


def test_inference_mode_and_gradients():
    z, codebook = vq_inputs(50, VQShape(100, 6))
    expected = check(z, codebook)
    with torch.inference_mode():
        assert torch.equal(ops.vq_nearest(z, codebook, backend="cpu"), expected)
        ops.vq_ema_update(z, expected, 100, backend="cpu")
    z.requires_grad_()
    z_q, _ = ops.vq_quantize(z, codebook, backend="cpu")
    z_q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 4, 7, 8, 16, 17, 50, 256])
def test_sums(dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    z = (torch.randn(4000, dim, generator=generator) + 3.0).to(dtype)
    indices = torch.randint(37, (4000,), generator=generator)
    indices[indices == 5] = 6
    counts, sums = ops.vq_ema_update(z, indices, 37, backend="cpu")
    one_hot = torch.nn.functional.one_hot(indices, 37)
    assert torch.equal(counts, one_hot.sum(dim=0))
    assert (sums[5] == 0).all()
    exact = one_hot.double().T @ z.double()
    assert_as_accurate(sums, exact, one_hot.float().T @ z.float(), "sums", terms=int(counts.max()))
    strided = z.t().contiguous().t()
    assert torch.equal(ops.vq_ema_update(strided, indices, 37, backend="cpu")[1], sums)


def test_sums_add_the_rows_in_their_order():
    """1e8 swallows what comes after it, not what comes before."""
    z = torch.tensor([3.0, 3.0, 1e8, -1e8]).unsqueeze(1).repeat(1, 20)
    _, sums = ops.vq_ema_update(z, torch.zeros(4, dtype=torch.int64), 1, backend="cpu")
    assert torch.equal(sums, torch.full((1, 20), 8.0))


def test_float64_is_refused():
    z, codebook = vq_inputs(5, VQShape(10, 4), torch.float64)
    for call in (
        lambda: ops.vq_nearest(z, codebook, backend="cpu"),
        lambda: ops.vq_nearest(z.float(), codebook, backend="cpu"),
        lambda: ops.vq_ema_update(z, torch.zeros(5, dtype=torch.int64), 10, backend="cpu"),
    ):
        with pytest.raises(UnsupportedError, match="float64"):
            call()
