"""`fastldm.apply` and hooks: those of PyTorch, of accelerate and of diffusers, in either order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import hooks as diffusers_hooks
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastldm

ORDERS = ["apply first", "apply last"]


def in_order(order: str, model: nn.Module, change: Callable) -> None:
    for step in (fastldm.apply, change) if order == "apply first" else (change, fastldm.apply):
        step(model)


def offload(model: nn.Module) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def offload_in_groups(model: nn.Module) -> None:
    device = torch.device("cpu")
    diffusers_hooks.apply_group_offloading(model, device, device, offload_type="leaf_level")


def hook_all(model: nn.Module) -> None:
    for module in model.modules():
        add_hook_to_module(module, ModelHook())


def add_hook(module: nn.Module) -> Callable[[nn.Module], None]:
    """Returns what takes it off."""
    add_hook_to_module(module, ModelHook())
    return remove_hook_from_module


def add_hook_of_diffusers(module: nn.Module) -> Callable[[nn.Module], None]:
    diffusers_hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(
        diffusers_hooks.ModelHook(), "named"
    )
    return lambda module: module._diffusers_hook.remove_hook("named")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hooks", [offload, hook_all])
def test_hooks_of_accelerate(unet, inputs, hooks, order, assert_right):
    plain = copy.deepcopy(unet)
    in_order(order, unet, hooks)
    assert "forward" in vars(unet.conv_norm_out)
    if hooks is offload:
        assert unet.conv_norm_out.weight.is_meta
    calls = assert_right(unet, plain, inputs)
    # Norms with hooks are called by themselves, without the SiLU.
    norms = sum(isinstance(module, nn.GroupNorm) for module in plain.modules())
    assert sum(call.op == "group_norm" for call in calls) == norms
    remove_hook_from_module(unet, recurse=True)
    fastldm.apply(unet)
    assert_right(unet, plain, inputs)


@pytest.mark.parametrize("order", ORDERS)
def test_group_offloading_of_diffusers(unet, inputs, order, assert_right):
    plain = copy.deepcopy(unet)
    in_order(order, unet, offload_in_groups)
    assert hasattr(unet.mid_block.resnets[0].conv1, "_diffusers_hook")
    assert_right(unet, plain, inputs)


def test_hooks_inside_blocks_still_fire(unet, inputs, run):
    resnet = unet.mid_block.resnets[0]
    fastldm.apply(unet, backend="reference")
    seen = []
    resnet.norm1.register_forward_hook(lambda *args: seen.append("norm1"))
    resnet.norm2.register_forward_pre_hook(lambda *args: seen.append("norm2"))
    resnet.nonlinearity.register_forward_hook(lambda *args: seen.append("SiLU"))
    with fastldm.record() as calls:
        run(unet, inputs)
    assert seen == ["norm1", "SiLU", "SiLU", "norm2", "SiLU"]
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert sum(call.op == "group_norm" for call in calls.calls) == norms
    assert calls.backends() == {"attention": ["reference"], "group_norm": ["reference"]}


def test_a_hook_may_change_the_output_of_a_norm():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    model[0].register_forward_hook(lambda module, args, output: output * 0)
    fastldm.apply(model, backend="reference")
    with fastldm.record() as calls:
        assert not model(torch.randn(2, 8, 5)).any()
    assert calls.backends() == {"group_norm": ["reference"]}


@pytest.mark.parametrize("hook", [add_hook, add_hook_of_diffusers])
def test_a_hook_taken_off_after_revert_brings_nothing_back(hook):
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 5)
    fastldm.apply(norm)
    take_off = hook(norm)
    fastldm.revert(norm)
    take_off(norm)
    with fastldm.record() as calls:
        norm(x)
    assert not calls.calls
    fastldm.apply(norm)
    with fastldm.record() as calls:
        norm(x)
    assert calls.backends().keys() == {"group_norm"}


def test_a_hook_put_on_inside_applied():
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 5)
    with fastldm.applied(norm):
        add_hook(norm)
    with fastldm.record() as calls:
        norm(x)
    assert not calls.calls
    assert type(norm) is nn.GroupNorm


def test_a_parametrization_put_on_inside_applied():
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 5)
    with fastldm.applied(norm):
        parametrizations.weight_norm(norm, dim=None)
        fastldm.apply(norm)
        assert parametrize.is_parametrized(norm, "weight")
        assert "Parametrized" in type(norm).__name__
        with fastldm.record() as calls:
            norm(x)
    assert calls.backends().keys() == {"group_norm"}
    with fastldm.record() as calls:
        norm(x)
    assert not calls.calls
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.GroupNorm


def test_a_parametrization_taken_off_inside_applied():
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 5)
    parametrizations.weight_norm(norm, dim=None)
    with fastldm.applied(norm):
        parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.GroupNorm
    with fastldm.record() as calls:
        norm(x)
    assert not calls.calls
