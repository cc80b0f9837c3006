"""`pack_weights`: the same results, state and training; weights in oneDNN's layout where they help."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastldm.models import UNet2DConditionModel
from fastldm.nn import GEGLU, pack_weights, unpack_weights
from fastldm.nn.packing import PackedConv2d, PackedGEGLU, PackedLinear
from fastldm.testing import assert_as_accurate

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
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
