"""The text encoder against diffusers' LDMBertModel: keys, outputs, gradients, folders."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel as PeerBert

from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import LDMBertModel

TINY = {
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "encoder_layers": 3,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 3,
    "head_dim": 16,
    "d_model": 40,
}


@pytest.fixture
def peer():
    model = PeerBert(LDMBertConfig(**TINY)).eval()
    # at their initial 0.02 the weights would hardly mix the tokens
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ours(peer):
    model = LDMBertModel(**TINY).eval()
    model.load_state_dict(peer.state_dict())
    return model


def ids(batch=2, length=20):
    return torch.randint(TINY["vocab_size"], (batch, length))


def test_keys_and_shapes_are_the_peer_s(peer):
    ours = LDMBertModel(**TINY)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in peer.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 20])
def test_output_is_the_peer_s(ours, peer, length):
    tokens = ids(3, length)
    torch.testing.assert_close(ours(tokens)[0], peer(tokens)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_output_with_mask_and_positions_is_the_peer_s(ours, peer):
    tokens, positions = ids(), torch.arange(19, -1, -1)[None]
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 5:], mask[1, 0] = 0, 0
    theirs = peer(tokens, attention_mask=mask, position_ids=positions)[0]
    found = ours(tokens, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    assert (found - ours(tokens).last_hidden_state).abs().max() > 0.1


def test_gradients_are_the_peer_s_and_checkpointing_keeps_them(ours, peer):
    tokens = ids()
    weight = torch.randn(2, 20, TINY["d_model"])
    (peer(tokens)[0] * weight).sum().backward()
    wanted = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    for enabled in (False, True):
        ours.enable_gradient_checkpointing(enabled)
        ours.zero_grad()
        (ours(tokens)[0] * weight).sum().backward()
        found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, atol=1e-5 * grad.abs().max().item(), rtol=1e-4)


def test_every_trainable_parameter_gets_a_gradient(ours):
    ours(ids())[0].square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_dropout_acts_in_training_only(ours):
    tokens = ids()
    assert torch.equal(ours(tokens)[0], ours(tokens)[0])
    ours.train()
    assert not torch.equal(ours(tokens)[0], ours(tokens)[0])


@torch.no_grad()
def test_activation_dropout_acts_inside_the_feed_forward_in_training_only():
    tokens = ids()
    model = LDMBertModel(**TINY, dropout=0.0, activation_dropout=1.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    evaluated, trained = model.eval()(tokens)[0], model.train()(tokens)[0]
    assert not torch.equal(trained, evaluated)
    for layer in model.model.layers:
        layer.fc2.weight.zero_()  # a feed-forward whose inside is dropped is its last bias
    assert torch.equal(model.eval()(tokens)[0], trained)


def test_tuple_output(ours):
    out = ours(ids(), return_dict=False)
    assert isinstance(out, tuple)
    assert out[0].shape == (2, 20, 40)


def test_the_peer_s_folder_loads(peer, tmp_path):
    peer.save_pretrained(tmp_path)
    ours = LDMBertModel.from_pretrained(tmp_path)
    tokens = ids()
    torch.testing.assert_close(ours(tokens)[0], peer(tokens)[0], atol=1e-5, rtol=0)


def test_the_peer_loads_our_folder(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    theirs, report = PeerBert.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokens = ids()
    torch.testing.assert_close(theirs.eval()(tokens)[0], ours(tokens)[0], atol=1e-5, rtol=0)


def test_a_config_as_transformers_4_wrote_it_loads():
    bookkeeping = {
        "_name_or_path": "ldm-bert",
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "num_hidden_layers": 3,
        "torch_dtype": "float32",
        "transformers_version": "4.20.0",
    }
    unused = {
        "classifier_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "scale_embedding": False,
        "use_cache": True,
    }
    fields = {"activation_function": "gelu", "attention_dropout": 0.0, "init_std": 0.02, "pad_token_id": 0}
    model = LDMBertModel.from_config({**TINY, **bookkeeping, **unused, **fields})
    assert model.state_dict().keys() == LDMBertModel(**TINY).state_dict().keys()


def test_half_precision_stays_near(ours):
    tokens = ids()
    full = ours(tokens)[0]
    half = ours.to(torch.bfloat16)(tokens)[0]
    assert half.dtype == torch.bfloat16
    # 8 bits per rounding, a dozen roundings along the residual stream, layer-normed at the end
    assert (half.float() - full).abs().mean() < 12 * 2**-8 * full.abs().mean()


def test_half_floats_stay_finite(ours):
    """A residual stream beyond the range of float16 is cut, not infinite."""
    layer = ours.half().model.layers[0]
    layer.fc2.bias.data.fill_(60000)
    hidden = torch.full((1, 4, 40), 60000, dtype=torch.float16)
    assert layer(hidden, None).isfinite().all()


def test_unusable_input_is_refused(tmp_path, ours):
    with pytest.raises(InputError, match="21 tokens"):
        ours(ids(1, 21))
    with pytest.raises(ConfigError, match="multiple of 8"):
        LDMBertModel(**{**TINY, "head_dim": 12})
    with pytest.raises(ConfigError, match="activation_function"):
        LDMBertModel(**TINY, activation_function="relu")
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"encoder_layers": 4, "d_model": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing.*layers\.3"):
        LDMBertModel.from_pretrained(tmp_path)
