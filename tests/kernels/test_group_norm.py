"""The Triton group norm: what is special to its tiles, ways, layouts and masks.

The contract itself is checked for every backend in tests/ops/test_group_norm.py. Everything here runs under
Triton's interpreter; what only a GPU can show is marked so.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import assert_as_accurate, live_backends, poisoned_memory
from fastldm.testing.group_norm import assert_group_norm, plain_gradients
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GROUP_NORM_LAYERS, GroupNormShape

if "triton" not in live_backends("group_norm"):
    pytest.skip("no GPU and no interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from fastldm.kernels.common import tables
from fastldm.kernels.common.target import KNOWN
from fastldm.kernels.group_norm import backward, forward, plan_backward, plan_forward, supports
from fastldm.kernels.group_norm.configs import Config, candidates, heuristic
from fastldm.kernels.group_norm.problem import describe

PARAMETERS = ("weight", "bias", "channel_bias", "scale", "shift")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels-last"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Tiles of 16 pixels: several of them in a chunk, a last one that is not full, chunks that are not as long.
# Two groups together in a block: with three groups, the last block is not full.
WAYS = {
    "resident": Config("resident", 1, 0, 1, 4),
    "resident-2": Config("resident", 2, 0, 1, 4),
    "sweep": Config("sweep", 1, 16, 1, 4),
    "sweep-2": Config("sweep", 2, 16, 1, 4),
    "split": Config("split", 1, 16, 2, 4),
    "split-2": Config("split", 2, 16, 3, 4),
}


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


class Forced(ExitStack):
    """Both directions in one configuration, or in what the heuristic says."""

    def __init__(self, config: Config | None):
        super().__init__()
        if config is not None:
            self.enter_context(tables.forcing("group_norm", "forward", config))
            self.enter_context(tables.forcing("group_norm", "backward", config))


def kernels(inputs, num_groups, activation, forward=forward, backward=backward, eps=1e-5):
    """Output, statistics and all gradients, straight from the kernels."""
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    values = [inputs.get(name) for name in PARAMETERS]
    call = (num_groups, *values[:2], eps, activation, *values[2:])
    y, mean, rstd = forward(inputs["x"], *call)
    needed = [True, *(value is not None for value in values)]
    grads = backward(inputs["grad"], inputs["x"], mean, rstd, *call, needed)
    found = {"y": y, **dict(zip(("x", *PARAMETERS), grads))}
    return {name: value.cpu() for name, value in found.items() if name in ("y", *inputs)}


def check(inputs, num_groups, activation="silu", exact=False, **functions):
    """The kernels by the error rule, against float64 autograd; `exact`: with no more error than rounding."""
    results = kernels(inputs, num_groups, activation, **functions)
    assert_group_norm(results, inputs, num_groups, activation, exact=exact)
    return results


def some(inputs, *names):
    return {name: value for name, value in inputs.items() if name in ("x", "grad", *names)}


@pytest.mark.parametrize("way", ["resident", "sweep-2", "split", "split-2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_group", [1, 3, 10, 20, 30, 40, 60, 80])
def test_channels_per_group(per_group, layout, way):
    dtype = DTYPES[per_group % 3]
    inputs = group_norm_inputs(GroupNormShape((1, 3 * per_group, 7, 9), 3), dtype, layout=layout)
    with Forced(WAYS[way]):
        check(inputs, 3)


@pytest.mark.parametrize("way", ["resident", "sweep-2", "split", "split-2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [1, 2, 15, 16, 17, 32, 33, 48, 63, 64, 65])
def test_pixels_around_tiles(pixels, layout, way):
    inputs = group_norm_inputs(GroupNormShape((1, 24, pixels), 3), torch.float32, layout=layout)
    with Forced(WAYS[way]):
        check(some(inputs, "weight", "bias", "channel_bias"), 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_chunks_than_are_merged_at_once(layout):
    """The backward adds up 16 chunks at a time where there are 80 channels."""
    inputs = group_norm_inputs(GroupNormShape((1, 80, 39), 1), torch.float32, layout=layout)
    with Forced(Config("split", 1, 2, 20, 4)):
        check(inputs, 1)


def test_a_large_batch():
    """dweight and dbias are added up over 64 samples at a time."""
    inputs = group_norm_inputs(GroupNormShape((70, 2, 9), 1), torch.float32)
    check(inputs, 1)


@pytest.mark.parametrize("way", ["sweep-2", "split", "split-2"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "names",
    [(), ("weight",), ("bias",), ("channel_bias",), ("scale",), ("weight", "shift"), PARAMETERS],
    ids="-".join,
)
def test_options(names, activation, way):
    for layout, dtype in zip(LAYOUTS, (torch.bfloat16, torch.float32)):
        inputs = group_norm_inputs(GroupNormShape((2, 20, 5, 7), 2), dtype, layout=layout)
        with Forced(WAYS[way]):
            check(some(inputs, *names), 2, activation)


@pytest.mark.parametrize("way", ["resident", "sweep", "split-2"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 35), (2, 12, 3, 5, 7)])
def test_ranks(shape, layout, way):
    inputs = group_norm_inputs(GroupNormShape(shape, 3), torch.float16, layout=layout)
    with Forced(WAYS[way]):
        check(inputs, 3)


@st.composite
def layouts(draw, dims):
    """A function that gives a tensor any order of dimensions in memory, with gaps or without."""
    order = draw(st.permutations(range(dims)))
    inverse = sorted(range(dims), key=order.__getitem__)
    step, offset = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 3))

    def lay_out(x):
        size = [x.shape[dim] for dim in order]
        size[-1] *= step
        memory = x.new_zeros(offset + torch.Size(size).numel())[offset:].view(size)
        return memory[..., ::step].permute(inverse).copy_(x)

    return lay_out


@st.composite
def calls(draw):
    """Any rank, groups, dtypes, options, layouts, mean and spread, in any configuration.

    A group has eight elements at least: with one or two, the gradient is nothing but cancelled rounding.
    """
    num_groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    spatial = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    length = draw(st.sampled_from([8, 15, 16, 17, 31, 33]))
    spatial = [length, *spatial[1:]] if spatial else spatial
    if not spatial:
        per_group += 8
    shape = GroupNormShape((draw(st.integers(1, 2)), num_groups * per_group, *spatial), num_groups)
    dtype = draw(st.sampled_from(DTYPES))
    inputs = group_norm_inputs(
        shape,
        dtype,
        parameter_dtype=draw(st.sampled_from([dtype, torch.float32])),
        mean=draw(st.sampled_from([0.0, 1.0, -30.0])),
        std=draw(st.sampled_from([0.1, 1.0, 20.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    inputs = some(inputs, *draw(st.sets(st.sampled_from(PARAMETERS))))
    for name in ("x", "grad"):
        inputs[name] = draw(layouts(len(shape.shape)))(inputs[name])
    way = draw(st.sampled_from(["resident", "sweep", "split"]))
    groups, block = draw(st.integers(1, num_groups)), draw(st.sampled_from([8, 16, 64]))
    config = Config(way, groups, block, draw(st.integers(2, 5)), 4)
    return inputs, num_groups, draw(st.sampled_from([None, "silu"])), config


@settings(max_examples=40, deadline=None, derandomize=True)
@given(calls())
def test_any_call(call):
    inputs, num_groups, activation, config = call
    with Forced(config):
        check(inputs, num_groups, activation)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [30.0, 1e3, 3e4])
def test_mean_far_from_zero(mean, layout, way):
    shape = GroupNormShape((1, 30, 9, 9), 3)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=mean, std=1.0)
    with Forced(WAYS[way]):
        check(inputs, 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero_costs_no_digit_without_an_activation(layout, way):
    """A mean stays a pair of numbers in the forward; the backward measures what the saved one lost."""
    shape = GroupNormShape((1, 30, 9, 9), 3)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=1e6, std=1.0)
    with Forced(WAYS[way]):
        check(some(inputs, "weight", "bias", "channel_bias"), 3, None, exact=True)


@pytest.mark.parametrize("way", ["resident", "sweep-2", "split-2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [30.0, 1e3, 3e4])
def test_channel_bias_that_cancels_the_channels_of_x(size, layout, way):
    """x and its bias are large, their sum is not, and it has digits that x - mean in float32 has lost.

    With less pixels than a tile has, the bias must not count where there are none.
    """
    levels = size * torch.tensor([1.0, 0.0, 0.1, -0.3]).repeat(3)
    for pixels in ((9, 9), (3, 3)):
        inputs = group_norm_inputs(GroupNormShape((1, 12, *pixels), 3), torch.float32, layout=layout)
        inputs["x"] += levels[:, None, None]
        inputs["channel_bias"] -= levels
        with Forced(WAYS[way]):
            check(inputs, 3)


@pytest.mark.parametrize("way", ["resident", "sweep", "split"])
@pytest.mark.parametrize("value", [0.0, 3.1, 1e4 / 3])
def test_constant_groups(value, way):
    """Nothing is left of x, and eps alone keeps that finite."""
    inputs = some(group_norm_inputs(GroupNormShape((2, 15, 7, 9), 5), torch.float32), "weight", "bias")
    inputs["x"].fill_(value)
    with Forced(WAYS[way]):
        results = kernels(inputs, 5, "silu")
    assert all(result.isfinite().all() for result in results.values())
    y = torch.nn.functional.silu(inputs["bias"])[:, None, None].expand_as(results["y"])
    torch.testing.assert_close(results["y"], y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["sweep", "split"])
def test_a_first_tile_unlike_the_rest(way):
    """The sums run around the mean of the first tile, which here is nothing like the mean of a group."""
    inputs = group_norm_inputs(GroupNormShape((1, 6, 100), 2), torch.float32, std=1.0)
    inputs["x"][..., :16] = 1e4
    with Forced(WAYS[way]):
        check(some(inputs, "weight", "bias"), 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", [0, 20, -1])
def test_one_outlier(where, way):
    inputs = group_norm_inputs(GroupNormShape((1, 6, 81), 2), torch.float32)
    inputs["x"].flatten()[where] = 1e5
    with Forced(WAYS[way]):
        check(some(inputs, "weight", "bias"), 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_near_overflow(layout, way):
    inputs = group_norm_inputs(GroupNormShape((1, 30, 9, 9), 3), torch.float16, layout=layout)
    inputs["x"] = inputs["x"].sign() * 6e4
    inputs["channel_bias"] = inputs["channel_bias"].sign() * 1e4
    with Forced(WAYS[way]):
        results = kernels(inputs, 3, None)
    truth = plain_gradients({n: v.double() for n, v in inputs.items()}, 3, None)
    # Plain float16 overflows here, so plain float32 says what error is fair.
    plain = plain_gradients({n: v.float() for n, v in inputs.items()}, 3, None)
    for name, result in results.items():
        assert_as_accurate(result, truth[name], plain[name].half(), name, terms=810)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_group(bad, layout, way):
    inputs = group_norm_inputs(GroupNormShape((2, 12, 5, 7), 3), torch.bfloat16, layout=layout)
    with Forced(WAYS[way]):
        clean = kernels(inputs, 3, "silu")
        inputs["x"][1, 5, 2, 3] = bad
        results = kernels(inputs, 3, "silu")
    for name in ("y", "x"):
        assert results[name][1, 4:8].isnan().all()
        assert torch.equal(results[name][0], clean[name][0])
        assert torch.equal(results[name][1, :4], clean[name][1, :4])
        assert torch.equal(results[name][1, 8:], clean[name][1, 8:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_bit_equal(layout, way):
    inputs = group_norm_inputs(GroupNormShape((2, 30, 7, 9), 3), torch.bfloat16, layout=layout)
    with Forced(WAYS[way]):
        first, second = (kernels(inputs, 3, "silu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", ["resident", "sweep", "split"])
def test_parameters_with_rows_apart(way):
    """scale and shift as the halves of one projection, channel_bias with one row for all samples."""
    shape = GroupNormShape((2, 12, 5, 7), 3)
    inputs = group_norm_inputs(shape, torch.float32)
    joined = torch.cat([inputs["scale"], inputs["shift"]], dim=1)
    inputs["scale"], inputs["shift"] = joined.chunk(2, dim=1)
    inputs["channel_bias"] = inputs["channel_bias"][:1].expand(2, -1)
    inputs["weight"] = torch.stack([inputs["weight"], inputs["weight"]], dim=1)[:, 0]
    inputs["grad"] = inputs["grad"][:, :, :1, :1].expand(inputs["x"].shape)
    with Forced(WAYS[way]):
        check(inputs, 3)


@pytest.mark.parametrize("way", ["resident", "split"])
def test_parameters_with_columns_apart(way):
    """Their gradients are contiguous all the same."""
    inputs = group_norm_inputs(GroupNormShape((3, 12, 5, 7), 3), torch.float32)
    for name in ("channel_bias", "scale"):
        inputs[name] = inputs[name].t().contiguous().t()
    for name in ("weight", "bias", "shift"):
        inputs[name] = inputs[name].repeat_interleave(2, dim=-1)[..., ::2]
    with Forced(WAYS[way]):
        results = check(inputs, 3)
    assert all(results[name].is_contiguous() for name in PARAMETERS)


@pytest.mark.parametrize("way", ["resident", "sweep", "split"])
def test_only_what_is_asked_for(way):
    inputs = group_norm_inputs(GroupNormShape((2, 12, 5, 7), 3), torch.float32)
    values = [inputs[name].to(DEVICE) for name in PARAMETERS]
    x, grad = inputs["x"].to(DEVICE), inputs["grad"].to(DEVICE)
    call = (3, *values[:2], 1e-5, "silu", *values[2:])
    with Forced(WAYS[way]):
        _, mean, rstd = forward(x, *call)
        complete = backward(grad, x, mean, rstd, *call, [True] * 6)
        for wanted in range(6):
            grads = backward(grad, x, mean, rstd, *call, [index == wanted for index in range(6)])
            assert torch.equal(grads[wanted], complete[wanted])
            assert [g.numel() for index, g in enumerate(grads) if index != wanted] == [0] * 5


def test_refusals():
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64"):
        ops.group_norm(x, 2, backend="triton")
    assert "channels per group" in supports(torch.empty(1, 20000, 1, device="meta"), 1)
    assert "meta" in supports(torch.empty(1, 4, 3, device="meta"), 1)


def meta(shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_grids_are_one_dimensional():
    """The second and third dimension of a grid end at 65535."""
    x = meta((200_000, 4, 3))
    for config in (None, *WAYS.values()):
        with Forced(config and config._replace(groups=1)):
            plan = plan_forward(x, 4, None, None, 1e-5, None, None, None, None, KNOWN[90])
            mean = meta((200_000, 4), torch.float32)
            arguments = (x, x, mean, mean, 4, None, None, 1e-5, None, None, None, None)
            back = plan_backward(*arguments, [True] + [False] * 5, KNOWN[90])
        assert all(len(launch.grid) == 1 for launch in (*plan.launches, *back.launches))


@pytest.mark.parametrize("target", KNOWN.values(), ids=lambda t: f"sm_{t.capability}")
def test_heuristic(target):
    """Every layer gets a configuration within bounds, and it is the first of the candidates."""
    for shape in GROUP_NORM_LAYERS.values():
        for dtype in (torch.float32, torch.bfloat16):
            for last in (False, True):
                x = meta(shape.shape, dtype)
                x = x.contiguous(memory_format=torch.channels_last) if last else x
                _, problem = describe(x, shape.num_groups)
                for direction in ("forward", "backward"):
                    config = heuristic(problem, target, direction)
                    lanes = problem.block_channels(config.groups) * config.block_pixels
                    assert 1 <= config.groups <= shape.num_groups
                    assert lanes <= 64 * 32 * config.num_warps
                    assert config.chunks * config.block_pixels <= max(problem.pixels, config.block_pixels)
                    found = list(candidates(direction, problem, target))
                    assert found[0] == config
                    assert len(found) == len(set(found)) > 3


def test_every_candidate_computes_the_same():
    """What tune may choose is right, on a problem with several tiles for each."""
    inputs = some(group_norm_inputs(GroupNormShape((1, 6, 33), 2), torch.float32), "weight", "channel_bias")
    _, problem = describe(inputs["x"], 2)
    for direction in ("forward", "backward"):
        for config in candidates(direction, problem, KNOWN[90]):
            with tables.forcing("group_norm", direction, config):
                check(inputs, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GROUP_NORM_LAYERS)
def test_layers_at_their_size(name, layout, dtype):
    shape = GROUP_NORM_LAYERS[name]
    inputs = group_norm_inputs(shape, dtype, layout=layout)
    check(some(inputs, "weight", "bias", "channel_bias"), shape.num_groups)
    check(some(inputs, "weight", "bias", "scale", "shift"), shape.num_groups)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["unet-32px-c640", "unet-64px-c320"])
def test_every_candidate_at_the_size_of_a_layer(name, layout):
    shape = GROUP_NORM_LAYERS[name]
    inputs = group_norm_inputs(shape, torch.bfloat16, layout=layout)
    _, problem = describe(inputs["x"], shape.num_groups)
    for direction in ("forward", "backward"):
        for config in candidates(direction, problem, KNOWN[90]):
            with tables.forcing("group_norm", direction, config):
                check(inputs, shape.num_groups)


def on_gpu(shape, layout="contiguous"):
    inputs = group_norm_inputs(shape, torch.bfloat16, layout=layout)
    return {name: value.to(DEVICE) for name, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["resident", "sweep", "split"])
def test_other_stream(way):
    """On a stream that waits, so that a launch on any other one would read too early."""
    inputs = on_gpu(GroupNormShape((2, 320, 16, 16), 32))
    with Forced(WAYS[way]):
        wanted = kernels(inputs, 32, "silu")
        late = {name: torch.zeros_like(value) for name, value in inputs.items()}
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for name, value in inputs.items():
                late[name].copy_(value)
            results = kernels(late, 32, "silu")
    assert all(torch.equal(results[name], wanted[name]) for name in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["resident", "sweep", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_capture(layout, way):
    inputs = on_gpu(GroupNormShape((2, 320, 16, 16), 32), layout)
    values = [inputs[name] for name in PARAMETERS]
    call = (32, *values[:2], 1e-5, "silu", *values[2:])

    def both():
        y, mean, rstd = forward(inputs["x"], *call)
        return y, *backward(inputs["grad"], inputs["x"], mean, rstd, *call, [True] * 6)

    with Forced(WAYS[way]):
        both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        inputs["x"].neg_()
        graph.replay()
        torch.cuda.synchronize()
        for result, wanted in zip(captured, both()):
            assert torch.equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["sweep", "split"])
def test_tensors_past_two_to_the_31(layout, way):
    """5 samples of 2^29 elements; each alone has the same bits."""
    config = Config(way, 1, 1024, 64, 8)
    x = torch.empty((5, 2**22, 128), dtype=torch.bfloat16, device=DEVICE)
    x = x.transpose(1, 2) if layout == "channels-last" else x.view(5, 128, 2**22)
    x.normal_()
    call = (128, None, None, 1e-5, "silu", None, None, None)
    with Forced(config):
        y, mean, rstd = forward(x, *call)
        dx = backward(x, x, mean, rstd, *call, [True] + [False] * 5)[0]
        for n in (0, 4):
            one = x[n : n + 1]
            y_one, mean_one, rstd_one = forward(one, *call)
            assert torch.equal(y[n : n + 1], y_one)
            dx_one = backward(one, one, mean_one, rstd_one, *call, [True] + [False] * 5)[0]
            assert torch.equal(dx[n : n + 1], dx_one)
    torch.testing.assert_close(mean[4, 7].double(), x[4, 7].double().mean(), rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_group_past_two_to_the_31():
    x = torch.empty((1, 1, 2**31 + 64), dtype=torch.bfloat16, device=DEVICE).normal_()
    y, mean, rstd = forward(x, 1, None, None, 1e-5, None, None, None, None)
    torch.testing.assert_close(rstd.item(), 1.0, rtol=1e-3, atol=0)
    tail = slice(-4096, None)
    wanted = (x[..., tail].double() - mean.item()) * rstd.item()
    torch.testing.assert_close(y[..., tail].double(), wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
def test_more_samples_than_a_grid_dimension():
    x = torch.randn((70_000, 4, 3), device=DEVICE)
    y, _, _ = forward(x, 4, None, None, 1e-5, None, None, None, None)
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    inputs = on_gpu(GroupNormShape((2, 320, 16, 16), 32))
    call = (32, inputs["weight"], inputs["bias"], 1e-5, "silu", None, None, None)
    wanted = forward(inputs["x"], *call)
    there = [value.to("cuda:1") if isinstance(value, torch.Tensor) else value for value in call]
    for result, first in zip(forward(inputs["x"].to("cuda:1"), *there), wanted):
        assert torch.equal(result.cpu(), first.cpu())
