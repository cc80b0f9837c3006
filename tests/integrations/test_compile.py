"""`torch.compile` and `torch.export` of networks in which fastldm computes: one graph, no recompilation."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import fastldm
from fastldm.testing import assert_as_accurate

TERMS = 64 * 9

# A cache of diffusers' own.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def strict():
    """A graph break is an error by fullgraph, here a second compilation is one too."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture
def small() -> UNet2DConditionModel:
    """A UNet of one level, as graphs take time to make."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    widths = {"block_out_channels": (16,), "cross_attention_dim": 24, "attention_head_dim": 2}
    return UNet2DConditionModel(
        sample_size=8, mid_block_type=None, layers_per_block=1, norm_num_groups=4, **blocks, **widths
    ).eval()


def compiled(model: nn.Module, backend: str = "eager", **options) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def assert_same(model: nn.Module, plain: nn.Module, inputs: dict, ops: tuple = ("attention", "group_norm")):
    with fastldm.record() as calls:
        result = output(model, inputs)
    assert tuple(calls.backends()) == ops
    exact = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    truth = output(copy.deepcopy(plain).double(), exact)
    assert_as_accurate(result, truth, output(plain, inputs), terms=TERMS)


def output(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs, return_dict=False)[0]


ORDERS = ["apply first", "apply last"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_network(small, inputs, order, in_place):
    plain = copy.deepcopy(small)
    if order == "apply first":
        fastldm.apply(small)
    if in_place:
        small.compile(backend="aot_eager", fullgraph=True)
        model = small
    else:
        model = compiled(small)
    if order == "apply last":
        report = fastldm.apply(model)
        assert not any("_orig_mod" in entry.path for entry in report.entries)
    assert_same(model, plain, inputs)
    assert_same(model, plain, inputs)


def test_apply_to_a_network_that_has_run_compiled(small, inputs):
    """Compiles once more, as the classes are others; so does revert."""
    plain, model = copy.deepcopy(small), compiled(small)
    with torch._dynamo.config.patch(error_on_recompile=False):
        before = output(model, inputs)
        fastldm.apply(model)
        assert_same(model, plain, inputs)
        fastldm.revert(model)
        with fastldm.record() as calls:
            assert torch.equal(output(model, inputs), before)
    assert not calls.calls


def test_inductor(small):
    """One residual block and one transformer block: inductor takes its time."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.resnet = small.down_blocks[0].resnets[0]
            self.block = small.down_blocks[0].attentions[0].transformer_blocks[0]

        def forward(self, x, temb, context):
            x = self.resnet(x, temb)
            return self.block(x.flatten(2).transpose(1, 2), encoder_hidden_states=context)

    net = Net().eval()
    inputs = torch.randn(2, 16, 8, 12), torch.randn(2, 64), torch.randn(2, 5, 24)
    plain = net(*inputs)
    exact = copy.deepcopy(net).double()(*(x.double() for x in inputs))
    fastldm.apply(net)
    with fastldm.record() as calls:
        result = compiled(net, "inductor")(*inputs)
    assert [call.op for call in calls.calls] == ["group_norm"] * 2 + ["attention"] * 2
    assert_as_accurate(result, exact, plain, terms=TERMS)


@pytest.mark.parametrize("order", ORDERS)
def test_repeated_blocks(small, inputs, order):
    """diffusers finds them by the names of their classes; all of them share one compiled function."""
    deep = type(small).from_config({**small.config, "transformer_layers_per_block": 2}).eval()
    plain = copy.deepcopy(deep)
    if order == "apply first":
        fastldm.apply(deep)
    deep.compile_repeated_blocks(backend="eager", fullgraph=True)
    if order == "apply last":
        fastldm.apply(deep)
    # They differ in nothing that is compiled, so one compilation has to do.
    assert_same(deep, plain, inputs)


def test_sizes_that_change(small, inputs):
    plain = copy.deepcopy(small)
    fastldm.apply(small)
    model = compiled(small, dynamic=True)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for size in [(8, 12), (16, 8), (12, 20)]:
            inputs["sample"] = torch.randn(2, 4, *size)
            assert_same(model, plain, inputs)


def test_the_backend_may_change(small, inputs):
    fastldm.apply(small)
    model = compiled(small)
    output(model, inputs)
    for backend in ("reference", "torch", "cpu"):
        with fastldm.use_backend(backend), fastldm.record() as calls:
            output(model, inputs)
        assert calls.backends() == {"attention": [backend], "group_norm": [backend]}


def test_a_vae(vae):
    plain = copy.deepcopy(vae)
    fastldm.apply(vae)
    assert_same(compiled(vae), plain, {"sample": torch.randn(2, 3, 16, 24)})


@pytest.mark.parametrize("chosen", [False, True])
def test_the_dispatcher_of_diffusers(flux, flux_inputs, chosen):
    """What is left to diffusers inside a graph is not recorded: its calls are none of fastldm."""
    plain = copy.deepcopy(flux)
    fastldm.apply(flux)
    if chosen:
        flux.set_attention_backend("native")
    assert_same(compiled(flux), plain, flux_inputs, () if chosen else ("attention",))


def test_lora(small, inputs):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    small.add_adapter(config)
    plain = copy.deepcopy(small)
    fastldm.apply(small)
    assert_same(compiled(small), plain, inputs)


def test_a_norm_with_a_hook(small, inputs):
    plain = copy.deepcopy(small)
    fastldm.apply(small)
    for model in (small, plain):
        model.down_blocks[0].resnets[0].norm1.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(compiled(small), plain, inputs)


def test_hooks_of_accelerate(small, inputs):
    plain = copy.deepcopy(small)
    for module in small.modules():
        if isinstance(module, nn.GroupNorm):
            add_hook_to_module(module, ModelHook())
    fastldm.apply(small)
    assert_same(compiled(small), plain, inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(small, inputs, checkpointing):
    small.train()
    if checkpointing:
        small.enable_gradient_checkpointing()
    plain = copy.deepcopy(small)
    fastldm.apply(small)
    with torch.enable_grad(), fastldm.record() as calls:
        for model in (compiled(small, "aot_eager"), plain):
            output(model, inputs).square().sum().backward()
    assert {call.op for call in calls.calls if call.direction == "backward"} == {"attention", "group_norm"}
    for (name, ours), theirs in zip(small.named_parameters(), plain.parameters()):
        atol = 1e-4 * theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=atol, msg=name)


def test_torch_nn():
    layers = [nn.Conv1d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.attention = (
                nn.Sequential(*layers),
                nn.MultiheadAttention(8, 1, batch_first=True),
            )

        def forward(self, x):
            x = self.layers(x).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    net, x = Net().eval(), torch.randn(2, 4, 20)
    expected = net(x)
    fastldm.apply(net)
    with fastldm.record() as calls:
        torch.testing.assert_close(compiled(net)(x), expected)
    assert [call.op for call in calls.calls] == ["group_norm", "group_norm", "attention"]


@pytest.mark.parametrize("strict", [False, True])
def test_export(small, inputs, strict):
    plain = copy.deepcopy(small)
    fastldm.apply(small)
    program = torch.export.export(small, (), {**inputs, "return_dict": False}, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"fastldm.attention.default", "fastldm.group_norm.default"} <= names
    assert not any("scaled_dot_product" in name or "aten.group_norm" in name for name in names)
    assert program.state_dict.keys() == plain.state_dict().keys()
    assert_same(program.module(), plain, inputs)
