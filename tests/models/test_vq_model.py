from __future__ import annotations

import json

import diffusers
import pytest
import torch

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import VQModel

SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
    "num_vq_embeddings": 32,
}
CONFIGS = {
    "defaults": {},
    "small": SMALL,
    "attention at the coarsest": {
        **SMALL,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 2,
        "latent_channels": 4,
        "vq_embed_dim": 6,
    },
    "attention at the finest, none in the middle": {
        **SMALL,
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "mid_block_add_attention": False,
        "act_fn": "swish",
    },
    "three resolutions, uneven widths, grey in, colour out": {
        "block_out_channels": [24, 12, 36],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 6,
        "in_channels": 1,
        "out_channels": 2,
        "num_vq_embeddings": 5,
        "scaling_factor": 0.5,
        "sample_size": 64,
        "force_upcast": True,
    },
}

LDM_COMMON = {"layers_per_block": 2, "sample_size": 256}
# The first stages of the latent diffusion paper (configs/ of CompVis/latent-diffusion) in diffusers' fields.
LDM = {
    "vq-f4": {
        **LDM_COMMON,
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "vq_embed_dim": 3,
    },
    "vq-f8": {
        **LDM_COMMON,
        "block_out_channels": [128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
    },
    "vq-f16": {
        **LDM_COMMON,
        "block_out_channels": [128, 128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
        "latent_channels": 8,
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 8,
    },
}


def pair(config: dict) -> tuple[VQModel, diffusers.VQModel]:
    """Both models with the same random weights, codes as far apart as latents are."""
    peer = diffusers.VQModel(**config).eval()
    torch.nn.init.normal_(peer.quantize.embedding.weight, std=0.5)
    ours = VQModel(**config).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_outputs_as_diffusers(name):
    config = CONFIGS[name]
    ours, peer = pair(config)
    x = torch.rand(2, config.get("in_channels", 3), 24, 32) * 2 - 1
    latents = peer.encode(x).latents
    assert_same(ours.encode(x).latents, latents)
    # From here on the same latents, so that a tie between codes cannot fall two ways.
    out, expected = ours.decode(latents), peer.decode(latents)
    assert_same(out.sample, expected.sample)
    assert_same(out.commit_loss, expected.commit_loss)
    assert torch.equal(out.indices, peer.quantize(latents)[2][2])
    assert len(out.indices.unique()) > 1
    plain, plain_peer = (m.decode(latents, force_not_quantize=True) for m in (ours, peer))
    assert_same(plain.sample, plain_peer.sample)
    assert torch.equal(plain.commit_loss, plain_peer.commit_loss)
    assert_same(ours(x).sample, peer(x).sample)
    assert [t.shape for t in ours(x, return_dict=False)] == [t.shape for t in peer(x, return_dict=False)]
    assert_same(ours.encode(x, return_dict=False)[0], latents)
    assert_same(ours.decode(latents, return_dict=False)[0], expected.sample)
    assert out[0] is out.sample is out["sample"]


@torch.no_grad()
def test_lookup_from_codebook_same_as_diffusers():
    ours, peer = pair({**SMALL, "lookup_from_codebook": True})
    indices = torch.randint(32, (2 * 6 * 5,))
    arguments = {"force_not_quantize": True, "shape": (2, 6, 5, 3)}
    assert_same(ours.decode(indices, **arguments).sample, peer.decode(indices, **arguments).sample)


def test_same_gradients_as_diffusers():
    ours, peer = pair(CONFIGS["attention at the coarsest"])
    ours.quantize.legacy = True  # the order in which diffusers trains
    x = torch.rand(2, 3, 16, 16)
    for model in (ours, peer):
        out = model(x)
        ((out.sample - x).square().mean() + out.commit_loss).backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        # Bounds of one tensor differ from another's by what flows through it, hence the scale.
        atol = 1e-4 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_folders_of_diffusers_load_and_ours_load_there(tmp_path):
    ours, peer = pair(CONFIGS["attention at the coarsest"])
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = peer(x).sample
        peer.save_pretrained(tmp_path / "theirs")
        assert_same(VQModel.from_pretrained(tmp_path / "theirs")(x).sample, expected)
        ours.save_pretrained(tmp_path / "ours")
        assert_same(diffusers.VQModel.from_pretrained(tmp_path / "ours")(x).sample, expected)
    written, reference = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    assert written == {key: value for key, value in reference.items() if key != "_diffusers_version"}


def test_codebook_averages_stay_out_of_the_folder_and_in_the_training_state(tmp_path):
    ours, peer = pair(SMALL)
    ours.quantize.enable_ema(0.9, revive_below=0.1)
    ours.train()(torch.rand(2, 3, 16, 16))
    ours.save_pretrained(tmp_path)
    _, report = diffusers.VQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert VQModel.from_pretrained(tmp_path).state_dict().keys() == peer.state_dict().keys()

    resumed = VQModel(**SMALL)
    resumed.quantize.enable_ema(0.9, revive_below=0.1)
    resumed.load_state_dict(ours.state_dict())
    assert torch.equal(resumed.quantize.ema_sum, ours.quantize.ema_sum)
    assert not torch.equal(resumed.quantize.ema_count, torch.ones(32))


@pytest.mark.parametrize("name", LDM)
def test_published_first_stages_have_the_names_and_shapes_of_diffusers(name):
    with torch.device("meta"):
        ours, peer = VQModel(**LDM[name]), diffusers.VQModel(**LDM[name])
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert dict(ours.config) == {key: peer.config[key] for key in ours.config}


def test_gradient_checkpointing_changes_nothing():
    ours, _ = pair(CONFIGS["attention at the coarsest"])
    x = torch.rand(2, 3, 16, 16)
    gradients = []
    for enabled in (False, True):
        ours.enable_gradient_checkpointing(enabled)
        ours.zero_grad()
        ours(x).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type 'spatial' is not supported"),
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "'DownBlock2D'; accepted: DownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 entries and block_out_channels 2"),
        ({"norm_num_groups": 5}, "16 cannot be split into norm_num_groups=5"),
        ({"num_codes": 5}, "no configuration field 'num_codes'"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        VQModel(**{**SMALL, **change})


def test_weights_of_another_configuration_are_refused(tmp_path):
    VQModel(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 33}))
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight is \(32, 3\), not \(33, 3\)"):
        VQModel.from_pretrained(tmp_path)
