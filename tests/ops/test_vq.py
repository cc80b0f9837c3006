from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from fastldm import ops
from fastldm.errors import InputError
from fastldm.testing import assert_as_accurate, live_backends
from fastldm.testing.inputs import VQ_KINDS, vq_inputs
from fastldm.testing.shapes import VQ, VQShape

BACKENDS = live_backends("vq_nearest")
EMA_BACKENDS = live_backends("vq_ema_update")


def with_dtypes(backends, *dtypes):
    """The kernels of our own refuse float64 (tests/native)."""
    takes_float64 = ("reference", "torch")
    return [(b, d) for b in backends for d in dtypes if d != torch.float64 or b in takes_float64]


def truth(z, codebook):
    """Lowest index of least float64 distance, squares added in the order of the dimensions, row by row."""
    z, codebook = z.double(), codebook.double()
    indices = []
    for row in z:
        distance = torch.zeros(codebook.shape[0], dtype=torch.float64)
        for d in range(codebook.shape[1]):
            distance += (row[d] - codebook[:, d]).square()
        indices.append((distance == distance.min()).nonzero()[0, 0])
    return torch.stack(indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", VQ_KINDS)
@pytest.mark.parametrize("name", VQ)
def test_index_is_the_float64_argmin(name, kind, backend):
    z, codebook = vq_inputs(60, VQ[name], kind=kind)
    assert torch.equal(ops.vq_nearest(z, codebook, backend=backend), truth(z, codebook))


@pytest.mark.parametrize(
    ("backend", "dtype"), with_dtypes(BACKENDS, torch.bfloat16, torch.float16, torch.float64)
)
@pytest.mark.parametrize("kind", ["normal", "offset", "vqgan-init"])
def test_dtypes(kind, dtype, backend):
    z, codebook = vq_inputs(80, VQShape(1000, 8), dtype, kind=kind)
    assert torch.equal(ops.vq_nearest(z, codebook, backend=backend), truth(z, codebook))
    mixed = codebook.float()
    assert torch.equal(ops.vq_nearest(z, mixed, backend=backend), truth(z, mixed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_and_shapes(backend):
    """More rows than one block and one chunk of scores, with open and closed rows in each."""
    z, codebook = vq_inputs(6000, VQShape(700, 16), kind="trained")
    z[::7] = vq_inputs(858, VQShape(700, 16), kind="ties")[0]
    indices = ops.vq_nearest(z, codebook, backend=backend)
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="reference"))
    assert torch.equal(
        ops.vq_nearest(z.view(2, 30, 100, 16), codebook, backend=backend), indices.view(2, 30, 100)
    )
    channels_first = z.view(2, 3000, 16).transpose(1, 2).contiguous()
    assert torch.equal(
        ops.vq_nearest(channels_first.transpose(1, 2), codebook, backend=backend), indices.view(2, 3000)
    )
    assert torch.equal(ops.vq_nearest(z[5], codebook, backend=backend), indices[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowest_index_wins_exact_ties(backend):
    codebook = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).repeat(500, 1)
    z = codebook[:40] + 0.25
    indices = ops.vq_nearest(z, codebook, backend=backend)
    assert torch.equal(indices, torch.arange(40) % 4)
    same = ops.vq_nearest(z, torch.ones(2000, 24), backend=backend)
    assert torch.equal(same, torch.zeros(40, dtype=torch.int64))


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(BACKENDS, torch.float32, torch.float64))
@pytest.mark.parametrize("dim", [2, 3])
def test_rows_that_float32_ranks_wrongly(dim, dtype, backend):
    """Rows on the bisector of two neighbours on the unit sphere, up to 100 times as far out.

    The two scores, of size 2 |z|, differ by less than their rounding: float32 alone takes the wrong code in 2
    rows of 5, by up to a fifth of the worst case that an error analysis allows.
    """
    generator = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(250, dim, generator=generator, dtype=dtype))
    neighbour = (codebook @ codebook.T).fill_diagonal_(-2.0).argmax(dim=1)
    distance = 10 ** (2 * torch.rand(32, 250, 1, generator=generator, dtype=dtype))
    z = (codebook + codebook[neighbour]) / 2 * distance
    indices = ops.vq_nearest(z, codebook, backend=backend)
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e15, 1e25, 3e38])
def test_magnitudes_that_leave_float32(magnitude, backend):
    """Products of the inputs underflow or overflow in float32, not in float64."""
    z, codebook = vq_inputs(60, VQShape(1000, 8))
    z = z / z.abs().max() * magnitude
    codebook = codebook / codebook.abs().max() * magnitude
    assert torch.equal(ops.vq_nearest(z, codebook, backend=backend), truth(z, codebook))
    assert torch.equal(ops.vq_nearest(z, codebook * 1e-3, backend=backend), truth(z, codebook * 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e-20, 1e-42])
def test_codes_that_vanish_beside_z(scale, backend):
    """Float64 hardly tells their distances apart, then not at all: all are equal and index 0 wins."""
    for dim in (3, 16):
        z, codebook = vq_inputs(40, VQShape(1000, dim))
        indices = ops.vq_nearest(z, scale * codebook, backend=backend)
        assert torch.equal(indices, truth(z, scale * codebook))
        assert (indices == 0).all() == (scale < 1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matrix_product_precision(precision, backend):
    """The user may let float32 products use fewer bits; the index stays exact."""
    z, codebook = vq_inputs(200, VQShape(1000, 32))
    expected = truth(z, codebook)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(ops.vq_nearest(z, codebook, backend=backend), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        (torch.backends.cuda.matmul, "tf32"),
        (torch.backends.mkldnn.matmul, "tf32"),
        (torch.backends.mkldnn.matmul, "bf16"),
    ],
)
def test_reduced_precision_of_one_backend(setting, precision, backend):
    """With such a setting `torch.get_float32_matmul_precision()` raises."""
    z, codebook = vq_inputs(200, VQShape(1000, 32))
    expected = truth(z, codebook)
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        assert torch.equal(ops.vq_nearest(z, codebook, backend=backend), expected)
    finally:
        setting.fp32_precision = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [3, 300])
def test_row_that_is_not_finite_gets_index_0(count, bad, backend):
    z, codebook = vq_inputs(count, VQShape(1000, 8))
    clean = ops.vq_nearest(z, codebook, backend=backend)
    z[1, 3] = bad
    indices = ops.vq_nearest(z, codebook, backend=backend)
    clean[1] = 0
    assert torch.equal(indices, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codebook_that_is_not_finite_is_refused(backend):
    z, codebook = vq_inputs(5, VQShape(10, 4))
    for bad, function in itertools.product((torch.nan, torch.inf), (ops.vq_nearest, ops.vq_quantize)):
        codebook[7, 2] = bad
        for rows in (z, z[:0]):
            with pytest.raises(InputError, match="NaN or infinity"):
                function(rows, codebook, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_empty(shape, backend):
    codebook = torch.randn(10, 4)
    z = torch.randn(shape, requires_grad=True)
    indices = ops.vq_nearest(z, codebook, backend=backend)
    assert indices.shape == shape[:-1]
    assert indices.dtype == torch.int64
    z_q, _ = ops.vq_quantize(z, codebook, backend=backend)
    z_q.sum().backward()
    assert z_q.shape == z.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize(dtype, backend):
    z, codebook = vq_inputs(50, VQShape(64, 8))
    z = z.to(dtype).view(5, 10, 8).requires_grad_()
    codebook.requires_grad_()
    z_q, indices = ops.vq_quantize(z, codebook, backend=backend)
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend=backend))
    assert not indices.requires_grad
    assert z_q.dtype == dtype
    assert torch.equal(z_q, codebook[indices].to(dtype))
    grad = torch.randn_like(z_q)
    z_q.backward(grad)
    assert torch.equal(z.grad, grad)
    assert codebook.grad is None


def test_memory_of_the_torch_backend_does_not_grow_with_rows_times_codes():
    """No tensor of N x K elements is ever made: the largest one stays at a few MB."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return result

    for kind in ("normal", "duplicates", "vqgan-init"):
        z, codebook = vq_inputs(1500, VQShape(8192, 4), kind=kind)
        implementation = importlib.import_module("fastldm.eager.vq")
        with Watch():
            implementation.vq_nearest(z, codebook)
    assert largest <= 4 << 20


@pytest.mark.parametrize(
    ("backend", "dtype"), with_dtypes(EMA_BACKENDS, torch.float32, torch.bfloat16, torch.float64)
)
def test_ema_update(dtype, backend):
    z, codebook = vq_inputs(3000, VQShape(40, 6), dtype)
    indices = ops.vq_nearest(z, codebook)
    indices[indices == 7] = 8
    one_hot = torch.nn.functional.one_hot(indices, 40).double()
    counts, sums = ops.vq_ema_update(z.view(3, 1000, 6), indices.view(3, 1000), 40, backend=backend)
    assert counts.dtype == torch.int64
    assert sums.dtype == torch.float32
    assert torch.equal(counts, one_hot.sum(dim=0).long())
    exact = one_hot.T @ z.double()
    assert_as_accurate(sums, exact, (one_hot.T.float() @ z.float()), "sums", terms=int(counts.max()))
    assert (sums[7] == 0).all()
    again = ops.vq_ema_update(z.view(3, 1000, 6), indices.view(3, 1000), 40, backend=backend)
    assert torch.equal(again[1], sums)


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_ema_update_of_nothing(backend):
    empty = torch.empty(0, dtype=torch.int64)
    counts, sums = ops.vq_ema_update(torch.randn(0, 3), empty, 5, backend=backend)
    assert torch.equal(counts, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(sums, torch.zeros(5, 3))
    counts, sums = ops.vq_ema_update(torch.randn(4, 0), torch.tensor([4, 0, 4, 1]), 5, backend=backend)
    assert torch.equal(counts, torch.tensor([1, 1, 0, 0, 2]))
    assert sums.shape == (5, 0)


def test_sorted_segments_of_the_torch_backend_agree():
    """The path for devices other than the CPU."""
    implementation = importlib.import_module("fastldm.eager.vq")
    z, codebook = vq_inputs(500, VQShape(40, 6))
    indices = ops.vq_nearest(z, codebook)
    counts = torch.bincount(indices, minlength=40)
    sums = implementation.sum_by_segment(z, indices, counts)
    torch.testing.assert_close(sums, ops.vq_ema_update(z, indices, 40)[1], rtol=1e-5, atol=1e-5)


Z = torch.randn(3, 4)
INDICES = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0), Z), ValueError, r"\(\.\.\., D\)"),
        ((Z, Z[0]), ValueError, r"\(K, D\)"),
        ((Z.long(), Z), TypeError, "floating point"),
        ((Z, Z.long()), TypeError, "floating point"),
        ((Z, Z[:0]), ValueError, "at least one code"),
        ((Z, torch.randn(5, 3)), ValueError, "share D, got 4 and 3"),
        ((Z, Z.to("meta")), ValueError, "one device"),
    ],
)
@pytest.mark.parametrize("function", [ops.vq_nearest, ops.vq_quantize])
def test_refused_arguments(function, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        function(*arguments)
    assert isinstance(raised.value, InputError)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Z, INDICES[:2], 5), ValueError, r"indices \(\.\.\.\)"),
        ((Z.long(), INDICES, 5), TypeError, "floating point"),
        ((Z, INDICES.int(), 5), TypeError, "int64"),
        ((Z, INDICES, 0), ValueError, "at least 1"),
        ((Z, INDICES, 30.0), TypeError, "num_codes must be a whole number"),
        ((Z, [0, 0, 0], 5), TypeError, "indices must be a tensor"),
        ((Z, INDICES.to("meta"), 5), ValueError, "one device"),
        ((Z, INDICES - 1, 5), ValueError, r"0 \.\. 4, got -1 \.\. -1"),
        ((Z, INDICES + 5, 5), ValueError, r"got 5 \.\. 5"),
        ((Z[:, :0], INDICES + 5, 5), ValueError, r"got 5 \.\. 5"),
        ((Z[:, :0], INDICES - 1, 5), ValueError, r"got -1 \.\. -1"),
    ],
)
def test_ema_update_refuses(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.vq_ema_update(*arguments)
    assert isinstance(raised.value, InputError)
