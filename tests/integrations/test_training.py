"""Training through networks of diffusers in which fastldm computes: gradients, checkpoints, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastldm
from fastldm.testing import assert_as_accurate


def gradients(model: nn.Module, inputs: dict, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of the weights that are trained, and of the noisy latents."""
    sample = inputs["sample"].clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(**{**inputs, "sample": sample}).sample
    # A sum, as the gradients of a mean would be too small for float16 without a scaler.
    output.to(torch.promote_types(output.dtype, torch.float32)).square().sum().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {**found, "of the sample": sample.grad}


def in_double(model: nn.Module, inputs: dict) -> tuple[nn.Module, dict]:
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    return copy.deepcopy(model).double(), inputs


def assert_same_gradients(model: nn.Module, plain: nn.Module, inputs: dict, **options) -> None:
    with fastldm.record() as calls:
        found = gradients(model, inputs, **options)
    backward = {call.op for call in calls.calls if call.direction == "backward"}
    assert backward == {"attention", "group_norm"}
    eager, truth = gradients(plain, inputs, **options), gradients(*in_double(plain, inputs))
    assert found.keys() == eager.keys() == truth.keys()
    for name, ours in found.items():
        assert ours.dtype == eager[name].dtype
        assert ours.stride() == eager[name].stride(), name
    # The same added to all keys changes nothing: what there is of this gradient is rounding.
    scales = {name: scale(x) for name, x in truth.items() if not name.endswith("to_k.bias")}
    ours, exact, theirs = (
        torch.cat([(some[name] / by).flatten() for name, by in scales.items()])
        for some in (found, truth, eager)
    )
    # Behind a gradient of the first layers is every weight, for each of the two pictures.
    terms = 2 * sum(x.numel() for x in plain.parameters())
    assert_as_accurate(ours, exact, theirs, "all gradients, each scaled to 1", terms=terms)


def scale(x: Tensor) -> float:
    """A power of two, so that dividing by it rounds nothing."""
    return 2.0 ** x.abs().max().log2().ceil().item()


CHECKPOINTING = {
    "no": {},
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
}


def enable(model: nn.Module, checkpointing: dict) -> None:
    if checkpointing:
        model.enable_gradient_checkpointing(
            lambda function, *args: checkpoint(function, *args, **checkpointing)
        )


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("order", ["apply first", "apply last"])
def test_gradient_checkpointing(unet, inputs, checkpointing, order):
    unet.train()
    plain = copy.deepcopy(unet)
    if order == "apply first":
        fastldm.apply(unet)
    enable(unet, checkpointing)
    enable(plain, checkpointing)
    if order == "apply last":
        fastldm.apply(unet)
    assert_same_gradients(unet, plain, inputs)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_named_backend(unet, inputs, backend):
    plain = copy.deepcopy(unet.train())
    fastldm.apply(unet, backend=backend)
    with fastldm.record() as calls:
        assert_same_gradients(unet, plain, inputs)
    assert calls.backends() == {"attention": [backend], "group_norm": [backend]}


def test_bfloat16(unet, inputs):
    unet = unet.train().to(torch.bfloat16)
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    plain = copy.deepcopy(unet)
    fastldm.apply(unet)
    assert_same_gradients(unet, plain, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(unet, inputs, dtype):
    plain = copy.deepcopy(unet.train())
    fastldm.apply(unet)
    assert_same_gradients(unet, plain, inputs, autocast=dtype)


def test_channels_last(unet, inputs):
    unet = unet.train().to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(unet)
    fastldm.apply(unet)
    assert_same_gradients(unet, plain, inputs)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (2, {}),
        (2, {"up": True, "kernel": "sde_vp"}),
        (64, {"up": True, "kernel": "sde_vp"}),
        (2, {"down": True}),
    ],
)
def test_strides_of_a_residual_block(batch, options):
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=None, groups=4, **options)
    x = torch.randn(batch, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    strides = {training: block.train(training)(x, None).stride() for training in (False, True)}
    fastldm.apply(block)
    assert {training: block.train(training)(x, None).stride() for training in (False, True)} == strides


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_lora(unet, inputs, checkpointing):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    unet.train().requires_grad_(False).add_adapter(config)
    plain = copy.deepcopy(unet)
    fastldm.apply(unet)
    enable(unet, checkpointing)
    enable(plain, checkpointing)
    assert_same_gradients(unet, plain, inputs)


def test_a_vae(vae):
    vae.train()
    plain = copy.deepcopy(vae)
    fastldm.apply(vae)
    assert_same_gradients(vae, plain, {"sample": torch.randn(2, 3, 16, 24)})


def test_steps_of_an_optimizer(unet, inputs):
    """Over some steps, what is trained with fastldm goes the way of what is trained without."""
    models = {"plain": copy.deepcopy(unet.train()), "ours": unet}
    fastldm.apply(unet)
    losses = {name: [] for name in models}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            loss = (model(**inputs).sample - inputs["sample"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-3)
