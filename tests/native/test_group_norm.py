"""The compiled group norm: what is special to its blocks, layouts, lanes and threads.

The contract itself is checked for every backend in tests/ops/test_group_norm.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm import ops
from fastldm.errors import UnsupportedError
from fastldm.testing import assert_as_accurate, live_backends, plain_group_norm, poisoned_memory
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GroupNormShape

pytestmark = pytest.mark.skipif(
    "cpu" not in live_backends("group_norm"), reason="the C++ kernels are not built: `fastldm build`"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARAMETERS = ("weight", "bias", "channel_bias", "scale", "shift")


@pytest.fixture(autouse=True)
def unwritten_memory():
    with poisoned_memory():
        yield


def run(function, inputs, num_groups, **arguments):
    """Output and the gradient of everything in `inputs` but `grad`."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "grad"}
    x, *parameters = leaves.values()
    out = function(x, num_groups, **dict(zip(list(leaves)[1:], parameters)), **arguments)
    return {"y": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), inputs["grad"])))}


def check(inputs, num_groups, **arguments):
    """The C++ kernels by the error rule, against float64 autograd."""
    results = run(ops.group_norm, inputs, num_groups, backend="cpu", **arguments)
    contiguous = {name: value.contiguous() for name, value in inputs.items()}
    plain = run(plain_group_norm, contiguous, num_groups, **arguments)
    truth = run(plain_group_norm, {n: v.double() for n, v in contiguous.items()}, num_groups, **arguments)
    x = inputs["x"]
    terms = max(x[0].numel() // num_groups, x.numel() // x.shape[1])
    for name, result in results.items():
        assert_as_accurate(result, truth[name], plain[name], name, terms=terms)
    for result in (results["y"], results["x"]):
        assert result.stride() == torch.empty_like(x).stride()
    return results


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


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
    """Any rank, groups, dtypes, options, layouts of x and of the gradient, mean and spread.

    A group has eight elements at least: with one or two, the gradient is nothing but cancelled rounding.
    """
    num_groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    spatial = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    length = draw(st.sampled_from([8, 15, 16, 17, 31, 32, 33, 64, 100]))
    spatial = [length, *spatial[1:]] if spatial else spatial
    if not spatial:
        per_group += 8
    shape = GroupNormShape((draw(st.integers(1, 3)), num_groups * per_group, *spatial), num_groups)
    dtype = draw(st.sampled_from(DTYPES))
    inputs = group_norm_inputs(
        shape,
        dtype,
        parameter_dtype=draw(st.sampled_from([dtype, torch.float32])),
        mean=draw(st.sampled_from([0.0, 1.0, -30.0])),
        std=draw(st.sampled_from([0.1, 1.0, 20.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    options = draw(st.sets(st.sampled_from(PARAMETERS)))
    inputs = {name: value for name, value in inputs.items() if name in ("x", "grad") or name in options}
    for name in ("x", "grad"):
        inputs[name] = draw(layouts(len(shape.shape)))(inputs[name])
    return inputs, num_groups, draw(st.sampled_from([None, "silu"]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls())
def test_any_call(call):
    inputs, num_groups, activation = call
    check(inputs, num_groups, activation=activation)


def affine(inputs):
    return {name: inputs[name] for name in ("x", "grad", "weight", "bias")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_bias", [False, True])
def test_rows_around_vectors_and_blocks(channel_bias, dtype):
    """Rows of pixels that fill vectors, pairs of them and blocks of 8192 elements, almost or just over."""
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 8191, 8192, 8193, 16384, 16385]
    for length in lengths:
        inputs = group_norm_inputs(GroupNormShape((2, 12, length), 2), dtype)
        kept = affine(inputs) | ({"channel_bias": inputs["channel_bias"]} if channel_bias else {})
        check(kept, 2, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_around_vectors(dtype):
    """Channels-last rows, over numbers of pixels that fill a chunk, almost or just over."""
    for channels in (1, 3, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100):
        for pixels in (16, 31, 32, 33):
            shape = GroupNormShape((2, channels, pixels), 1)
            check(affine(group_norm_inputs(shape, dtype, layout="channels-last")), 1, activation="silu")
    for pixels in (511, 512, 513, 4095, 4096, 4097):
        shape = GroupNormShape((1, 40, pixels), 4)
        check(affine(group_norm_inputs(shape, dtype, layout="channels-last")), 4, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", [2**17, 2**17 + 1])
def test_slopes_that_are_kept_or_found_twice(pixels, dtype):
    """The gradient's second pass has SiLU's slopes in memory, but not those of over 1 MB in a group."""
    check(affine(group_norm_inputs(GroupNormShape((1, 2, pixels), 1), dtype)), 1, activation="silu")


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("odd", [0, 1])
def test_results_past_the_caches(odd, activation, dtype, layout):
    """Large results are stored in another way, which needs aligned rows; sample by sample they are small."""
    pixels = 2**14 if dtype == torch.float32 else 2**15
    shape = GroupNormShape((4, 64 + odd, pixels + odd), 1)
    inputs = affine(group_norm_inputs(shape, dtype, layout=layout))
    arguments = {"activation": activation, "backend": "cpu"}
    together = run(ops.group_norm, inputs, 1, **arguments)
    for n in range(4):
        one = {k: v[n : n + 1] if k in ("x", "grad") else v for k, v in inputs.items()}
        alone = run(ops.group_norm, one, 1, **arguments)
        assert torch.equal(together["y"][n : n + 1], alone["y"])
        assert torch.equal(together["x"][n : n + 1], alone["x"])


# Whole slabs or samples per thread, one slab or sample among all threads, rows of several blocks.
@pytest.mark.parametrize(
    "shape",
    [
        GroupNormShape((2, 64, 32, 32), 32),
        GroupNormShape((1, 12, 70, 90), 1),
        GroupNormShape((1, 6, 150, 170), 3),
        GroupNormShape((4, 64, 16, 16), 4),
        GroupNormShape((3, 96, 40, 40), 32),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_changes_no_bit(dtype, layout, shape):
    inputs = group_norm_inputs(shape, dtype, layout=layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run(ops.group_norm, inputs, shape.num_groups, activation="silu", backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(results[0], other) for other in results[1:])


def test_several_python_threads():
    shapes = [GroupNormShape((2, 64, 32, 32), 32), GroupNormShape((1, 30, 50, 50), 3)]
    jobs = [
        (group_norm_inputs(shape, dtype, layout=layout), shape.num_groups)
        for shape in shapes
        for dtype in DTYPES
        for layout in ("contiguous", "channels-last")
    ]

    def work(job):
        return run(ops.group_norm, job[0], job[1], activation="silu", backend="cpu")

    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for together in (list(pool.map(work, jobs)) for _ in range(3)):
            assert all(map(equal, alone, together))


def test_inference_mode():
    inputs = group_norm_inputs(GroupNormShape((2, 64, 8, 8), 32), torch.float32)
    wanted = ops.group_norm(inputs["x"], 32, inputs["weight"], backend="cpu")
    with torch.inference_mode():
        assert torch.equal(ops.group_norm(inputs["x"] * 1.0, 32, inputs["weight"], backend="cpu"), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("where", [0, 1, 100, -1])
@pytest.mark.parametrize("size", [1e5, 1e8])
def test_one_outlier(size, where, layout):
    """The sums run around the mean of the first elements, which an outlier pulls far away."""
    inputs = affine(group_norm_inputs(GroupNormShape((1, 8, 64, 64), 2), torch.float32))
    inputs["x"].flatten()[where] = size
    if layout == "channels-last":
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    check(inputs, 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("size", [1e4, 1e5, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(1, 40, 64, 64), (1, 32, 48, 48), (2, 12, 24, 24)])
def test_statistics_with_an_outlier(shape, size, layout):
    """The variance is that of two passes: 8 eps is the most that 16 additions to a large square lose."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = size
    groups = x.double().reshape(shape[0], 4, -1)
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    _, mean, rstd = torch.ops.fastldm.group_norm(x, 4, None, None, 1e-5, None, None, None, None, "cpu")
    variance = groups.var(-1, correction=0) + 1e-5
    eps = torch.finfo(torch.float32).eps
    assert ((rstd.double() ** -2 / variance - 1).abs() <= 8 * eps).all()
    assert ((mean.double() - groups.mean(-1)).abs() <= 8 * eps * variance.sqrt()).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_of_any_payload_stays_nan(layout):
    """Such a NaN could turn into a number when it is rounded to bfloat16."""
    inputs = affine(group_norm_inputs(GroupNormShape((1, 64, 8, 8), 2), torch.bfloat16, layout=layout))
    payloads = torch.tensor([0x7FFF, -1, 0x7F81], dtype=torch.int16).view(torch.bfloat16)
    for payload in payloads:
        bad = inputs["x"].clone()
        bad[0, 0, 0, 0] = payload
        out = ops.group_norm(bad, 2, inputs["weight"], activation="silu", backend="cpu")
        assert out[:, :32].isnan().all()
        assert out[:, 32:].isfinite().all()
    weight = inputs["weight"].float()
    weight[[3, 40]] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for activation in (None, "silu"):
        out = ops.group_norm(inputs["x"], 2, weight, activation=activation, backend="cpu")
        assert torch.equal(out.isnan().all(dim=(0, 2, 3)), weight.isnan())
        assert torch.equal(out.isnan().any(dim=(0, 2, 3)), weight.isnan())


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e6, 1.0), (1e4, 0.01)])
def test_mean_that_float32_cannot_hold(mean, std, layout):
    """The slope of SiLU needs the mean to more digits than the forward saves."""
    shape = GroupNormShape((2, 40, 16, 16), 4)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=mean, std=std)
    results = run(ops.group_norm, inputs, 4, activation="silu", backend="cpu")
    doubles = {name: value.double().contiguous() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, 4, activation="silu")
    for name, result in results.items():
        assert_as_accurate(result, truth[name], truth[name].float(), name, terms=10 * 256)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_rounding_of_the_saved_mean(activation, layout):
    """Off by up to 2e-6 standard deviations, which a gradient around 10 multiplies by 10 unless the sum of
    the normalised x takes it out.
    """
    shape = GroupNormShape((2, 8, 8, 8), 2)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=60.0, std=1.0)
    inputs = {"x": inputs["x"], "grad": inputs["grad"] + 10.0}
    result = run(ops.group_norm, inputs, 2, activation=activation, backend="cpu")["x"]
    doubles = {name: value.double().contiguous() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, 2, activation=activation)["x"]
    assert_as_accurate(result, truth, truth.float(), terms=4 * 64)


@pytest.mark.parametrize("size", [50.0, 100.0, 1e4, 1e10])
def test_silu_far_from_zero(size):
    inputs = affine(group_norm_inputs(GroupNormShape((1, 64, 64), 2), torch.float32))
    inputs["weight"] = inputs["weight"] * size
    check(inputs, 2, activation="silu")


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [-1e4, -1e30, -3e38, -torch.inf, 1e4, 1e30, 1e35, 2e38, torch.inf])
def test_silu_of_a_huge_bias(bias, dtype, layout):
    """0 far below zero, x far above it, with a slope of 0 and 1; at infinity what PyTorch gives."""
    inputs = group_norm_inputs(GroupNormShape((2, 40, 9, 7), 2), dtype, layout=layout)
    inputs = {"x": inputs["x"], "grad": inputs["grad"], "bias": torch.full((40,), bias)}
    results = run(ops.group_norm, inputs, 2, activation="silu", backend="cpu")
    doubles = {name: value.double().contiguous() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, 2, activation="silu")
    for name, result in results.items():
        exact = truth[name].to(result.dtype)
        assert_as_accurate(result, truth[name], exact, name, terms=20 * 63)


def test_float64_is_refused():
    with pytest.raises(UnsupportedError, match="float64"):
        ops.group_norm(torch.randn(1, 4, 3, dtype=torch.float64), 2, backend="cpu")
