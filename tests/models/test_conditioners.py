"""Text, class and picture conditions behind one interface."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastldm.diffusion import drop_condition
from fastldm.errors import ConfigError, InputError
from fastldm.models import (
    ClassConditioner,
    Conditioning,
    LDMBertModel,
    SpatialConditioner,
    TextConditioner,
    Tokenizer,
    UNet2DConditionModel,
)
from fastldm.models.conditioners import predict


def text_conditioner():
    tokenizer = Tokenizer.from_captions(["a red circle", "a blue star"], max_length=8)
    encoder = LDMBertModel(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=8,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=16,
    )
    return TextConditioner(encoder, tokenizer).eval()


CASES = {
    "text": (text_conditioner, ["a red circle", "a blue star", ""]),
    "class": (lambda: ClassConditioner(num_classes=5, embed_dim=16), [0, 4, 2]),
    "spatial": (
        lambda: SpatialConditioner(in_channels=2, out_channels=3, n_stages=2),
        torch.randn(3, 2, 16, 16),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    make, raw = CASES[request.param]
    return make(), raw


def test_every_conditioner_has_the_one_interface(case):
    conditioner, raw = case
    prepared = conditioner.prepare(raw)
    assert len(prepared) == 3
    null = conditioner.null_like(prepared)
    assert (null.shape, null.dtype) == (prepared.shape, prepared.dtype)
    assert torch.equal(null[0], null[2])
    conditioning = conditioner(prepared)
    assert isinstance(conditioning, Conditioning)
    if conditioner.context_dim is None:
        assert conditioning.context is None
    else:
        assert conditioning.context.shape[::2] == (3, conditioner.context_dim)
    if conditioner.concat_channels == 0:
        assert conditioning.concat is None
    else:
        assert conditioning.concat.shape == (3, conditioner.concat_channels, 4, 4)


def test_gradients_reach_every_conditioner(case):
    conditioner, raw = case
    conditioning = conditioner(conditioner.prepare(raw))
    sum(x.square().sum() for x in conditioning if x is not None).backward()
    assert all(p.grad is not None and p.grad.any() for p in conditioner.parameters() if p.requires_grad)


def test_dropped_conditions_are_the_null_condition(case):
    conditioner, raw = case
    prepared = conditioner.prepare(raw)
    null = conditioner.null_like(prepared)
    assert torch.equal(drop_condition(prepared, null, 1.0), null)
    assert torch.equal(drop_condition(prepared, null, 0.0), prepared)


def test_copies_work_alone(case):
    """The average of the weights is kept in a copy."""
    conditioner, raw = case
    twin = copy.deepcopy(conditioner)
    found, wanted = twin(twin.prepare(raw)), conditioner(conditioner.prepare(raw))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_null_caption_is_the_empty_one():
    conditioner = text_conditioner()
    prepared = conditioner.prepare(["a red circle", ""])
    assert torch.equal(conditioner.null_like(prepared)[0], prepared[1])
    assert conditioner.state_dict().keys() == {
        f"text_encoder.{k}" for k in conditioner.text_encoder.state_dict()
    }


def test_the_null_class_is_one_more_row():
    conditioner = ClassConditioner(5, 16)
    assert conditioner.embedding.weight.shape == (6, 16)
    labels = conditioner.prepare(torch.tensor([1, 2]))
    assert conditioner.null_like(labels).tolist() == [5, 5]
    assert torch.equal(conditioner(labels).context[1, 0], conditioner.embedding.weight[2])
    assert conditioner.prepare(3).tolist() == [3]


def test_pictures_are_resized_then_mapped():
    conditioner = SpatialConditioner(in_channels=2, out_channels=3, n_stages=2, bias=True)
    images = torch.randn(1, 2, 16, 24)
    small = F.interpolate(
        F.interpolate(images, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear"
    )
    wanted = conditioner.channel_mapper(small)
    torch.testing.assert_close(conditioner(conditioner.prepare(images[0])).concat, wanted)


@pytest.mark.parametrize("which", [ClassConditioner(5, 16), SpatialConditioner(2, 3, n_stages=2, bias=True)])
def test_folders_go_round(which, tmp_path):
    ((name, part),) = which.components().items()
    part.save_pretrained(tmp_path / name)
    back = type(which).from_pretrained(tmp_path, subfolder=name)
    assert dict(back.config) == dict(which.config)
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.state_dict().values(), which.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("conditioner", "raw", "said"),
    [
        (text_conditioner(), 3, "list of captions, not int"),
        (text_conditioner(), ["a", 3], "list of captions"),
        (text_conditioner(), "a green circle", "'green'"),
        (ClassConditioner(5, 16), [0, 5], "0 to 4"),
        (ClassConditioner(5, 16), -1, "0 to 4"),
        (ClassConditioner(5, 16), [0.5], "integers"),
        (ClassConditioner(5, 16), ["cat"], "integers"),
        (SpatialConditioner(2, 3), torch.zeros(3, 8, 8), r"\(B, 2, H, W\), not float32 \(3, 8, 8\)"),
        (SpatialConditioner(2, 3), "map.png", r"\(B, 2, H, W\), not str"),
    ],
)
def test_unusable_conditions_are_refused(conditioner, raw, said):
    with pytest.raises(InputError, match=said):
        conditioner.prepare(raw)


def test_parts_that_do_not_fit_are_refused():
    encoder = text_conditioner().text_encoder
    with pytest.raises(ConfigError, match="up to 9 tokens"):
        TextConditioner(encoder, Tokenizer.from_captions(["a"], max_length=9))
    with pytest.raises(ConfigError, match="nearest, bilinear"):
        SpatialConditioner(method="lanczos")


def test_both_ways_into_the_unet():
    unet = UNet2DConditionModel(
        in_channels=7,
        out_channels=4,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    context, concat = torch.randn(2, 5, 16), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        out = predict(unet, x, t, context, concat)
        wanted = unet(torch.cat([x, concat], 1), t, encoder_hidden_states=context).sample
        assert torch.equal(out, wanted)
        assert not torch.allclose(out, predict(unet, x, t, context * 2, concat), atol=1e-4)
        assert not torch.allclose(out, predict(unet, x, t, context, concat * 2), atol=1e-4)
