"""Small networks of diffusers with random weights, and what a network in which fastldm computes has to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fastldm
from fastldm.testing import assert_as_accurate

BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}
# Of the convolutions and norms of these networks, the longest sum behind one element.
TERMS = 64 * 9


def randomized(model: nn.Module) -> nn.Module:
    """No weight is 0 or 1, as those of norms and of ControlNet's last layers are at first."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return randomized(UNet2DConditionModel(sample_size=8, up_block_types=up, **BLOCKS))


@pytest.fixture
def inputs() -> dict:
    return {
        "sample": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


@pytest.fixture
def controlnet() -> ControlNetModel:
    return randomized(
        ControlNetModel(in_channels=4, conditioning_embedding_out_channels=(8, 16, 16, 32), **BLOCKS)
    )


@pytest.fixture
def vae() -> AutoencoderKL:
    return randomized(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            norm_num_groups=4,
            sample_size=16,
        )
    )


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    """Its attention goes through diffusers' dispatcher."""
    return randomized(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8),
        )
    )


@pytest.fixture
def flux_inputs() -> dict:
    return {
        "hidden_states": torch.randn(2, 12, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.arange(36.0).reshape(12, 3),
        "txt_ids": torch.zeros(5, 3),
    }


@pytest.fixture(autouse=True)
def _attention_backend_of_diffusers(monkeypatch):
    """`set_attention_backend` changes it for the whole process."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def double(tree: object) -> object:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def results(model: nn.Module, inputs: dict) -> list[Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return [x for x in tree_leaves(dict(output)) if isinstance(x, Tensor)]


@pytest.fixture
def run() -> Callable[[nn.Module, dict], list[Tensor]]:
    """The tensors that a model gives."""
    return results


@pytest.fixture
def assert_right() -> Callable:
    """`assert_right(model, plain, inputs, ops)`: fastldm computes in `model`, as accurately as PyTorch in
    `plain`, and goes from it without a trace. Returns the calls."""

    def check(
        model: nn.Module, plain: nn.Module, inputs: dict, ops: tuple = ("attention", "group_norm")
    ) -> list[fastldm.dispatch.Call]:
        with fastldm.record() as calls:
            found = results(model, inputs)
        assert tuple(calls.backends()) == ops
        eager = results(plain, inputs)
        truth = results(copy.deepcopy(plain).double(), double(inputs))
        assert len(found) == len(eager) > 0
        for number, (ours, exact, theirs) in enumerate(zip(found, truth, eager)):
            assert ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride()
            assert_as_accurate(ours, exact, theirs, f"output {number}", terms=TERMS)
        assert_reverts(model, plain, inputs)
        return calls.calls

    return check


def assert_reverts(model: nn.Module, plain: nn.Module, inputs: dict) -> None:
    fastldm.revert(model)
    assert classes(model) == classes(plain)
    with fastldm.record() as calls:
        found = results(model, inputs)
    assert not calls.calls
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, results(plain, inputs)))


def classes(model: nn.Module) -> list:
    """Those of all modules and attention processors. Parametrizations make one for each module."""
    found = []
    for name, module in model.named_modules():
        kinds = [cls for cls in type(module).__mro__ if "Parametrized" not in cls.__name__]
        found.append((name, kinds, type(vars(module).get("processor"))))
    return found
