from __future__ import annotations

import pytest
import torch

from fastldm import ops, reference
from fastldm.errors import InputError
from fastldm.testing import assert_as_accurate, live_backends, plain_group_norm
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GROUP_NORM, GroupNormShape

BACKENDS = live_backends("group_norm")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "channel_bias", "scale", "shift")
EXTRAS = {
    "bare": (),
    "affine": ("weight", "bias"),
    "weight": ("weight",),
    "bias": ("bias",),
    "channel-bias": ("weight", "bias", "channel_bias"),
    "scale-shift": ("weight", "bias", "scale", "shift"),
    "scale": ("scale",),
    "shift": ("weight", "shift"),
    "all": ("weight", "bias", "channel_bias", "scale", "shift"),
}


def run(function, inputs, names, num_groups, **arguments):
    """Output and the gradient of x and of everything named."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", *names)}
    out = function(leaves["x"], num_groups, **{n: leaves[n] for n in names}, **arguments)
    return {"y": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), inputs["grad"])))}


def check(backend, inputs, names, num_groups, **arguments):
    """Output and gradients of one backend by the error rule, against float64 autograd."""
    results = run(ops.group_norm, inputs, names, num_groups, backend=backend, **arguments)
    # PyTorch's channels-last kernel is less exact than its contiguous one.
    contiguous = {name: value.contiguous() for name, value in inputs.items()}
    plain = run(plain_group_norm, contiguous, names, num_groups, **arguments)
    doubles = {name: value.double() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, names, num_groups, **arguments)
    for name, result in results.items():
        assert result.dtype == inputs["x" if name == "y" else name].dtype
        assert_as_accurate(result, truth[name], plain[name], name, terms=terms(inputs["x"], num_groups))
    return results


def terms(x, num_groups):
    """The longest sum: a group's elements or, behind dweight and dbias, a channel's elements over the
    batch."""
    return max(x[0].numel() // num_groups, x.numel() // x.shape[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", GROUP_NORM)
def test_shapes(name, layout, dtype, backend):
    shape = GROUP_NORM[name]
    inputs = group_norm_inputs(shape, dtype, layout=layout)
    results = check(backend, inputs, EXTRAS["affine"], shape.num_groups, activation="silu")
    for result in (results["y"], results["x"]):
        assert result.stride() == torch.empty_like(inputs["x"]).stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("extras", EXTRAS)
def test_extras(extras, layout, activation, backend):
    shape = GroupNormShape((2, 20, 5, 3), 2)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = group_norm_inputs(shape, dtype, layout=layout)
        results = check(backend, inputs, EXTRAS[extras], shape.num_groups, activation=activation)
        assert results["y"].stride() == torch.empty_like(inputs["x"]).stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters(dtype, backend):
    shape = GROUP_NORM["cpg-10"]
    inputs = group_norm_inputs(shape, dtype, parameter_dtype=torch.float32)
    check(backend, inputs, EXTRAS["all"], shape.num_groups, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [30.0, 1000.0, 30000.0])
def test_mean_far_from_zero(mean, layout, backend):
    """E[x^2] - E[x]^2 in float32 has no digit left at 1000 and is wrong by half a percent at 30."""
    shape = GroupNormShape((2, 40, 16, 16), 4)
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=mean, std=1.0)
    check(backend, inputs, EXTRAS["affine"], shape.num_groups)


# The backends that leave float32 where it does not suffice.
IN_FLOAT64 = [name for name in ("reference", "torch", "cpu") if name in BACKENDS]


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("extras", ["affine", "all"])
@pytest.mark.parametrize("size", [2.0**58, 2.0**66, 2.0**120])
def test_squares_that_leave_float32(size, extras, layout, backend):
    """Past 2^58 the sum of the squares overflows, past 2^64 the variance does."""
    shape, names = GroupNormShape((2, 40, 16, 16), 4), EXTRAS[extras]
    inputs = group_norm_inputs(shape, torch.float32, layout=layout)
    scales = dict.fromkeys(("x", "channel_bias"), size)
    for name, scale in scales.items():
        inputs[name] = inputs[name] * scale
    results = run(ops.group_norm, inputs, names, 4, backend=backend, activation="silu")
    doubles = {name: value.double() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, names, 4, activation="silu")
    for name, result in results.items():
        # Gradients as large as they are for x of ordinary size, or the rule's atol would let zeros pass.
        exact = truth[name] * scales.get(name, 1.0)
        assert_as_accurate(
            result * scales.get(name, 1.0), exact, exact.float(), name, terms=terms(inputs["x"], 4)
        )


@pytest.mark.parametrize("backend", IN_FLOAT64)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_mean_far_from_zero_costs_no_digit(mean, layout, backend):
    """PyTorch's float32 dx is off by 9.6 at 1e6, where the largest is 0.25."""
    shape, names = GroupNormShape((2, 40, 16, 16), 4), EXTRAS["all"]
    inputs = group_norm_inputs(shape, torch.float32, layout=layout, mean=mean, std=1.0)
    results = run(ops.group_norm, inputs, names, 4, backend=backend)
    truth = run(plain_group_norm, {n: value.double().contiguous() for n, value in inputs.items()}, names, 4)
    for name, result in results.items():
        assert_as_accurate(result, truth[name], truth[name].float(), name, terms=terms(inputs["x"], 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("extras", ["affine", "all"])
def test_float16_near_overflow(extras, layout, backend):
    shape = GroupNormShape((2, 40, 16, 16), 4)
    inputs = group_norm_inputs(shape, torch.float16, layout=layout)
    inputs["x"] = inputs["x"].sign() * 6e4
    inputs["channel_bias"] = inputs["channel_bias"].sign() * 1e4
    names = EXTRAS[extras]
    results = run(ops.group_norm, inputs, names, shape.num_groups, backend=backend)
    doubles = {name: value.double() for name, value in inputs.items()}
    truth = run(plain_group_norm, doubles, names, shape.num_groups)
    # Plain float16 overflows here, so plain float32 says what error is fair; the rounding to float16 is
    # allowed for.
    floats = {name: value.float() for name, value in inputs.items()}
    plain = run(plain_group_norm, floats, names, shape.num_groups)
    for name, result in results.items():
        rough = plain[name].to(torch.float16)
        assert_as_accurate(result, truth[name], rough, name, terms=terms(inputs["x"], 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_group(backend):
    x = torch.full((2, 8, 4, 4), 3.0)
    out = ops.group_norm(x, 2, bias=torch.arange(8.0), backend=backend)
    torch.testing.assert_close(out, torch.arange(8.0)[None, :, None, None].expand_as(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_group(bad, backend):
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    clean = ops.group_norm(x, 4, backend=backend)
    x[1, 5, 0, 0] = bad
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = ops.group_norm(x.contiguous(memory_format=memory_format), 4, backend=backend)
        assert out[1, 4:6].isnan().any()
        torch.testing.assert_close(out[0], clean[0])
        torch.testing.assert_close(out[1, :4], clean[1, :4])
        torch.testing.assert_close(out[1, 6:], clean[1, 6:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    out = ops.group_norm(x, 4, weight, activation="silu", backend=backend)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_has_a_gradient(backend):
    inputs = group_norm_inputs(GroupNormShape((2, 8, 3, 3), 2), torch.float32)
    for chosen in NAMES:
        leaves = {name: inputs[name].detach() for name in NAMES}
        leaves[chosen].requires_grad_()
        x = leaves.pop("x")
        out = ops.group_norm(x, 2, **leaves, activation="silu", backend=backend)
        (grad,) = torch.autograd.grad(out, [x if chosen == "x" else leaves[chosen]], inputs["grad"])
        complete = run(plain_group_norm, inputs, NAMES[1:], 2, activation="silu")
        torch.testing.assert_close(grad, complete[chosen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_runs_are_bit_equal(layout, backend):
    inputs = group_norm_inputs(GROUP_NORM["cpg-10"], torch.bfloat16, layout=layout)
    first, second = (run(ops.group_norm, inputs, EXTRAS["all"], 32, backend=backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend, on_device):
    x = group_norm_inputs(GROUP_NORM["cpg-10"], torch.bfloat16)["x"]
    _, mean, rstd = on_device(torch.ops.fastldm.group_norm)(
        x, 32, None, None, 1e-3, None, None, None, None, backend
    )
    groups = x.double().reshape(2, 32, -1)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), groups.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        rstd.double(), (groups.var(-1, correction=0) + 1e-3).rsqrt(), rtol=1e-5, atol=0
    )


def test_reference_formulas_against_autograd():
    inputs = group_norm_inputs(GroupNormShape((2, 12, 3, 5), 4), torch.float64)
    names = EXTRAS["all"]
    truth = run(plain_group_norm, inputs, names, 4, activation="silu")
    arguments = {name: inputs[name] for name in names}
    y, _, _ = reference.group_norm(inputs["x"], 4, **arguments, activation="silu")
    grads = reference.group_norm_backward(inputs["grad"], inputs["x"], 4, **arguments, activation="silu")
    torch.testing.assert_close(y, truth["y"], rtol=1e-12, atol=1e-13)
    for name, grad in zip(NAMES, grads):
        torch.testing.assert_close(grad, truth[name], rtol=1e-11, atol=1e-12)


X = torch.randn(2, 8, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.randn(8), 2), {}, ValueError, "2 to 5 dimensions"),
        ((torch.randn(1, 8, 1, 1, 1, 1), 2), {}, ValueError, "2 to 5 dimensions"),
        ((X.long(), 2), {}, TypeError, "x must be floating point"),
        ((X, 3), {}, ValueError, "3 groups for 8 channels"),
        ((X, 2.0), {}, TypeError, "num_groups must be a whole number, got 2.0"),
        ((X, 2), {"eps": None}, TypeError, "eps must be a number, got None"),
        ((X, 2), {"shift": [1.0]}, TypeError, "shift must be a tensor, got list"),
        ((X, 0), {}, ValueError, "0 groups"),
        ((X, 2), {"activation": "gelu"}, ValueError, "'gelu'"),
        ((X, 2), {"weight": torch.ones(4)}, ValueError, r"weight must be \(C,\)"),
        ((X, 2), {"bias": torch.ones(8, device="meta")}, ValueError, "device"),
        ((X, 2), {"weight": torch.ones(8, dtype=torch.int64)}, TypeError, "weight must be floating point"),
        ((X, 2), {"channel_bias": torch.ones(8)}, ValueError, r"channel_bias must be \(N, C\)"),
        ((X, 2), {"scale": torch.ones(1, 8)}, ValueError, r"scale must be \(N, C\)"),
        ((X, 2), {"shift": torch.ones(2, 8, 1, 1)}, ValueError, r"shift must be \(N, C\)"),
    ],
)
def test_refused_arguments(arguments, keywords, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.group_norm(*arguments, **keywords)
    assert isinstance(raised.value, InputError)
