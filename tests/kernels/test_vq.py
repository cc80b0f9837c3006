"""The Triton vq_nearest and vq_ema_update: what is special to their tiles, branches, error bounds and
configurations.

The contract itself is checked for every backend in tests/ops/test_vq.py. Without a GPU the kernels run in
Triton's interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from contextlib import ExitStack, contextmanager

import pytest
import torch

from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import assert_as_accurate, live_backends, poisoned_memory
from fastldm.testing.inputs import VQ_KINDS, vq_inputs
from fastldm.testing.shapes import VQ_LAYERS, VQShape

pytestmark = pytest.mark.skipif("triton" not in live_backends("vq_nearest"), reason="Triton is not installed")

if "triton" in live_backends("vq_nearest"):
    from fastldm.kernels.common import rows, tables
    from fastldm.kernels.common.target import KNOWN
    from fastldm.kernels.vq import configs, finish, nearest
    from fastldm.kernels.vq.bound import relative_error_few, relative_error_many

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


def on_device(*tensors):
    moved = tuple(tensor.to(DEVICE) for tensor in tensors)
    return moved if len(moved) > 1 else moved[0]


def check(z, codebook):
    z, codebook = on_device(z, codebook)
    indices = ops.vq_nearest(z, codebook, backend="triton")
    assert indices.dtype == torch.int64
    assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="reference"))
    return indices


def check_all(problems):
    for z, codebook in problems:
        check(z, codebook)


@contextmanager
def forced(**config):
    """Configurations by kernel: search_few=FewConfig(...), ..."""
    with ExitStack() as stack:
        for kernel, value in config.items():
            stack.enter_context(tables.forcing("vq", kernel, value))
        yield


# Small tiles, so that small problems have many: blocks of 128 codes, tiles of 32.
def small_few(**changes):
    return configs.FewConfig(16, 32, 4, 2, 4)._replace(**changes)


def small_many(**changes):
    return configs.ManyConfig(16, 32, 32, 4, 1)._replace(**changes)


def small_finish(**changes):
    return configs.FinishConfig(16, 64, 4, 64, 4)._replace(**changes)


@pytest.fixture
def one_split(monkeypatch):
    """One program goes over all codes for its rows."""
    monkeypatch.setattr(nearest, "_PROGRAMS", 0)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 63, 64, 65, 128, 200, 256, 300])
def test_dimensions(dim):
    """Every way to take the dimensions: all at once and exactly, padded, in chunks; and to rank them
    again."""
    for seed, (dtype, kind) in enumerate(zip(DTYPES, ("normal", "ties", "offset"))):
        z, codebook = vq_inputs(9, VQShape(150, dim), dtype, kind=kind, seed=seed)
        check(z, codebook)


@pytest.mark.parametrize("dim", [3, 20])
@pytest.mark.parametrize("splits", [1, 3])
def test_numbers_of_rows_and_codes_around_a_tile(dim, splits, monkeypatch):
    monkeypatch.setattr(nearest, "_PROGRAMS", 0 if splits == 1 else 4)
    block = 128 if dim == 3 else 32
    with forced(search_few=small_few(), search_many=small_many(), finish=small_finish()):
        for num_codes in (1, 2, block - 1, block, block + 1, 3 * block - 1, 3 * block + 1):
            for kind in ("normal", "ties"):
                check(*vq_inputs(17, VQShape(num_codes, dim), kind=kind))
        for num_rows in (1, 15, 16, 33):
            check(*vq_inputs(num_rows, VQShape(2 * block + 5, dim), kind="ties"))


@pytest.mark.parametrize("kind", VQ_KINDS)
@pytest.mark.parametrize("dim", [4, 24])
def test_kinds_over_several_tiles_and_splits(dim, kind):
    with forced(search_few=small_few(), search_many=small_many(), finish=small_finish()):
        check(*vq_inputs(40, VQShape(600, dim), kind=kind))


FEW = [(16, 16, 2, 1, 1), (16, 32, 16, 4, 4), (32, 64, 8, 8, 8), (128, 32, 8, 2, 8)]
MANY = [(16, 16, 64, 1, 1), (32, 64, 64, 4, 2), (128, 32, 32, 8, 3), (64, 128, 16, 8, 2)]


@pytest.mark.parametrize(("config", "dim"), [(c, 3) for c in FEW] + [(c, 40) for c in MANY])
def test_forced_configurations(config, dim):
    """The index does not depend on the configuration; MANY has one, two and three chunks of dimensions."""
    z, codebook = vq_inputs(20, VQShape(300, dim))
    z[::3], _ = vq_inputs(7, VQShape(300, dim), kind="ties")
    codebook[100:200] = codebook[:100]
    make = configs.FewConfig if dim == 3 else configs.ManyConfig
    with forced(**{"search_few" if dim == 3 else "search_many": make(*config)}):
        check(z, codebook)


@pytest.mark.parametrize("kernel", ["search_few", "search_many", "finish", "ema_update"])
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_heuristics_are_among_the_candidates(kernel, capability):
    target = KNOWN[capability]
    for layer in VQ_LAYERS.values():
        num_codes, dim = layer.codebook
        if (kernel == "search_few") != (dim <= configs.FEW) and kernel.startswith("search"):
            continue
        with tables.watching() as calls:
            problem = (dim, num_codes, layer.rows)
            chosen = {
                "search_few": lambda p=problem: configs.few(*p, target),
                "search_many": lambda p=problem: configs.many(*p, target),
                "finish": lambda p=problem: configs.finish(p[0], p[2], target),
                "ema_update": lambda p=problem: configs.ema_update(*p, target),
            }[kernel]()
        (choice,) = calls
        found = configs.candidates(choice.kernel, choice.key, target)
        assert choice.kernel == kernel
        assert choice.candidates == tuple(found)
        assert found[0] == chosen
        assert len(set(found)) == len(found)


@pytest.fixture
def ranked(monkeypatch):
    """How many rows each call of `rank` takes at most."""
    calls = []
    original = finish.rank

    def counting(*args):
        calls.append(int(getattr(args[-1], "value", args[-1])))
        return original(*args)

    monkeypatch.setattr(finish, "rank", counting)
    return calls


@pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
@pytest.mark.parametrize("dim", [3, 20])
def test_rows_are_ranked_again_one_by_one_or_together(dim, ranked):
    codebook = vq_inputs(16, VQShape(200, dim))[1]
    with forced(search_few=small_few(), search_many=small_many(), finish=small_finish()):
        codebook[150:] = codebook[:50]  # equal codes in other places
        z = codebook[50:66] + 0.001
        check(z, codebook)
        assert ranked == []
        z[[3, 9]] = codebook[[2, 7]] + 0.001
        check(z, codebook)
        assert ranked == [1, 1]
        ranked.clear()
        z[:7] = codebook[:7] + 0.001
        check(z, codebook)
        assert ranked == [4, 4]


def near_ties(dim):
    """Codes on a sphere around z are equally far to within their own rounding, so that float32 puts many of
    them before the nearest."""
    generator = torch.Generator().manual_seed(dim)
    for radius in (1.0, 1.4e-20, 3e15):
        directions = torch.randn(300, dim, dtype=torch.float64, generator=generator)
        directions = torch.cat([directions, -directions])
        codebook = (radius * directions / directions.norm(dim=1, keepdim=True)).float()
        z = (radius * 3e-8 * torch.randn(40, dim, generator=generator)).float()
        yield torch.cat([z, z[:20] + 0.01 * radius]), codebook


@pytest.mark.parametrize("dim", [2, 3, 8, 20])
def test_near_ties_at_the_error_bound(dim):
    for z, codebook in near_ties(dim):
        check(z, codebook)


def gaps_past_the_limit(dim):
    """Rows between two neighbours, nearer to one by half more than what makes a row open: the scores alone
    decide, and with a part of z'.e' missing they decide wrongly."""
    _, codebook = vq_inputs(1, VQShape(200, dim))
    codebook -= codebook.mean(dim=0)
    distance = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    other = codebook[distance.argmin(dim=1)]
    middle, apart = (codebook + other) / 2, codebook - other
    relative = relative_error_few(dim) if dim <= configs.FEW else relative_error_many(-(-dim // 32) * 32)
    largest = codebook.norm(dim=1).max()
    gap = 1.5 * 2.0 * relative * largest * (largest + 2.0 * middle.norm(dim=1, keepdim=True))
    return middle + apart * gap / (2.0 * apart.square().sum(dim=1, keepdim=True)), codebook


@pytest.mark.parametrize("dim", [3, 20, 30])
def test_gaps_just_past_the_limit(dim):
    with forced(search_many=small_many(codes=64)):
        check(*gaps_past_the_limit(dim))


def wrong_in_float32():
    """Rows far out on the bisector of two neighbours on the unit sphere, where the scores have rounding
    errors of the size of their difference; of many the 100 in which float32 takes the wrong one by most.

    The codes are pairs of opposites, so that the centre is 0 and the scores are those of the kernel, but for
    double rounding.
    """
    generator = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(32, 3, generator=generator))
    codebook = torch.stack([codebook, -codebook], dim=1).view(64, 3)
    one = torch.arange(64).repeat(4000)
    other = (codebook @ codebook.T).fill_diagonal_(-2.0).argmax(dim=1)[one]
    distance = 1 + 100 * torch.rand(len(one), 1, generator=generator)
    z = (codebook[one] + codebook[other]) / 2 * distance

    def score(code):
        total = code.double().square().sum(dim=1).float()
        for d in range(3):
            total = (total.double() - 2.0 * z[:, d].double() * code[:, d].double()).float()
        return total.double()

    def true_score(code):
        return code.double().square().sum(dim=1) - 2.0 * (z.double() * code.double()).sum(dim=1)

    difference = score(codebook[one]) - score(codebook[other])
    wrong = difference * (true_score(codebook[one]) - true_score(codebook[other])) < 0
    worst = torch.where(wrong, difference.abs() / z.norm(dim=1), 0.0).topk(100).indices
    return z[worst], codebook


def test_rows_that_float32_ranks_wrongly_on_tensor_cores():
    """In a tile that also has lanes without a code, at the distance infinity."""
    z, codebook = (torch.nn.functional.pad(x, (0, 17)) for x in wrong_in_float32())
    with forced(search_many=small_many(codes=128)):
        check(z, codebook)


def order_of_addition():
    """The components of a code in every order: the same real distance from a row of equal components, so that
    the roundings of squares and sums decide. The differences have so many bits that their squares are
    rounded."""
    generator = torch.Generator().manual_seed(0)
    triples = torch.randn(40, 3, generator=generator)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    codebook = 1e-3 * triples[:, orders].reshape(-1, 3)
    z = torch.randn(64, 1, generator=generator).repeat(1, 3)
    return z, codebook


def shuffled(z, codebook):
    return z, codebook[torch.randperm(len(codebook), generator=torch.Generator().manual_seed(1))]


def test_roundings_of_the_float64_distance():
    z, codebook = order_of_addition()
    check(*shuffled(z, codebook))
    for first in range(0, 60, 6):
        check(z, codebook[first : first + 6])


def cut_off_by_tensor_cores():
    """Two codes: of z'.e' with the first, 63 of 64 products are just below what an accumulator of 24 bits
    that cuts off keeps. The first is the nearest, and far behind if they are lost."""
    first = torch.full((64,), 2.0**-11)
    first[0] = 1.0 - 106 * 2.0**-24
    second = torch.zeros(64)
    second[0] = 1.0
    z = torch.full((64,), 2.0**-9 * (1.0 - 2.0**-9))
    z[0] = 9.0
    return z.repeat(3, 1), torch.stack([second, -second, first, -first])


@pytest.fixture
def cutting_tensor_cores(monkeypatch):
    """The interpreter's tl.dot as tensor cores at their worst: in steps of 4 products, these and the
    accumulator are aligned to the largest and lose what is below 24 bits, and so does their sum."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import numpy as np

    def cut(x, exponent):
        unit = np.ldexp(1.0, exponent - 23)
        return np.trunc(x / unit) * unit

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.astype(np.float64)
        x, y = a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(0, x.shape[1], 4):
            terms = np.concatenate([total[None], x.T[k : k + 4, :, None] * y[k : k + 4, None, :]])
            exponent = np.frexp(np.abs(terms).max(axis=0))[1] - 1
            total = cut(terms, exponent).sum(axis=0)
            total = cut(total, np.frexp(total)[1] - 1)
        return interpreter.TensorHandle(total.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.skipif(DEVICE != "cpu", reason="changes the interpreter")
@pytest.mark.usefixtures("cutting_tensor_cores")
@pytest.mark.parametrize("block_d", [64, 16])
def test_tensor_cores_that_cut_off(block_d):
    with forced(search_many=configs.ManyConfig(16, 32, block_d, 4, 1)):
        assert (check(*cut_off_by_tensor_cores()) == 2).all()
        for kind in ("normal", "vqgan-init", "trained"):
            check(*vq_inputs(20, VQShape(100, 64), kind=kind))


@pytest.mark.parametrize("dim", [3, 24])
def test_extreme_values(dim):
    """Subnormal codes, codes at the end of float32, and both at once."""
    z, codebook = vq_inputs(12, VQShape(100, dim))
    largest = torch.finfo(torch.float32).max
    check(1e-44 * z.round(), 1e-44 * codebook.round())
    check(1e-12 * z, 1e-12 * codebook)
    check((1e38 * z).clamp(-largest, largest), (1e38 * codebook).clamp(-largest, largest))
    codebook[:50] *= 1e-44
    codebook[60] = largest
    z[3:6] *= 1e38
    check(z.clamp(-largest, largest), codebook)


@pytest.mark.parametrize("dim", [3, 24])
def test_codes_of_different_size_in_one_tile(dim):
    """The scale of the float16 halves is that of the largest code."""
    z, codebook = vq_inputs(40, VQShape(128, dim))
    size = 10.0 ** torch.linspace(-9, 6, 128).unsqueeze(1)
    check(z * 10.0 ** torch.linspace(-8, 5, 40).unsqueeze(1), codebook * size)
    codebook[[5, 70]] *= 1e-4
    check(1.01 * codebook[::5], codebook)


@pytest.mark.parametrize("dim", [3, 24])
def test_bad_rows_between_good_ones(dim):
    z, codebook = vq_inputs(40, VQShape(300, dim))
    z, codebook = on_device(z, codebook)
    expected = ops.vq_nearest(z, codebook, backend="reference")
    for start, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        z[start::7, start] = bad
        expected[start::7] = 0
    assert torch.equal(ops.vq_nearest(z, codebook, backend="triton"), expected)


@pytest.mark.parametrize("dim", [2, 30])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_all_codes_equal(dim, value):
    z, _ = vq_inputs(5, VQShape(1, dim))
    assert (check(z, torch.full((300, dim), value)) == 0).all()


@pytest.mark.parametrize("dim", [3, 24])
def test_layouts(dim):
    z, codebook = vq_inputs(2 * 3 * 4, VQShape(100, dim))
    z, codebook = on_device(z, codebook)
    expected = check(z, codebook).view(2, 3, 4)
    nhwc = z.view(2, 3, 4, dim)
    nchw = nhwc.permute(0, 3, 1, 2).contiguous()
    wide = torch.empty(2, 3, 4, 3 * dim, device=DEVICE).fill_(torch.nan)
    wide[..., dim : 2 * dim] = nhwc
    views = {
        "NCHW": nchw.permute(0, 2, 3, 1),
        "slice": wide[..., dim : 2 * dim],
        "transposed": nhwc.transpose(0, 2).contiguous().transpose(0, 2),
        "every dimension strided": nhwc.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
        "backwards in memory": nhwc.flip(1).contiguous().flip(1),
    }
    for name, view in views.items():
        for codes in (codebook, codebook.t().contiguous().t(), codebook.repeat(1, 2)[:, :dim]):
            assert torch.equal(ops.vq_nearest(view, codes, backend="triton"), expected), name
    same = ops.vq_nearest(z[:1].expand(50, dim), codebook, backend="triton")
    assert (same == expected[0, 0, 0]).all()
    assert ops.vq_nearest(z[0], codebook, backend="triton") == expected[0, 0, 0]


def test_rows_of_a_view_need_no_copy():
    nchw = torch.empty(2, 8, 5, 7)
    found = rows.rows_of(nchw.permute(0, 2, 3, 1))
    assert found.tensor.data_ptr() == nchw.data_ptr()
    assert found[1:] == (70, 8, 35, 280, 1, 35)
    assert rows.rows_of(torch.empty(2, 5, 7, 8))[1:] == (70, 8, 70, 0, 8, 1)
    assert rows.rows_of(torch.empty(8))[1:3] == (1, 8)
    scattered = torch.empty(4, 6, 8, 3)[::2, ::2, ::2]
    assert rows.rows_of(scattered).tensor.is_contiguous()


def test_mixed_dtypes():
    z, codebook = vq_inputs(30, VQShape(200, 12))
    for z_dtype, codebook_dtype in itertools.product(DTYPES, DTYPES):
        check(z.to(z_dtype), codebook.to(codebook_dtype))
        check(z[:5].repeat(1, 2).to(z_dtype), codebook.repeat(1, 2).to(codebook_dtype))


def test_memory_beside_the_result():
    """The packed codebook and at most 12 bytes for each row and split."""
    for (num_codes, dim), num_rows in itertools.product(
        [(8192, 3), (16384, 4), (512, 64), (1024, 256)], [64, 65536]
    ):
        z, codebook = torch.empty(num_rows, dim, device="meta"), torch.empty(num_codes, dim, device="meta")
        launches, _ = nearest.plan_nearest(z, codebook, KNOWN[90])
        tensors = {
            id(t): t for launch in launches for t in launch.arguments.values() if isinstance(t, torch.Tensor)
        }
        extra = sum(
            t.numel() * t.element_size() for t in tensors.values() if t is not z and t is not codebook
        )
        packed = 4 * (num_codes + 512) * (dim + 2)
        assert extra - 8 * num_rows <= packed + 16 * num_rows + (1 << 20)


def test_refusals():
    z, codebook = on_device(*vq_inputs(5, VQShape(10, 4), torch.float64))
    for call in (
        lambda: ops.vq_nearest(z, codebook, backend="triton"),
        lambda: ops.vq_nearest(z.float(), codebook, backend="triton"),
        lambda: ops.vq_ema_update(z, torch.zeros(5, dtype=torch.int64, device=DEVICE), 10, backend="triton"),
    ):
        with pytest.raises(UnsupportedError, match="float64"):
            call()
    wide = torch.zeros(2, 5000, device=DEVICE)
    with pytest.raises(UnsupportedError, match="4096 dimensions"):
        ops.vq_nearest(wide, wide, backend="triton")
    assert "meta" in nearest.supports(torch.empty(1, 3, device="meta"), torch.empty(1, 3, device="meta"))


def check_sums(z, indices, num_codes):
    z, indices = on_device(z, indices)
    counts, sums = ops.vq_ema_update(z, indices, num_codes, backend="triton")
    flat = z.reshape(-1, z.shape[-1])
    one_hot = torch.nn.functional.one_hot(indices.reshape(-1), num_codes)
    assert torch.equal(counts, one_hot.sum(dim=0))
    exact = one_hot.double().T @ flat.double()
    assert_as_accurate(sums, exact, one_hot.float().T @ flat.float(), "sums", terms=max(1, int(counts.max())))
    assert (sums[counts == 0] == 0).all()
    assert torch.equal(ops.vq_ema_update(z, indices, num_codes, backend="triton")[1], sums)
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 17, 64, 129, 300])
def test_sums(dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    z = (torch.randn(500, dim, generator=generator) + 3.0).to(dtype)
    indices = torch.randint(13, (500,), generator=generator)
    indices[indices == 5] = 6
    sums = check_sums(z, indices, 13)
    strided = z.to(DEVICE).t().contiguous().t()
    assert torch.equal(ops.vq_ema_update(strided, indices.to(DEVICE), 13, backend="triton")[1], sums)
    pixels = z.to(DEVICE).view(5, 100, dim).transpose(1, 2).contiguous().transpose(1, 2)
    again = ops.vq_ema_update(pixels, indices.to(DEVICE).view(5, 100), 13, backend="triton")[1]
    assert torch.equal(again, sums)


UNIT = 16


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
def test_sums_of_segments_around_a_unit(num_rows):
    """One code has all rows, or all but some at the beginning or at the end."""
    with forced(ema_update=configs.EmaConfig(UNIT, 8, 4, 1)):
        z = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(num_rows))
        for before in (0, 1, UNIT - 1, UNIT, UNIT + 1):
            indices = torch.ones(num_rows, dtype=torch.int64)
            indices[:before] = 0
            check_sums(z, indices, 2)
            check_sums(z, indices.flip(0) + 1, 5)


def test_sums_of_random_segments():
    generator = torch.Generator().manual_seed(0)
    with forced(ema_update=configs.EmaConfig(UNIT, 8, 8, 1)):
        for seed in range(6):
            weights = torch.rand(20, generator=generator) ** 4
            indices = torch.multinomial(weights, 300, replacement=True, generator=generator)
            check_sums(vq_inputs(300, VQShape(1, 5), seed=seed)[0], indices, 20)


def test_sums_with_indices_that_are_no_codes():
    """On a GPU they are not checked; their rows are left out."""
    kernel = importlib.import_module("fastldm.kernels.vq.ema_update").forward
    z = torch.randn(200, 3)
    indices = torch.randint(-3, 9, (200,))
    with forced(ema_update=configs.EmaConfig(UNIT, 8, 4, 1)):
        counts, sums = kernel(*on_device(z, indices), 6)
    inside = (indices >= 0) & (indices < 6)
    assert torch.equal(counts.cpu(), torch.bincount(indices[inside], minlength=6))
    expected = torch.zeros(6, 3).index_add_(0, indices[inside], z[inside])
    torch.testing.assert_close(sums.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", VQ_KINDS)
@pytest.mark.parametrize("name", [name for name in VQ_LAYERS if name.endswith(("-4096", "-65536"))])
def test_layers_on_a_gpu(name, kind):
    """At the size that they have in a model, in every dtype."""
    layer = VQ_LAYERS[name]
    for dtype in DTYPES:
        z, codebook = on_device(*vq_inputs(layer.rows, layer.codebook, dtype, kind=kind))
        indices = ops.vq_nearest(z, codebook, backend="triton")
        assert torch.equal(indices, ops.vq_nearest(z, codebook, backend="triton"))
        some = torch.arange(0, layer.rows, max(1, layer.rows // 2048), device=DEVICE)
        assert torch.equal(indices[some], ops.vq_nearest(z[some], codebook, backend="reference"))
        check_sums(z, indices, layer.codebook.num_codes)


@pytest.mark.gpu
def test_near_ties_on_a_gpu():
    """Real tensor cores, and float64 that must not be fused."""
    check(*shuffled(*order_of_addition()))
    check(*cut_off_by_tensor_cores())
    check(*wrong_in_float32())
    for dim in (3, 16, 17, 64, 256):
        for z, codebook in near_ties(dim):
            check(z, codebook)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [4, 64])
def test_cuda_graph_and_stream(dim):
    z, codebook = on_device(*vq_inputs(5000, VQShape(1000, dim)))
    other_z, other_codebook = on_device(*vq_inputs(5000, VQShape(1000, dim), kind="duplicates", seed=1))
    expected = ops.vq_nearest(other_z, other_codebook, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            indices = ops.vq_nearest(z, codebook, backend="triton")
            ops.vq_ema_update(z, indices, 1000, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = ops.vq_nearest(z, codebook, backend="triton")
        counts, sums = ops.vq_ema_update(z, indices, 1000, backend="triton")
    z.copy_(other_z)
    codebook.copy_(other_codebook)
    graph.replay()
    assert torch.equal(indices, expected)
    assert torch.equal(counts, torch.bincount(expected, minlength=1000))
    assert torch.equal(sums, ops.vq_ema_update(z, expected, 1000, backend="triton")[1])


@pytest.mark.gpu
def test_rows_past_2_31_elements():
    """Offsets of the last rows do not fit into 32 bits."""
    count, dim = (1 << 31) // 64 + 1000, 64
    z = torch.zeros(count, dim, dtype=torch.float16, device="cuda")
    codebook = torch.randn(16, dim, device="cuda")
    z[-500:] = codebook[torch.arange(500, device="cuda") % 16].half()
    indices = ops.vq_nearest(z, codebook, backend="triton")
    assert torch.equal(indices[-500:], torch.arange(500, device="cuda") % 16)
    counts, sums = ops.vq_ema_update(z, indices, 16, backend="triton")
    assert int(counts.sum()) == count
    torch.testing.assert_close(sums.sum(dim=0), z[-500:].float().sum(dim=0), rtol=1e-3, atol=1e-2)
