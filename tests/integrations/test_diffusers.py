"""`fastldm.apply` on single models and modules of diffusers, in the cases that pipelines do not reach."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastldm
from fastldm.errors import UnsupportedError
from fastldm.testing.tolerances import assert_as_accurate

# The folders of tests are no packages.
_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)
one_thread = tiny.one_thread


def gradients(
    inputs: dict[str, torch.Tensor], outputs: list[torch.Tensor], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Of a weighted sum of `outputs`, with respect to `inputs`."""
    weights = [tiny.randn(*y.shape, seed=20 + i).to(y.dtype) for i, y in enumerate(outputs)]
    total = sum((weight * y).sum() for weight, y in zip(weights, outputs))
    return dict(zip((prefix + name for name in inputs), torch.autograd.grad(total, list(inputs.values()))))


RESNETS = {
    "plain": {"temb_channels": None},
    "embedding": {},
    "scale_shift": {"time_embedding_norm": "scale_shift"},
    "skip_time_act": {"skip_time_act": True},
    "up": {"up": True},
    "down": {"down": True, "time_embedding_norm": "scale_shift"},
    "up_sde_vp": {"up": True, "kernel": "sde_vp"},
    "down_sde_vp": {"down": True, "kernel": "sde_vp"},
    "other_widths": {"out_channels": 12, "groups_out": 3, "conv_2d_out_channels": 20},
    "scaled": {"output_scale_factor": 2**0.5, "eps": 1e-3},
}


@pytest.mark.parametrize("options", RESNETS.values(), ids=RESNETS)
def test_resnet_block(options):
    block = tiny.randomize(ResnetBlock2D(**{"in_channels": 16, "temb_channels": 10, "groups": 4, **options}))
    temb = None if block.time_emb_proj is None else tiny.randn(2, 10, seed=6)
    wide = copy.deepcopy(block).double()

    def run(module: nn.Module, dtype: torch.dtype):
        x = tiny.randn(2, 16, 6, 4).to(dtype).requires_grad_()
        y = module(x, None if temb is None else temb.to(dtype))
        return {"y": y.detach(), **gradients({"x": x, **dict(module.named_parameters())}, [y])}

    truth, plain = run(wide, torch.float64), run(block, torch.float32)
    fastldm.apply(block)
    with fastldm.record() as record:
        result = run(block, torch.float32)
    assert [call.direction for call in record.calls] == ["forward"] * 2 + ["backward"] * 2
    assert list(result) == list(truth)
    # The longest sums are those over the batch and the picture in the gradients of the parameters.
    for name, tensor in result.items():
        assert_as_accurate(tensor, truth[name], plain[name], name, terms=16 * 9 + 2 * 6 * 4)


@pytest.mark.parametrize("case", ["hook", "scale", "embedding"])
def test_what_a_resnet_block_leaves_to_diffusers(case):
    block = tiny.randomize(ResnetBlock2D(in_channels=16, temb_channels=None, groups=4))
    x, temb, named = tiny.randn(2, 16, 6, 4), None, {}
    if case == "hook":
        block.norm2.register_forward_hook(lambda module, inputs, output: output + 1)
    if case == "scale":
        named = {"scale": None}
    if case == "embedding":
        temb = tiny.randn(2, 16, 1, 1)
    wide = copy.deepcopy(block).double()
    truth = wide(x.double(), None if temb is None else temb.double(), **named)
    plain = block(x, temb, **named)
    fastldm.apply(block)
    assert_as_accurate(block(x, temb, **named), truth, plain, terms=16 * 9)


@pytest.mark.parametrize("option", ["tiling", "slicing"])
def test_autoencoder_kl(option):
    vae = tiny.first_stage(sample_size=16)
    getattr(vae, f"enable_{option}")()
    pictures = tiny.randn(2, 3, 24, 40)
    truth = copy.deepcopy(vae).double()(pictures.double()).sample
    plain = vae(pictures).sample
    report = fastldm.apply(vae)
    assert not report.skipped
    runs = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda *_: runs.append(1))
    with fastldm.record() as record:
        result = vae(pictures).sample
    # Tiles of 16 that begin every 12 pixels: 2 rows of 4 each way; slices: one picture each.
    assert len(runs) == 2 * (2 * 4 if option == "tiling" else 2)
    assert sum(call.op == "attention" for call in record.calls) == len(runs)
    assert_as_accurate(result, truth, plain, terms=truth[0].numel())
    fastldm.revert(vae)
    assert torch.equal(vae(pictures).sample, plain)


QUANTIZERS = {
    "legacy": {"legacy": True},
    "not_legacy": {"legacy": False},
    "sane_index_shape": {"sane_index_shape": True},
    "remap_random": {"remap": True},
    "remap_extra": {"remap": True, "unknown_index": "extra"},
    "remap_sane": {"remap": True, "unknown_index": 3, "sane_index_shape": True, "legacy": False},
}


@pytest.mark.parametrize("options", QUANTIZERS.values(), ids=QUANTIZERS)
def test_vq_model(options, tmp_path):
    model = tiny.vq_model()
    if "remap" in options:
        np.save(tmp_path / "used.npy", np.array([7, 0, 30, 12, 21]))
        options = {**options, "remap": str(tmp_path / "used.npy")}
    model.quantize = tiny.randomize(VectorQuantizer(32, 4, beta=0.25, **options), 4)
    pictures = tiny.randn(2, 3, 16, 24)
    wide = copy.deepcopy(model).double()

    latents = wide.encode(pictures.double()).latents
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    nearest, second = (
        torch.cdist(rows, wide.quantize.embedding.weight).topk(2, largest=False).values.unbind(1)
    )
    # So that every correct search in float32 finds the same codes.
    assert (second - nearest).min() > 1e-4

    def run(module: nn.Module, dtype: torch.dtype):
        torch.manual_seed(0)  # of the indices of unknown codes
        x = pictures.to(dtype).requires_grad_()
        sample, loss = module(x, return_dict=False)
        z = latents.detach().to(dtype).requires_grad_()
        quantized, commitment, (perplexity, encodings, indices) = module.quantize(z)
        assert perplexity is None
        assert encodings is None
        floating = {
            "sample": sample.detach(),
            "loss": loss.detach(),
            "quantized": quantized.detach(),
            "commitment": commitment.detach(),
        }
        codebook = module.quantize.embedding.weight
        floating.update(gradients({"pictures": x}, [sample, loss]))
        floating.update(gradients({"z": z, "codebook": codebook}, [quantized, commitment]))
        return floating, indices

    (truth, _), (plain, plain_indices) = run(wide, torch.float64), run(model, torch.float32)
    report = fastldm.apply(model)
    assert not report.skipped
    with fastldm.record() as record:
        result, indices = run(model, torch.float32)
    assert sum(call.op == "vq_nearest" for call in record.calls) == 2
    assert indices.dtype == plain_indices.dtype
    assert torch.equal(indices, plain_indices)
    assert list(result) == list(truth)
    for name, tensor in result.items():
        assert_as_accurate(tensor, truth[name], plain[name], name, terms=2 * 16 * 24 * 9)

    fastldm.revert(model)
    again, _ = run(model, torch.float32)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


def test_masks_of_a_unet():
    unet = tiny.unet()
    given = {
        "sample": tiny.randn(2, 4, 8, 8),
        "encoder_hidden_states": tiny.randn(2, 7, 16, seed=6),
        "timestep": torch.tensor([17, 981]),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 1, 0, 0]]),
    }
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    truth = copy.deepcopy(unet).double()(**wide).sample
    plain = unet(**given).sample
    unmasked = unet(**{**given, "encoder_attention_mask": None}).sample
    assert (unmasked - plain).abs().max() > 0.01
    fastldm.apply(unet)
    with fastldm.record() as record:
        result = unet(**given).sample
    assert any(len(call.shapes) == 4 for call in record.calls if call.op == "attention")
    assert_as_accurate(result, truth, plain, terms=truth[0].numel())


class NamedByNN(nn.Module):
    """Calls attention by the name that some classes of diffusers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_by_the_name_of_nn():
    layer, x = NamedByNN(), tiny.randn(1, 2, 7, 8)
    plain, wide = layer(x), layer(x.double())
    fastldm.apply(layer, attention_classes=[NamedByNN])
    with fastldm.record() as record:
        assert_as_accurate(layer(x), wide, plain, terms=8 + 7)
    assert [call.op for call in record.calls] == ["attention"]


@pytest.fixture
def transformer():
    """One whose attention goes through diffusers' dispatcher, and what its call is given."""
    dispatcher = pytest.importorskip("diffusers.models.attention_dispatch")
    pipe, call = tiny.flux(None)
    given = {
        "hidden_states": tiny.randn(1, 9, 16),
        "encoder_hidden_states": call["prompt_embeds"],
        "pooled_projections": call["pooled_prompt_embeds"],
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": tiny.randn(9, 3),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }
    # What a model is set to, the process is set to as well.
    with dispatcher.attention_backend("native"):
        yield pipe.transformer, given


def test_a_backend_chosen_in_diffusers_before_is_listed(transformer):
    model, _ = transformer
    model.set_attention_backend("_native_math")
    report = fastldm.apply(model)
    assert report.replaced == []
    assert {entry.skipped for entry in report.skipped} == {"its attention backend was set to _native_math"}


def test_a_backend_chosen_in_diffusers_afterwards_is_recorded(transformer):
    model, call = transformer
    model.set_attention_backend("_native_math")
    (before,) = model(**call)
    model.reset_attention_backend()
    fastldm.apply(model)
    model.set_attention_backend("_native_math")
    with fastldm.record() as record:
        (after,) = model(**call)
    with (
        fastldm.use_backend("reference"),
        pytest.raises(UnsupportedError, match="attention backend of diffusers"),
    ):
        model(**call)
    assert torch.equal(after, before)
    assert [(call.op, call.backend) for call in record.calls] == [("attention", "torch")] * 3
    assert all("attention backend of diffusers" in call.fallback for call in record.calls)


OTHER = AttnProcessor()


@pytest.mark.parametrize(
    "change", [fastldm.apply, fastldm.revert, lambda model: model.set_attn_processor(OTHER)]
)
def test_processors_when_applied_ends(change):
    unet = tiny.unet()
    before = {name: id(processor) for name, processor in unet.attn_processors.items()}
    with fastldm.applied(unet, backend="reference"):
        change(unet)
    after = unet.attn_processors
    if change not in (fastldm.apply, fastldm.revert):
        assert set(map(id, after.values())) == {id(OTHER)}, "what was put in since stays"
    else:
        assert [type(x) for x in after.values()] == [AttnProcessor2_0] * len(before)
    if change is fastldm.apply:
        assert {name: id(processor) for name, processor in after.items()} == before


def test_a_shared_processor_stays_shared():
    unet = tiny.unet()
    unet.set_attn_processor(AttnProcessor2_0())
    fastldm.apply(unet)
    assert len(set(map(id, unet.attn_processors.values()))) == 1
