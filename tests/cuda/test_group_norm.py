"""The CUDA kernels of group norm, run on the CPU under the shim, by the contract of
fastldm/ops/group_norm.py.

Choices are forced: what a GPU would take for large tensors runs here on small ones.
"""

from __future__ import annotations

import types
from functools import partial
from typing import NamedTuple

import pytest
import torch
from fastldm.kernels.common.target import KNOWN

from fastldm.native import build_cuda
from fastldm.native.cuda import group_norm as cuda
from fastldm.native.cuda import support
from fastldm.native.group_norm import run_forward
from fastldm.native.library import load_cuda
from fastldm.reference.group_norm import group_norm as reference
from fastldm.reference.group_norm import group_norm_backward as reference_backward
from fastldm.testing import assert_as_accurate, poisoned_memory
from fastldm.testing.group_norm import assert_group_norm, plain_gradients
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GROUP_NORM_LAYERS, GroupNormShape
from tests.cuda.shim import ShimError

PARAMETERS = ("weight", "bias", "channel_bias", "scale", "shift")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of fastldm::DType
LAYOUTS = ["contiguous", "channels-last"]


class Way(NamedTuple):
    """A GroupNormChoice of csrc/cuda/group_norm_plan.h: `cluster` blocks for one read, 0 for two; `tile`
    units of a slab at a time, for one read all that a block has."""

    cluster: int
    groups: int = 1
    wide: bool = True
    chunks: int = 1
    tile: int | None = None
    range: int = 1


WAYS = {
    "block": Way(1),
    "block-narrow": Way(1, wide=False),
    "cluster-2": Way(2),
    "cluster-8": Way(8),
    "chunks": Way(0, chunks=3, tile=2, range=2),
    "chunks-narrow": Way(0, wide=False, chunks=2, tile=3, range=3),
}
FEW = ["block-narrow", "cluster-2", "chunks"]


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


def numbers(*values):
    return torch.tensor(values, dtype=torch.int64)


def addresses(tensors):
    """Of parameters or their gradients: address, dtype, stride of a row."""
    found = []
    for tensor in tensors:
        if tensor is None:
            found += [0, 0, 0]
        else:
            assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
            stride = tensor.stride(0) if tensor.dim() == 2 else 0
            found += [tensor.data_ptr(), DTYPES.index(tensor.dtype), stride]
    return numbers(*found)


def problem_of(shape, num_groups, dtype, channels_last, aligned=True):
    pixels = torch.Size(shape[2:]).numel()
    last = channels_last or pixels == 1
    return numbers(DTYPES.index(dtype), *shape[:2], num_groups, pixels, last, aligned)


def units_of(problem, wide):
    """As group_norm_sizes in csrc/cuda/group_norm_plan.h."""
    dtype, _, channels, num_groups, pixels, channels_last, _ = problem.tolist()
    if channels_last:
        return pixels
    vectors = pixels // ((4 if dtype == 0 else 8) if wide else 1)
    segment = -(-vectors // -(-vectors // 64))
    return channels // num_groups * -(-vectors // segment)


class Kernels:
    """Both directions in one choice on one GPU, called as the operations fastldm_cuda::group_norm_* are."""

    def __init__(self, shim, way, capability=90, seed=0):
        self.shim, self.way, self.capability, self.seed = shim, way, capability, seed
        self.forward = partial(run_forward, self._forward, cuda.dense_rows)
        self.backward = partial(cuda.run_backward, self._backward)

    def _plan(self, x, channels_last, groups):
        problem = problem_of(x.shape, groups, x.dtype, channels_last)
        units = units_of(problem, self.way.wide)
        tile = self.way.tile or -(-units // max(1, self.way.cluster))
        return problem, numbers(*self.way._replace(tile=tile, chunks=min(self.way.chunks, units)))

    def _forward(self, x, channels_last, groups, eps, silu, *rest):
        *given, y, mean, rstd = rest
        given = addresses(given)
        problem, choice = self._plan(x, channels_last, groups)
        arguments = (x, y, mean, rstd, given, problem, choice, eps, silu, self.capability)
        self.shim("group_norm_forward")("forward", *arguments, seed=self.seed)

    def _backward(self, grad, x, mean, rstd, channels_last, groups, silu, *rest):
        given, dx, gradients = addresses(rest[:5]), rest[5], addresses(rest[6:])
        problem, choice = self._plan(x, channels_last, groups)
        arguments = (grad, x, mean, rstd, given, dx, gradients, problem, choice, silu, self.capability)
        self.shim("group_norm_backward")("backward", *arguments, seed=self.seed)

    def both(self, inputs, num_groups, activation="silu"):
        values = [inputs.get(name) for name in PARAMETERS]
        call = (num_groups, *values[:2], 1e-5, activation, *values[2:])
        y, mean, rstd = self.forward(inputs["x"], *call)
        needed = [True, *(value is not None for value in values)]
        grads = self.backward(inputs["grad"], inputs["x"], mean, rstd, *call, needed)
        found = {"y": y, **dict(zip(("x", *PARAMETERS), grads))}
        return {name: value for name, value in found.items() if name in ("y", *inputs)}


def check(kernels, inputs, num_groups, activation="silu", exact=False):
    """By the error rule, against float64 autograd; `exact`: with no more error than rounding."""
    results = kernels.both(inputs, num_groups, activation)
    assert_group_norm(results, inputs, num_groups, activation, exact=exact)
    return results


def some(inputs, *names):
    return {name: value for name, value in inputs.items() if name in ("x", "grad", *names)}


def way_of(name, layout):
    """With the channels last, slabs of two groups, whose channels of a pixel are whole vectors."""
    way = WAYS[name]
    return way._replace(groups=2) if layout == "channels-last" else way


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WAYS)
def test_every_way(shim, name, layout, dtype):
    """Twice, with other orders of threads: the same bits. Of three groups, the last slab of two is of one."""
    per_group = 8 if WAYS[name].wide else 5
    shape = GroupNormShape((2, 3 * per_group, 10, 8), 3)
    inputs = group_norm_inputs(shape, dtype, layout=layout)
    way, capability = way_of(name, layout), 90 if WAYS[name].cluster > 1 else 80
    first = check(Kernels(shim, way, capability), inputs, shape.num_groups)
    again = Kernels(shim, way, capability, seed=7).both(inputs, shape.num_groups)
    assert all(torch.equal(first[result], again[result]) for result in first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FEW)
def test_statistics(shim, name, layout):
    inputs = group_norm_inputs(GroupNormShape((2, 24, 10, 8), 3), torch.float32, layout=layout)
    values = (None, None, 1e-5, None, inputs["channel_bias"], None, None)
    _, mean, rstd = Kernels(shim, way_of(name, layout)).forward(inputs["x"], 3, *values)
    _, wanted_mean, wanted_rstd = reference(inputs["x"], 3, channel_bias=inputs["channel_bias"])
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd.double(), wanted_rstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_group", [1, 3, 10, 20, 30, 40, 60, 80])
def test_channels_per_group(shim, per_group, layout):
    dtype = DTYPES[per_group % 3]
    inputs = group_norm_inputs(GroupNormShape((1, 3 * per_group, 7, 9), 3), dtype, layout=layout)
    way = WAYS["chunks-narrow" if per_group % 4 else "block-narrow"]
    check(Kernels(shim, way_of("block-narrow", layout) if way.cluster else way), inputs, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [1, 2, 4, 33, 64, 260, 300])
def test_pixels(shim, pixels, layout):
    """With 65 vectors and more, a channel is several segments, the last one shorter."""
    inputs = group_norm_inputs(GroupNormShape((1, 24, pixels), 3), torch.float32, layout=layout)
    inputs = some(inputs, "weight", "bias", "channel_bias")
    wide = layout == "channels-last" or pixels % 4 == 0
    check(Kernels(shim, Way(1, wide=wide)), inputs, 3)
    if wide and pixels >= 8:
        check(Kernels(shim, Way(4)), inputs, 3)
    check(Kernels(shim, Way(0, wide=wide or pixels == 1, chunks=min(pixels, 2), tile=1)), inputs, 3)


def test_more_channels_than_threads(shim):
    """With the channels last a thread then has several columns."""
    inputs = group_norm_inputs(GroupNormShape((1, 300, 5), 1), torch.float32, layout="channels-last")
    for way in (Way(1, wide=False), Way(0, wide=False, chunks=2, tile=2)):
        check(Kernels(shim, way), inputs, 1)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "names", [(), ("weight",), ("bias",), ("channel_bias",), ("scale",), ("weight", "shift")], ids="-".join
)
def test_options(shim, names, activation):
    for layout, name in zip(LAYOUTS, ("cluster-2", "chunks")):
        inputs = group_norm_inputs(GroupNormShape((2, 16, 5, 8), 2), torch.bfloat16, layout=layout)
        check(Kernels(shim, way_of(name, layout)), some(inputs, *names), 2, activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 35), (2, 12, 3, 5, 7)])
def test_ranks(shim, shape, layout):
    inputs = group_norm_inputs(GroupNormShape(shape, 3), torch.float16, layout=layout)
    check(Kernels(shim, Way(0, wide=False, chunks=1, tile=4)), inputs, 3)


def test_views(shim):
    """x and grad begin anywhere; rows of parameters lie apart, as halves of a projection, or are all one;
    columns lie apart; dtypes differ."""
    inputs = group_norm_inputs(
        GroupNormShape((2, 12, 5, 7), 3), torch.bfloat16, parameter_dtype=torch.float32
    )
    for name in ("x", "grad"):
        memory = torch.full((841,), torch.nan, dtype=torch.bfloat16)
        memory[1:] = inputs[name].flatten()
        inputs[name] = memory[1:].view(2, 12, 5, 7)
    joined = torch.cat([inputs["scale"], inputs["shift"]], dim=1)
    inputs["scale"], inputs["shift"] = joined.chunk(2, dim=1)
    inputs["channel_bias"] = inputs["channel_bias"][:1].half().expand(2, -1)
    inputs["weight"] = inputs["weight"].repeat_interleave(2)[::2]
    for way in (Way(1, wide=False), Way(0, wide=False, chunks=2, tile=2)):
        results = check(Kernels(shim, way), inputs, 3)
        assert all(results[name].is_contiguous() for name in PARAMETERS)
    with pytest.raises(ShimError, match="not aligned to 16"):
        Kernels(shim, Way(1)).forward(memory[1:].view(1, 1, 840), 1, None, None, 1e-5, *[None] * 4)


def test_a_large_batch(shim):
    """dweight and dbias are added up over eight slices of the samples."""
    inputs = group_norm_inputs(GroupNormShape((70, 2, 9), 1), torch.float32)
    check(Kernels(shim, Way(1, wide=False)), inputs, 1)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero_costs_no_digit(shim, layout, name):
    """A mean stays a pair of numbers in the forward; the backward measures what the saved one lost."""
    shape = GroupNormShape((1, 24, 9, 8), 4)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=1e6, std=1.0)
    inputs = some(inputs, "weight", "bias", "channel_bias")
    check(Kernels(shim, way_of(name, layout)), inputs, 4, None, exact=True)


@pytest.mark.parametrize(
    ("per_group", "pixels", "way"),
    [
        (131, 300_000, Way(0, wide=False)),
        (48, 700_001, Way(0, wide=False)),
        (48, 700_004, Way(0)),
        (2048, 2**21 - 1, Way(0, wide=False)),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_exact(shim, layout, per_group, pixels, way):
    """Past 2^24 elements, where float32 counts 131 as 132, and up to the last before 2^32."""
    channels_last = layout == "channels-last"
    problem = problem_of((1, per_group, pixels), 1, torch.float32, channels_last)
    units, vector = units_of(problem, way.wide), 4 if way.wide else 1
    parts = min(units, 300_000)
    counts, merged = torch.full((parts,), -1), numbers(-1)
    choice = numbers(*way._replace(chunks=min(parts, units), tile=1))
    shim("group_norm_forward")("count", problem, choice, parts, counts, merged)
    before = torch.arange(parts + 1) * units // parts
    if channels_last:
        before = before * per_group
    else:
        segments = units // per_group
        segment = -(-pixels // vector // segments) * vector
        before = before // segments * pixels + before % segments * segment
    assert torch.equal(counts, before.diff())
    assert merged.item() == counts.sum().item() == per_group * pixels


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("size", [30.0, 3e4])
def test_channel_bias_that_cancels_the_channels_of_x(shim, size, name):
    levels = size * torch.tensor([1.0, 0.0, 0.1, -0.3]).repeat(4)
    inputs = group_norm_inputs(GroupNormShape((1, 16, 9, 8), 4), torch.float32)
    inputs["x"] += levels[:, None, None]
    inputs["channel_bias"] -= levels
    check(Kernels(shim, WAYS[name]), inputs, 4)


@pytest.mark.parametrize("name", FEW)
def test_tiles_and_parts_unlike_each_other(shim, name):
    inputs = group_norm_inputs(GroupNormShape((1, 6, 80), 2), torch.float32, std=1.0)
    inputs["x"][:, ::3] = 1e4
    inputs["x"][0, 1, 3] = 1e5
    check(Kernels(shim, WAYS[name]), some(inputs, "weight", "bias"), 2)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("value", [0.0, 1e4 / 3])
def test_constant_groups(shim, value, name):
    """Nothing is left of x, and eps alone keeps that finite."""
    inputs = some(group_norm_inputs(GroupNormShape((2, 15, 7, 8), 5), torch.float32), "weight", "bias")
    inputs["x"].fill_(value)
    results = Kernels(shim, WAYS[name]).both(inputs, 5)
    assert all(result.isfinite().all() for result in results.values())
    y = torch.nn.functional.silu(inputs["bias"])[:, None, None].expand_as(results["y"])
    torch.testing.assert_close(results["y"], y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_the_least_eps(shim, name):
    """rstd of a constant group is then 3e19, whose square is past float32."""
    inputs = some(group_norm_inputs(GroupNormShape((1, 8, 5, 8), 2), torch.float32), "weight", "scale")
    inputs["x"].fill_(2.0)
    inputs["scale"] *= 1e-19
    values = (inputs["weight"] * 1e-19, None, 1e-39, None, None, inputs["scale"], None)
    kernels = Kernels(shim, WAYS[name])
    y, mean, rstd = kernels.forward(inputs["x"], 2, *values)
    assert (y == 0).all()
    grads = kernels.backward(
        inputs["grad"], inputs["x"], mean, rstd, 2, *values, [True] * 2 + [False] * 2 + [True, False]
    )
    wanted = reference_backward(inputs["grad"], inputs["x"], 2, values[0], eps=1e-39, scale=inputs["scale"])
    for found, exact in zip((grads[0], grads[1], grads[4]), (wanted[0], wanted[1], wanted[4])):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_float16_near_overflow(shim, name):
    inputs = group_norm_inputs(GroupNormShape((1, 32, 9, 8), 4), torch.float16, layout="channels-last")
    inputs["x"] = inputs["x"].sign() * 6e4
    inputs["channel_bias"] = inputs["channel_bias"].sign() * 1e4
    results = Kernels(shim, way_of(name, "channels-last")).both(inputs, 4, None)
    truth = plain_gradients({n: v.double() for n, v in inputs.items()}, 4, None)
    # Plain float16 overflows here, so plain float32 says what error is fair.
    plain = plain_gradients({n: v.float() for n, v in inputs.items()}, 4, None)
    for result, value in results.items():
        assert_as_accurate(value, truth[result], plain[result].half(), result, terms=576)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_group(shim, bad, layout, name):
    inputs = group_norm_inputs(GroupNormShape((2, 16, 5, 8), 4), torch.bfloat16, layout=layout)
    kernels = Kernels(shim, way_of(name, layout))
    clean = kernels.both(inputs, 4)
    inputs["x"][1, 5, 2, 3] = bad
    results = kernels.both(inputs, 4)
    for result in ("y", "x"):
        assert results[result][1, 4:8].isnan().all()
        assert torch.equal(results[result][0], clean[result][0])
        assert torch.equal(results[result][1, :4], clean[result][1, :4])
        assert torch.equal(results[result][1, 8:], clean[result][1, 8:])


@pytest.mark.parametrize("name", FEW)
def test_only_what_is_asked_for(shim, name):
    inputs = group_norm_inputs(GroupNormShape((2, 12, 5, 8), 3), torch.float32)
    values = [inputs[parameter] for parameter in PARAMETERS]
    call = (3, *values[:2], 1e-5, "silu", *values[2:])
    kernels = Kernels(shim, WAYS[name])
    _, mean, rstd = kernels.forward(inputs["x"], *call)
    back = partial(kernels.backward, inputs["grad"], inputs["x"], mean, rstd, *call)
    complete = back([True] * 6)
    for wanted in range(6):
        grads = back([index == wanted for index in range(6)])
        assert torch.equal(grads[wanted], complete[wanted])
        assert [g.numel() for index, g in enumerate(grads) if index != wanted] == [0] * 5


def choose(shim, direction, capability, *problem, function=None, more=()):
    found = numbers(*[-1] * 6)
    function = function or f"choose_{direction}"
    shim(f"group_norm_{direction}")(function, problem_of(*problem), found, capability, *more)
    return Way(*found.tolist())


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "channels_last", "cluster_80", "cluster_90", "cluster_backward"),
    [
        ((2, 1280, 8, 8), False, 1, 1, 1),
        ((1, 320, 64, 64), False, 1, 4, 4),
        ((1, 320, 64, 64), True, 0, 8, 8),
        ((1, 512, 128, 128), False, 0, 8, 8),
        ((4, 128, 256, 256), False, 0, 8, 8),
        ((4, 128, 256, 256), True, 0, 0, 0),
        ((1, 128, 512, 512), False, 0, 0, 0),
    ],
)
def test_choice(shim, shape, channels_last, cluster_80, cluster_90, cluster_backward):
    """The table in csrc/cuda/group_norm_plan.h, and what it rests on."""
    problem = (shape, 32, BF16, channels_last)
    assert choose(shim, "forward", 80, *problem).cluster == cluster_80
    assert choose(shim, "forward", 90, *problem).cluster == cluster_90
    assert choose(shim, "backward", 90, *problem).cluster == cluster_backward
    for direction in ("forward", "backward"):
        for capability in (80, 89, 90):
            way = choose(shim, direction, capability, *problem)
            row = way.groups * shape[1] // 32 * 2
            assert way.wide
            assert not channels_last or (row >= 32 and row % 16 == 0)
            assert min(way.tile, way.range) >= 1


@pytest.mark.parametrize(
    ("per_group", "dtype"), [(2048, torch.float32), (1900, BF16), (255, BF16), (64, BF16)]
)
def test_slabs_that_have_no_room_on_a_small_gpu(monkeypatch, per_group, dtype):
    """With the channels last, in the backward."""
    monkeypatch.setattr(cuda, "refuse", lambda *tensors: None)
    x = torch.empty(1, 16, 16, 8 * per_group, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    args = (x, x, None, None, 8, *[None] * 7, [True] * 6)
    for capability in (86, 90):
        monkeypatch.setattr(cuda, "target_of", lambda device, capability=capability: KNOWN[capability])
        reason = cuda.supports_backward(*args)
        if capability == 86 and per_group in (2048, 255):
            assert f"99 KiB of shared memory, not {2040 if per_group == 255 else 2048}" in reason
        else:
            assert reason is None
    contiguous = torch.empty(1, 8 * per_group, 16, 16, dtype=dtype, device="meta")
    monkeypatch.setattr(cuda, "target_of", lambda device: KNOWN[86])
    assert cuda.supports_backward(contiguous, contiguous, *args[2:]) is None


def test_two_reads_stay_in_the_cache(shim):
    way = choose(shim, "forward", 90, (1, 128, 512, 512), 32, BF16, False)
    assert way == Way(0, 1, True, chunks=128, tile=31, range=8)


def test_choice_asks_how_many_clusters_there_are(shim):
    """On a device that holds no cluster of 8, or none of any size, the same call goes another way."""
    problem = ((1, 512, 128, 128), 32, BF16, False)
    ask = partial(choose, shim, "forward", 90, *problem, function="choose_with")
    assert ask(more=(8,)).cluster == 8
    assert ask(more=(4,)).cluster == 4
    assert ask(more=(0,)).cluster == 0


def test_every_block_of_a_cluster_has_a_unit(shim):
    """Four pixels of 2048 channels would have enough bytes for eight blocks."""
    assert choose(shim, "backward", 90, (1, 2048, 2, 2), 1, torch.float32, True).cluster == 4


def test_what_is_not_aligned_is_read_by_elements(shim):
    for channels_last in (False, True):
        way = choose(shim, "forward", 90, (2, 640, 32, 32), 32, BF16, channels_last, False)
        assert not way.wide
        assert way.cluster <= 1
    assert not choose(shim, "forward", 90, (2, 96, 9, 9), 32, BF16, False).wide
    assert not choose(shim, "forward", 90, (2, 33, 8, 8), 11, BF16, True).wide


def test_refusals_of_the_plan(shim):
    inputs = group_norm_inputs(GroupNormShape((1, 2049, 1), 1), torch.float32)
    with pytest.raises(ShimError, match="up to 2048 channels a group"):
        Kernels(shim, Way(1, wide=False)).both(some(inputs), 1)
    problem, choice, number = (
        problem_of((1, 2048, 2**21), 1, torch.float32, True),
        numbers(*Way(0, tile=1)),
        numbers(-1),
    )
    with pytest.raises(ShimError, match="less than 2\\^32 elements a group"):
        shim("group_norm_forward")("count", problem, choice, 1, number, number)
    inputs = group_norm_inputs(GroupNormShape((1, 4, 8), 1), torch.float32)
    with pytest.raises(ShimError, match="needs a device of capability 90, not 80"):
        Kernels(shim, Way(2), capability=80).both(inputs, 1)
    with pytest.raises(ShimError, match="clusters need vectors"):
        Kernels(shim, Way(2, wide=False)).both(inputs, 1)


@pytest.mark.nvcc
def test_registered_without_a_gpu():
    build_cuda.build()
    x, stats, nothing = torch.zeros(1, 4, 8), torch.zeros(1, 2), (None,) * 5
    with pytest.raises(RuntimeError, match="take tensors on a CUDA device"):
        load_cuda().group_norm_forward(x, False, 2, 1e-5, True, *nothing, torch.zeros(1, 4, 8), stats, stats)
    with pytest.raises(RuntimeError, match="take tensors on a CUDA device"):
        load_cuda().group_norm_backward(x, x, stats, stats, False, 2, True, *nothing, None, *nothing)


def on_gpu(*shape, dtype=torch.float16):
    return types.SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device("cuda", 0))


def test_refusals(monkeypatch):
    monkeypatch.setattr(support, "capability_of", lambda device: 80)
    monkeypatch.setattr(cuda, "target_of", lambda device: KNOWN[80])
    rest = (None, None, 1e-5, None, None, None, None)
    assert cuda.supports(on_gpu(2, 64, 8, 8), 32, *rest) is None
    assert "up to 2048 channels per group, got 4096" in cuda.supports(on_gpu(2, 4096, 8), 1, *rest)
    assert "up to 2^30 channels, got 2147483648" in cuda.supports(on_gpu(1, 2**31, 1), 2**21, *rest)
    assert "up to 2^30 pixels" in cuda.supports(on_gpu(1, 1, 2**30 + 1), 1, *rest)
    assert "less than 2^32 elements per group, got 4294967296" in cuda.supports(
        on_gpu(1, 8, 2**16, 2**14), 2, *rest
    )
    assert "2^27 groups" in cuda.supports(on_gpu(2**20, 128, 1), 128, *rest)
    assert "not torch.float64" in cuda.supports(
        on_gpu(2, 64, 8), 32, on_gpu(64, dtype=torch.float64), *rest[1:]
    )
    x, mean = on_gpu(2, 64, 8), on_gpu(2, 32, dtype=torch.float32)
    assert cuda.supports_backward(x, x, mean, mean, 32, *rest, [True] * 6) is None
    grad = on_gpu(2, 64, 8, dtype=torch.float64)
    assert "not torch.float64" in cuda.supports_backward(grad, x, mean, mean, 32, *rest, [True] * 6)


def test_key():
    x = torch.empty(3, 64, 9, 9, dtype=torch.bfloat16)
    wanted = {"channels_per_group": 2, "num_groups": 32, "pixels": 128, "batch": 4, "itemsize": 2}
    assert cuda.key("forward", (x, 32)) == {**wanted, "channels_last": False}
    last = x.contiguous(memory_format=torch.channels_last)
    assert cuda.key("backward", (x, last, None, None, 32)) == {**wanted, "channels_last": True}


BROKEN = {
    "peers are read before they have begun": (
        "forward",
        "      cluster_sync();\n      slab.finish",
        "      slab.finish",
        "may not have begun",
    ),
    "copies are not waited for": ("forward", "    wait_group<0>();\n", "", "wait_group is missing"),
    "a tile overtakes the one before": (
        "forward",
        "      });\n      block_sync();\n    }\n    const",
        "      });\n    }\n    const",
        "no barrier in between",
    ),
    "sums are read before they are written": (
        "common",
        "sums) const {\n    block_sync();",
        "sums) const {",
        "no barrier in between",
    ),
    "a vector beyond the last segment": (
        "common",
        "left < sizes.segment ? left :",
        "left < sizes.segment ? left + 1 :",
        "outside it|wrong|over the limit|no barrier in between",
    ),
    "the activation's slope without the affine part": (
        "backward",
        "d * of.slope + of.offset",
        "d",
        "over the limit",
    ),
    "a tile's sums instead of all": (
        "backward",
        "begin == part.begin ? sum :",
        "begin >= part.begin ? sum :",
        "over the limit",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_seen(broken_shim, name):
    file, old, new, message = BROKEN[name]
    broken = broken_shim("group_norm_float", {f"cuda/group_norm_{file}.cuh": (old, new)})
    if name == "a tile overtakes the one before":
        # Where channels and the groups of a slab are not of the same threads.
        inputs = group_norm_inputs(GroupNormShape((1, 24, 12), 2), torch.float32, layout="channels-last")
        way, num_groups = Way(0, groups=2, tile=2), 2
    else:
        inputs = group_norm_inputs(GroupNormShape((1, 4, 276), 1), torch.float32)
        way, num_groups = Way(0, chunks=2, tile=2) if "tile" in name else Way(4), 1
    with pytest.raises(AssertionError, match=message):
        check(Kernels(lambda driver: broken, way), inputs, num_groups)


class OnTheGpu(Kernels):
    """Called by nobody's choice but the plan's."""

    def __init__(self):
        load_cuda()
        found = cuda.implementation()
        self.forward, self.backward = found.forward, found.backward


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GROUP_NORM_LAYERS)
def test_layers_on_the_gpu(name, layout, dtype):
    """At their own size; the same bits again."""
    shape = GROUP_NORM_LAYERS[name]
    made = {name: x.cuda() for name, x in group_norm_inputs(shape, dtype, layout=layout).items()}
    for given in (("weight", "bias", "channel_bias"), ("weight", "bias", "scale", "shift")):
        inputs = some(made, *given)
        first = check(OnTheGpu(), inputs, shape.num_groups)
        again = OnTheGpu().both(inputs, shape.num_groups)
        assert all(torch.equal(first[result], again[result]) for result in first)
