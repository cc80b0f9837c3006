"""`pack_weights`: the same results, state and training; weights in oneDNN's layout where they help."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastldm.models import UNet2DConditionModel
from fastldm.nn import GEGLU, pack_weights, unpack_weights
from fastldm.nn.packing import PackedConv2d, PackedGEGLU, PackedLinear, _sample
from fastldm.testing import assert_as_accurate

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


LAYERS = {
    "linear": (lambda: nn.Linear(256, 256), (2, 80, 256)),
    "linear without bias": (lambda: nn.Linear(256, 256, bias=False), (150, 256)),
    "small linear": (lambda: nn.Linear(8, 12), (3, 8)),
    "one row": (lambda: nn.Linear(8, 12), (8,)),
    "3x3": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 9, 7)),
    "3x3 stride 2": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 9, 8)),
    "1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 9, 7)),
    "1x1 without bias": (lambda: nn.Conv2d(12, 20, 1, bias=False), (1, 12, 1, 1)),
    "1x1 stride 2": (lambda: nn.Conv2d(12, 20, 1, stride=2), (2, 12, 9, 7)),
    "grouped": (lambda: nn.Conv2d(12, 24, 3, padding=(0, 1), groups=4), (2, 12, 5, 6)),
    "dilated": (lambda: nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False), (1, 4, 8, 9)),
    "one picture": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 9)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 8, 9)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 8, 9)),
    "geglu": (lambda: GEGLU(160, 320), (2, 90, 160)),
}
TERMS = 256


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_results(name, dtype):
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        plain, exact = layer(x), copy.deepcopy(layer).double()(x.double())
        packed = pack_weights(layer)
        for inputs in (x, torch.stack([x, x], dim=-1)[..., 0]):
            result = packed(inputs)
            assert result.dtype == dtype
            assert_as_accurate(result, exact, plain, name, terms=TERMS)
        assert torch.equal(packed(x), packed(x))
        assert torch.equal(unpack_weights(layer)(x), plain)


@onednn
def test_weights_are_packed_once_and_anew_when_they_change():
    layer, x = pack_weights(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        layer(x)
        first = layer.__dict__["_packed"]
        layer(x)
        assert layer.__dict__["_packed"] is first
        for change in (
            lambda: layer.weight.mul_(2),
            lambda: layer.load_state_dict(nn.Conv2d(4, 6, 3).state_dict()),
            lambda: setattr(layer, "weight", nn.Parameter(torch.randn(6, 4, 3, 3))),
            lambda: layer.bfloat16().float(),
        ):
            change()
            torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))
        small = x[:, :, :5, :4]
        torch.testing.assert_close(layer(small), F.conv2d(small, layer.weight, layer.bias))


@onednn
def test_which_layers_are_packed():
    class Mine(nn.Linear):
        pass

    module = nn.Sequential(
        nn.Linear(2, 2), Mine(2, 2), nn.Conv2d(2, 2, 1, padding="same"), nn.Conv1d(2, 2, 1), GEGLU(2, 2)
    )
    assert pack_weights(module) is module
    assert [type(layer) for layer in module] == [PackedLinear, Mine, nn.Conv2d, nn.Conv1d, PackedGEGLU]
    assert isinstance(module[0], nn.Linear)
    pack_weights(module)
    assert type(module[0]) is PackedLinear
    unpack_weights(module)
    assert [type(layer) for layer in module] == [nn.Linear, Mine, nn.Conv2d, nn.Conv1d, GEGLU]
    assert type(module[4].proj) is nn.Linear


@onednn
def test_the_networks_of_a_pipeline_are_packed():
    networks = {"unet": nn.Sequential(nn.Linear(2, 2)), "vae": nn.Linear(2, 2)}
    pipe = types.SimpleNamespace(components={**networks, "tokenizer": object()})
    assert pack_weights(pipe) is pipe
    layers = [networks["unet"][0], networks["vae"]]
    assert [type(layer) for layer in layers] == [PackedLinear, PackedLinear]
    assert unpack_weights(pipe) is pipe
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    "layer", [nn.Linear(300, 300), nn.Conv2d(3, 4, 3), GEGLU(300, 300)], ids=["linear", "conv", "geglu"]
)
def test_training_state_and_copies(layer):
    x = torch.randn(1, 3, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(100, 300)
    keys, inputs = list(layer.state_dict()), (x, *layer.parameters())
    expected = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), (x, *layer.parameters()))
    pack_weights(layer)
    with torch.no_grad():
        out = layer(x)
    for result, gradient in zip(torch.autograd.grad(layer(x).square().sum(), inputs), expected, strict=True):
        assert torch.equal(result, gradient)
    assert list(layer.state_dict()) == keys
    twin = copy.deepcopy(layer)
    assert "_packed" not in twin.__dict__
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(twin(x), out)
        assert torch.equal(torch.load(file, weights_only=False)(x), out)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(layer(x), out)
        assert layer(x[:0]).shape[0] == 0


@onednn
def test_a_whole_network_in_float32_keeps_parity():
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    network = UNet2DConditionModel.from_config(config).eval()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([7]), torch.randn(2, 5, 24)
    with torch.no_grad():
        plain = network(*inputs).sample
        packed = pack_weights(network)(*inputs).sample
    kinds = {type(layer) for layer in network.modules()}
    assert {PackedLinear, PackedConv2d, PackedGEGLU} <= kinds
    assert (packed - plain).abs().max() <= 1e-5
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs).sample, plain, rtol=1e-4, atol=1e-5)


KINDS = {
    "linear": (lambda: nn.Linear(300, 300), (100, 300)),
    "conv": (lambda: nn.Conv2d(12, 20, 3), (2, 12, 9, 7)),
    "1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 9, 7)),
    "geglu": (lambda: GEGLU(300, 300), (100, 300)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def plain_results(layer, x):
    """Of a plain twin: copied parameter by parameter, it shares nothing with `layer`."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        return unpack_weights(twin)(x)


def frozen(kind, dtype=torch.float32):
    make, shape = KINDS[kind]
    return make().to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)


def assert_close(result, expected):
    """Relative to the whole: rounding is off by 1e-6 in float32, 1e-2 in bfloat16, a stale weight by more."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (2e-2 if expected.dtype is torch.bfloat16 else 1e-4)


def assert_plain_results(layer, x):
    assert_close(layer(x), plain_results(layer, x))


PAST_THE_VERSION = {
    "mul_": lambda weight: weight.data.mul_(2),
    "+=": lambda weight: weight.data.add_(torch.randn_like(weight) * 0.3),
    "rank of one": lambda weight: weight.data.flatten(1).add_(
        torch.randn(len(weight), 1, dtype=weight.dtype) * weight[0].flatten()
    ),
    "copy_": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    "a third of the rows": lambda weight: weight.data[: len(weight) // 3].mul_(3),
    "numpy": lambda weight: weight.detach().view(torch.int16).numpy().__ixor__(1 << 6),
}


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", PAST_THE_VERSION)
def test_writes_past_the_version_are_seen(kind, dtype, write):
    layer, x = frozen(kind, dtype)
    weight = pack_weights(layer).get_parameter("proj.weight" if kind == "geglu" else "weight")
    for _ in range(2):
        assert_plain_results(layer, x)
        version = weight._version
        PAST_THE_VERSION[write](weight)
        assert weight._version == version
    assert_plain_results(layer, x)


@kinds
def test_packing_again_drops_what_was_packed(kind):
    layer, x = frozen(kind)
    weight = pack_weights(layer).get_parameter("proj.weight" if kind == "geglu" else "weight")
    layer(x)
    seen = layer.__dict__.get("_packed") and layer._packed[2].clone()
    for element in range(100):  # one that is not in the sample, where there is one
        weight.data.view(-1)[element] += 100
        if seen is None or torch.equal(seen, layer._packed[2]):
            break
        weight.data.view(-1)[element] -= 100
    pack_weights(nn.Sequential(layer))
    assert "_packed" not in layer.__dict__
    assert_plain_results(layer, x)


@pytest.mark.parametrize(
    "shape", [(1280, 320, 3, 3), (320, 768), (1280, 1280), (64, 3, 3, 3), (1, 1), (600, 2)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_sample_covers_the_weight_evenly(shape, channels_last):
    weight = torch.randn(shape)
    if channels_last and len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    sample = _sample(weight)
    assert sample.data_ptr() == weight.data_ptr()
    step, row = sample.stride(0), weight[0].numel()
    places = torch.arange(len(sample)) * step
    assert places[-1] < weight.numel() <= places[-1] + step
    assert step == 1 or 512 <= len(places) <= 1024
    assert len((places % row).unique()) == min(row, len(places))  # no column is favoured


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = frozen("linear")
        pack_weights(layer)
        for _ in range(2):
            assert_plain_results(layer, x)
            layer.weight[7, 7] += 100
        assert_plain_results(layer, x)


def test_results_of_an_inference_mode_serve_other_modes():
    layer, x = frozen("linear")
    pack_weights(layer)
    with torch.inference_mode():
        layer(x)
        layer.weight.mul_(2)
        assert_plain_results(layer, x)
    assert_plain_results(layer, x)


def test_a_weight_at_the_address_of_another():
    """In a process of its own: `keep_freed_memory`, which makes addresses come again, is for all of it."""
    script = """
import torch, fastldm
from torch import nn
fastldm.keep_freed_memory()
layer, x = fastldm.pack_weights(nn.Linear(1024, 1024).requires_grad_(False)), torch.randn(64, 1024)
for _ in range(30):
    layer.weight = None
    layer.weight = nn.Parameter(torch.randn(1024, 1024), requires_grad=False)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, rtol=1e-3, atol=1e-3)
for _ in range(30):
    weight = None
    weight = torch.randn(1024, 1024)
    result = torch.func.functional_call(layer, {"weight": weight}, x)
    torch.testing.assert_close(result, x @ weight.T + layer.bias, rtol=1e-3, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@onednn
@pytest.mark.parametrize("kind", ["linear", "geglu"])
def test_nothing_is_kept_of_a_weight_that_has_gone(kind):
    layer, x = frozen(kind)
    linear = layer.proj if kind == "geglu" else layer
    pack_weights(layer)(x)
    assert "_packed" in layer.__dict__
    linear.weight = nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)
    assert "_packed" not in layer.__dict__
    layer(x)
    assert "_packed" in layer.__dict__
    assert layer.to("meta") is layer
    assert "_packed" not in layer.__dict__


@kinds
def test_another_tensor_in_data(kind):
    layer, x = frozen(kind)
    weight = pack_weights(layer).get_parameter("proj.weight" if kind == "geglu" else "weight")
    layer(x)
    old = weight.data
    weight.data = torch.randn_like(weight)
    assert_plain_results(layer, x)
    weight.data = old
    assert_plain_results(layer, x)
    if kind == "linear":
        weight.data = weight.data.t()  # the same memory
        assert_plain_results(layer, x)


WRAPS = {
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=False),
    "tensor": lambda tensor: tensor,
}


@kinds
@pytest.mark.parametrize("wrap", WRAPS)
def test_functional_call(kind, wrap):
    layer, x = frozen(kind)
    pack_weights(layer)
    for _ in range(30):
        state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
        result = functional_call(layer, {key: WRAPS[wrap](value) for key, value in state.items()}, x)
        twin = unpack_weights(copy.deepcopy(layer))
        twin.load_state_dict(state)
        assert_close(result, twin(x))


@kinds
def test_parametrized_layers(kind):
    class Scale(nn.Module):
        factor = 1.0

        def forward(self, weight):
            return weight * self.factor

    layer, x = frozen(kind)
    expected = layer(x)
    pack_weights(layer)(x)
    linear, scale = layer.proj if kind == "geglu" else layer, Scale()
    linear.bias.zero_()
    parametrize.register_parametrization(linear, "weight", scale)
    for scale.factor in (2.0, 3.0, 0.5):
        weight = linear.parametrizations.weight.original * scale.factor
        with torch.no_grad():
            twin = KINDS[kind][0]().requires_grad_(False)
            twin_linear = twin.proj if kind == "geglu" else twin
            twin_linear.weight.copy_(weight)
            twin_linear.bias.zero_()
        assert_close(layer(x), twin(x))
    assert expected.shape == unpack_weights(layer)(x).shape


@kinds
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_tracing(kind):
    layer, x = frozen(kind)
    traced = torch.jit.trace(pack_weights(nn.Sequential(layer)), x)
    assert_close(traced(x), plain_results(layer, x))
    graph = torch.fx.symbolic_trace(pack_weights(nn.Sequential(layer)))
    assert_close(graph(x), plain_results(layer, x))


@kinds
def test_what_watches_operations_sees_them(kind):
    layer, x = frozen(kind)

    def flops():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops()

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    plain, seen = flops(), []
    pack_weights(layer)
    assert flops() == plain > 0
    with Seen():
        layer(x)
    assert {F.linear, torch.conv2d} & set(seen)


@kinds
def test_other_derivatives(kind):
    layer, x = frozen(kind)
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(layer, (x,), (tangent,))[1]
    pack_weights(layer)
    assert torch.equal(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level(), torch.no_grad():
        dual = layer(forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "we have not yet implemented the batching rule"
        torch.testing.assert_close(torch.vmap(layer)(x[None])[0], plain_results(layer, x))


@kinds
def test_a_trainable_bias_of_a_frozen_layer(kind):
    layer, x = frozen(kind)
    bias = layer.get_parameter("proj.bias" if kind == "geglu" else "bias").requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), bias)[0]
    assert torch.equal(torch.autograd.grad(pack_weights(layer)(x).sum(), bias)[0], expected)


def result_or_message(function, *args):
    try:
        return function(*args)
    except (RuntimeError, IndexError) as error:
        return f"{type(error)} {error}"


BIASES = {
    "strided": lambda size: torch.randn(2 * size)[::2],
    "expanded": lambda size: torch.randn(1).expand(size),
    "one number": lambda size: torch.randn(1),
    "scalar": lambda size: torch.randn(()),
    "short": lambda size: torch.randn(size - 2),
    "two rows": lambda size: torch.randn(2, size),
    "float64": lambda size: torch.randn(size, dtype=torch.float64),
}


@kinds
@pytest.mark.parametrize("bias", BIASES)
def test_other_biases(kind, bias):
    layer, x = frozen(kind)
    linear = layer.proj if kind == "geglu" else layer
    linear.bias = nn.Parameter(BIASES[bias](len(linear.bias)), requires_grad=False)
    plain = result_or_message(layer, x)
    packed = result_or_message(pack_weights(layer), x)
    if isinstance(plain, str):
        assert packed == plain
    else:
        assert_close(packed, plain)


@kinds
def test_other_shapes_and_dtypes_do_or_raise_as_the_plain_layer_does(kind):
    layer, x = frozen(kind)
    wrong = {
        "dtype": x.bfloat16(),
        "float64": x.double(),
        "last": x[..., :1],
        "second": x[:, :-1],
        "scalar": torch.randn(()),
        "five": x[None, None, None],
    }
    plain = {name: result_or_message(layer, value) for name, value in wrong.items()}
    pack_weights(layer)
    for name, value in wrong.items():
        packed = result_or_message(layer, value)
        if isinstance(plain[name], str):
            assert packed == plain[name], name
        else:
            assert_close(packed, plain[name])


@pytest.mark.parametrize(
    "shape", [(20, 11, 3, 3), (20, 12, 20, 3), (20, 12, 1, 1), (4, 12, 3, 3), (20, 12, 3)]
)
def test_a_convolution_weight_of_another_shape(shape):
    layer, x = frozen("conv")
    layer.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
    plain = result_or_message(layer, x)
    packed = result_or_message(pack_weights(layer), x)
    if isinstance(plain, str):
        assert packed == plain
    else:
        assert_close(packed, plain)


def test_a_geometry_changed_after_packing():
    layer = pack_weights(nn.Conv2d(12, 20, 3, padding=1).requires_grad_(False))
    x = torch.randn(2, 12, 9, 7)
    layer(x)
    for name, value in {
        "stride": (2, 2),
        "dilation": (2, 1),
        "padding": (0, 1),
        "groups": 1,
        "padding_mode": "circular",
        "_reversed_padding_repeated_twice": [1, 1, 1, 1],
    }.items():
        setattr(layer, name, value)
        assert_plain_results(layer, x)
    layer.padding_mode = "zeros"
    for name, value in {"stride": 1, "dilation": 1, "padding": "same"}.items():
        setattr(layer, name, value)
        assert_plain_results(layer, x)


HOOKS = {
    "forward": lambda proj, hook: proj.register_forward_hook(hook),
    "forward pre": lambda proj, hook: proj.register_forward_pre_hook(hook),
    "global": lambda proj, hook: nn.modules.module.register_module_forward_hook(hook),
    "global pre": lambda proj, hook: nn.modules.module.register_module_forward_pre_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_geglus_projection(register):
    layer, x = frozen("geglu")
    pack_weights(layer)(x)
    seen = []
    handle = HOOKS[register](layer.proj, lambda module, *_: seen.append(module))
    layer(x)
    handle.remove()
    assert layer.proj in seen
    layer(x)
    assert seen.count(layer.proj) == 1


def test_other_projections_of_a_geglu():
    class Twice(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer, x = frozen("geglu")
    pack_weights(layer)(x)
    plain = layer.proj
    value, gate = (2 * F.linear(x, plain.weight, plain.bias)).chunk(2, dim=-1)
    plain.forward = lambda input: 2 * F.linear(input, plain.weight, plain.bias)
    torch.testing.assert_close(layer(x), value * F.gelu(gate))
    del plain.forward
    layer.proj.__class__ = Twice
    assert_close(layer(x), value * F.gelu(gate))
    layer.proj = nn.Sequential(plain)  # as adapters wrap it: no weight, no bias
    assert_close(layer(x), value * F.gelu(gate))
