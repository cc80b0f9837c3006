"""`fastldm.apply` and what else changes a network of diffusers, in either order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastldm
from fastldm.errors import UnsupportedError

ORDERS = ["apply first", "apply last"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in"]


def in_order(order: str, model: nn.Module, change: Callable, **options) -> tuple[nn.Module, fastldm.Report]:
    """`model` as `change` alone leaves it, and the report of apply; `model` itself gets both."""
    plain = copy.deepcopy(model)
    change(plain)
    if order == "apply last":
        change(model)
    report = fastldm.apply(model, **options)
    if order == "apply first":
        change(model)
    return plain, report


def add_lora(unet: UNet2DConditionModel, targets: list[str], name: str = "default") -> None:
    generator = torch.Generator().manual_seed(1)
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
    for key, parameter in unet.named_parameters():
        if f".{name}." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def add_two_loras(unet: UNet2DConditionModel) -> None:
    add_lora(unet, ATTENTION, "one")
    add_lora(unet, CONVS, "two")
    unet.set_adapters(["one", "two"], [0.5, 0.7])


def disable_lora(unet: UNet2DConditionModel) -> None:
    add_lora(unet, ATTENTION)
    unet.disable_adapters()


def fuse_lora(unet: UNet2DConditionModel) -> None:
    add_two_loras(unet)
    unet.fuse_lora(adapter_names=["one", "two"])


def unfuse_lora(unet: UNet2DConditionModel) -> None:
    fuse_lora(unet)
    unet.unfuse_lora()


def delete_lora(unet: UNet2DConditionModel) -> None:
    add_two_loras(unet)
    unet.delete_adapters("one")


def unload_lora(unet: UNet2DConditionModel) -> None:
    add_two_loras(unet)
    unet.unload_lora()


def train_norms_with_lora(unet: UNet2DConditionModel) -> None:
    """peft then has a copy of each norm, behind a wrapper."""
    saved = ["norm1", "conv_norm_out"]
    unet.add_adapter(LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=saved))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in unet.named_parameters():
        if "modules_to_save" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrize_norms(unet: UNet2DConditionModel) -> None:
    for module in list(unet.modules()):
        if isinstance(module, nn.GroupNorm):
            parametrize.register_parametrization(module, "weight", Doubled())


def normalize_weights(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(1)
    resnet = unet.mid_block.resnets[0]
    parametrizations.weight_norm(resnet.conv1)
    parametrizations.weight_norm(resnet.norm1, dim=None)
    parametrizations.spectral_norm(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q)


def set_processors_again(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor(dict(unet.attn_processors))


def fuse_qkv_and_back(unet: UNet2DConditionModel) -> None:
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()


def slice_attention_and_back(unet: UNet2DConditionModel) -> None:
    unet.set_attention_slice(1)
    unet.set_attention_slice(None)


def chunk_feed_forward(unet: UNet2DConditionModel) -> None:
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(2, 1)


def load_ip_adapter(unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(1)

    def weights(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    image = {"proj.weight": weights(4 * 24, 12), "proj.bias": weights(4 * 24)}
    image |= {"norm.weight": weights(24), "norm.bias": weights(24)}
    ip = {}
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for layer in ("to_k_ip", "to_v_ip"):
            ip[f"{2 * number + 1}.{layer}.weight"] = weights(width, 24)
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": ip}])


CHANGES = {
    "LoRA": lambda unet: add_lora(unet, ATTENTION),
    "LoRA on convolutions": lambda unet: add_lora(unet, CONVS),
    "two LoRAs": add_two_loras,
    "LoRA disabled": disable_lora,
    "LoRA fused": fuse_lora,
    "LoRA unfused": unfuse_lora,
    "LoRA deleted": delete_lora,
    "LoRA unloaded": unload_lora,
    "norms trained beside LoRA": train_norms_with_lora,
    "parametrized norms": parametrize_norms,
    "weight norm": normalize_weights,
    "processors set again": set_processors_again,
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "fused projections and back": fuse_qkv_and_back,
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "chunked feed-forward": chunk_feed_forward,
    "sliced attention and back": slice_attention_and_back,
}


# What fastldm still computes where a change takes something from it: processors of another class put in after
# apply, norms of a class that it does not know.
LEFT = {
    (CHANGES["fused projections"], "apply first"): ("group_norm",),
    (CHANGES["sliced attention and back"], "apply first"): ("group_norm",),
    (CHANGES["parametrized norms"], "apply last"): ("attention",),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_right_and_revertable(unet, inputs, change, order, assert_right):
    plain, _ = in_order(order, unet, change)
    assert_right(unet, plain, inputs, LEFT.get((change, order), ("attention", "group_norm")))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("order", ORDERS)
def test_lora_may_come_and_go_with_every_weight_as_without_fastldm(unet, order):
    plain, _ = in_order(order, unet, fuse_lora)
    for model in (unet, plain):
        model.unfuse_lora()
        model.delete_adapters(["one", "two"])
    assert unet.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in unet.state_dict().items())


@pytest.mark.parametrize("order", ORDERS)
def test_ip_adapter_keeps_its_processors(unet, inputs, order, assert_right):
    plain, report = in_order(order, unet, load_ip_adapter)
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 12)]}
    trained = {name for name, x in plain.attn_processors.items() if isinstance(x, nn.Module)}
    assert {name for name, x in unet.attn_processors.items() if isinstance(x, nn.Module)} == trained
    if order == "apply last":
        assert {(entry.path, entry.skipped) for entry in report.skipped} == {
            (name, "it has weights of its own") for name in trained
        }
        with pytest.raises(UnsupportedError, match="IPAdapterAttnProcessor2_0"):
            fastldm.apply(unet, strict=True)
    calls = assert_right(unet, plain, inputs)
    # diffusers makes the processors of self-attention anew, of the class that it finds.
    assert sum(call.op == "attention" for call in calls) == len(trained)


def test_ip_adapter_unloaded(unet, inputs, assert_right):
    untouched = copy.deepcopy(unet)
    fastldm.apply(unet)
    load_ip_adapter(unet)
    processors = {
        name: AttnProcessor2_0() if isinstance(x, nn.Module) else x.__class__()
        for name, x in unet.attn_processors.items()
    }
    unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = None, None
    unet.set_attn_processor(processors)
    assert_right(unet, untouched, inputs)


@pytest.mark.parametrize("order", ORDERS)
def test_controlnet(unet, controlnet, inputs, order, assert_right):
    hint = {**inputs, "controlnet_cond": torch.randn(2, 3, 64, 96), "conditioning_scale": 0.7}
    plain, _ = in_order(order, controlnet, lambda net: None)
    with torch.no_grad():
        down, mid = controlnet(**hint, return_dict=False)
    assert_right(controlnet, plain, hint)
    inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    untouched = copy.deepcopy(unet)
    fastldm.apply(unet)
    assert_right(unet, untouched, inputs)


class Custom:
    """A processor of a user's own, derived from one that fastldm knows."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 2 * AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


class Derived(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", [Custom, Derived])
def test_processors_of_ones_own_are_left_alone(unet, inputs, cls, order, assert_right):
    processor = cls()
    plain, report = in_order(order, unet, lambda net: net.set_attn_processor(processor))
    assert set(unet.attn_processors.values()) == {processor}
    if order == "apply last":
        assert {entry.path for entry in report.skipped} == set(unet.attn_processors)
        assert {entry.skipped for entry in report.skipped} == {"it is not one of diffusers'"}
    assert_right(unet, plain, inputs, ("group_norm",))


def test_processors_set_after_apply_are_taken_by_the_next(unet, inputs, assert_right, run):
    plain = copy.deepcopy(unet)
    fastldm.apply(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    with fastldm.record() as calls:
        run(unet, inputs)
    assert list(calls.backends()) == ["group_norm"]
    fastldm.apply(unet)
    assert_right(unet, plain, inputs)


def test_a_processor_shared_with_another_model(unet, inputs, run):
    other, shared = copy.deepcopy(unet), AttnProcessor2_0()
    unet.set_attn_processor(shared)
    other.set_attn_processor(shared)
    fastldm.apply(unet)
    assert type(shared) is AttnProcessor2_0
    with fastldm.record() as calls:
        run(other, inputs)
    assert not calls.calls
    # One copy of it, as there was one of it.
    assert len(set(unet.attn_processors.values())) == 1
    with fastldm.applied(other):
        assert shared not in other.attn_processors.values()
    assert set(other.attn_processors.values()) == {shared}


def test_sliced_attention_is_skipped(unet, inputs, assert_right):
    plain, report = in_order("apply last", unet, lambda net: net.set_attention_slice(1))
    assert {(entry.was, entry.skipped) for entry in report.skipped} == {
        ("SlicedAttnProcessor", "it does not call scaled_dot_product_attention")
    }
    assert_right(unet, plain, inputs, ("group_norm",))


def test_projections_unfused_after_revert_bring_ours_back(unet, inputs, assert_right):
    """diffusers keeps the processors of before in the model; revert once more takes them."""
    plain = copy.deepcopy(unet)
    fastldm.apply(unet, ops="attention")
    unet.fuse_qkv_projections()
    fastldm.revert(unet)
    for net in (unet, plain):
        net.unfuse_qkv_projections() if net is unet else fuse_qkv_and_back(net)
    assert_right(unet, plain, inputs, ("attention",))


def test_default_processors_ask_for_revert(unet, inputs, run):
    """diffusers goes by the exact class there."""
    fastldm.apply(unet)
    with pytest.raises(ValueError, match="set_default_attn_processor"):
        unet.set_default_attn_processor()
    fastldm.revert(unet)
    unet.set_default_attn_processor()
    assert {type(x) for x in unet.attn_processors.values()} == {AttnProcessor}


@pytest.mark.parametrize("order", ORDERS)
def test_an_attention_backend_that_was_set_stays(flux, flux_inputs, order, assert_right, run):
    plain, report = in_order(order, flux, lambda net: net.set_attention_backend("_native_math"))
    if order == "apply last":
        processors = [entry for entry in report.skipped if entry.path.endswith(".processor")]
        assert len(processors) == 2
        assert all("attention backend was set to" in entry.skipped for entry in processors)
        assert_right(flux, plain, flux_inputs, ())
        return
    assert torch.equal(*run(flux, flux_inputs), *run(plain, flux_inputs))
    calls = assert_right(flux, plain, flux_inputs, ("attention",))
    assert [call.backend for call in calls] == ["torch"] * 2
    assert all("attention backend of diffusers was set to" in call.fallback for call in calls)


def test_an_attention_backend_in_a_context_stays(flux, flux_inputs, assert_right, run):
    plain = copy.deepcopy(flux)
    fastldm.apply(flux)
    with attention_dispatch.attention_backend("_native_math"), fastldm.record() as calls:
        assert torch.equal(*run(flux, flux_inputs), *run(plain, flux_inputs))
    assert all("active attention backend" in call.fallback for call in calls.calls)
    assert not any(call.fallback for call in assert_right(flux, plain, flux_inputs, ("attention",)))


def test_two_backends_required_at_once(flux, flux_inputs, run):
    fastldm.apply(flux, backend="reference")
    flux.set_attention_backend("native")
    with pytest.raises(UnsupportedError, match="'reference' cannot run attention here: the attention back"):
        run(flux, flux_inputs)
