from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as PeerDistribution
from safetensors.torch import load_file, save_file

from fastldm.errors import ConfigError
from fastldm.models import AutoencoderKL, DiagonalGaussianDistribution

SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
CONFIGS = {
    "defaults": {},
    "small": SMALL,
    "attention": {
        **SMALL,
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "layers_per_block": 2,
        "latent_channels": 3,
        "sample_size": [32, 32],
    },
    "without the convolutions around the latent, as in later models": {
        **SMALL,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": False,
        "latents_mean": [0.5] * 16,
        "latents_std": [2.0] * 16,
    },
    "three resolutions, uneven widths, two channels in, one out": {
        "block_out_channels": [24, 12, 36],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 6,
        "in_channels": 2,
        "out_channels": 1,
    },
}

STABLE_DIFFUSION = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED = {
    "Stable Diffusion 1.x": {**STABLE_DIFFUSION, "sample_size": 512},
    "Stable Diffusion 2.x": {**STABLE_DIFFUSION, "sample_size": 768, "scaling_factor": 0.18215},
    "SDXL": {
        **STABLE_DIFFUSION,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
    },
    "latent diffusion kl-f4": {
        **STABLE_DIFFUSION,
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 3,
        "sample_size": 256,
    },
    "latent diffusion kl-f8": {**STABLE_DIFFUSION, "sample_size": 256},
    "latent diffusion kl-f16": {
        **STABLE_DIFFUSION,
        "block_out_channels": [128, 128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
        "latent_channels": 16,
        "sample_size": 256,
    },
}


def pair(config: dict) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Both models with the same random weights."""
    peer = diffusers.AutoencoderKL(**config).eval()
    ours = AutoencoderKL(**config).eval()
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
    posterior, expected = ours.encode(x).latent_dist, peer.encode(x).latent_dist
    assert_same(posterior.parameters, expected.parameters)
    assert_same(ours.encode(x, return_dict=False)[0].mean, expected.mean)
    z = expected.mean
    assert_same(ours.decode(z).sample, peer.decode(z).sample)
    assert_same(ours.decode(z, return_dict=False)[0], peer.decode(z).sample)
    for sample_posterior in (False, True):
        out, other = (
            m(x, sample_posterior=sample_posterior, generator=torch.Generator().manual_seed(3))
            for m in (ours, peer)
        )
        assert_same(out.sample, other.sample)
    assert torch.equal(out.latent_dist.parameters, posterior.parameters)
    assert len(ours(x, return_dict=False)) == 1


@pytest.mark.parametrize("size", [(72, 100), (32, 32), (33, 70), (64, 24)])
@torch.no_grad()
def test_tiles_and_slices_same_as_diffusers(size):
    ours, peer = pair({**SMALL, "sample_size": 32})
    x = torch.rand(2, 3, *size) * 2 - 1
    whole = ours.encode(x).latent_dist.mean
    for model in (ours, peer):
        model.enable_tiling()
    z = peer.encode(x).latent_dist.mean
    assert_same(ours.encode(x).latent_dist.mean, z)
    assert_same(ours.decode(z).sample, peer.decode(z).sample)
    tiled_at_all = max(size) > 32
    assert torch.equal(ours.encode(x).latent_dist.mean, whole) is not tiled_at_all
    for model in (ours, peer):
        model.enable_slicing()
    assert_same(ours.encode(x).latent_dist.mean, peer.encode(x).latent_dist.mean)
    assert_same(ours.decode(z).sample, peer.decode(z).sample)
    ours.disable_tiling()
    assert_same(ours.encode(x).latent_dist.mean, whole)


def test_slices_go_through_one_at_a_time():
    ours, _ = pair(SMALL)
    batches = []
    ours.encoder.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    ours.enable_slicing()
    ours.encode(torch.rand(3, 3, 16, 16))
    ours.disable_slicing()
    ours.encode(torch.rand(3, 3, 16, 16))
    assert batches == [1, 1, 1, 3]


def test_same_gradients_as_diffusers():
    ours, peer = pair(CONFIGS["attention"])
    x = torch.rand(2, 3, 16, 16)
    for model in (ours, peer):
        posterior = model.encode(x).latent_dist
        sample = model.decode(posterior.sample(torch.Generator().manual_seed(0))).sample
        ((sample - x).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        # Bounds of one tensor differ from another's by what flows through it, hence the scale.
        atol = 1e-4 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_folders_of_diffusers_load_and_ours_load_there(tmp_path):
    ours, peer = pair(CONFIGS["without the convolutions around the latent, as in later models"])
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = peer(x).sample
        peer.save_pretrained(tmp_path / "theirs")
        assert_same(AutoencoderKL.from_pretrained(tmp_path / "theirs")(x).sample, expected)
        ours.save_pretrained(tmp_path / "ours")
        assert_same(diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")(x).sample, expected)
    written, reference = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    assert written == {key: value for key, value in reference.items() if key != "_diffusers_version"}


def test_the_attention_names_of_old_folders_load(tmp_path):
    _, peer = pair(CONFIGS["attention"])
    peer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(file).items():
        for new_name, old_name in old.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        state[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, file)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert_same(AutoencoderKL.from_pretrained(tmp_path)(x).sample, peer(x).sample)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_first_stages_have_the_names_and_shapes_of_diffusers(name):
    with torch.device("meta"):
        ours, peer = AutoencoderKL(**PUBLISHED[name]), diffusers.AutoencoderKL(**PUBLISHED[name])
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert dict(ours.config) == {key: peer.config[key] for key in ours.config}
    assert ours.tile_latent_min_size == peer.tile_latent_min_size


@pytest.mark.parametrize("deterministic", [False, True])
def test_distribution_same_as_diffusers(deterministic):
    parameters = torch.randn(3, 8, 4, 5)
    parameters[0, 4], parameters[0, 5] = 100.0, -100.0  # clamped
    other = torch.randn(3, 8, 4, 5)
    ours = DiagonalGaussianDistribution(parameters, deterministic)
    peer = PeerDistribution(parameters, deterministic)
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours, name), getattr(peer, name))
    assert ours.mode() is ours.mean
    x = torch.randn(3, 4, 4, 5)
    torch.testing.assert_close(ours.kl(), peer.kl().expand(3))
    torch.testing.assert_close(
        ours.kl(DiagonalGaussianDistribution(other)), peer.kl(PeerDistribution(other)).expand(3)
    )
    torch.testing.assert_close(ours.nll(x), peer.nll(x).expand(3))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_generator_per_picture_same_as_diffusers(batch):
    parameters = torch.randn(batch, 8, 4, 5)
    draws = [
        distribution(parameters).sample([torch.Generator().manual_seed(i) for i in range(batch)])
        for distribution in (DiagonalGaussianDistribution, PeerDistribution)
    ]
    assert torch.equal(*draws)


def test_a_configuration_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="down_block_types holds 'DownBlock2D'"):
        AutoencoderKL(**{**SMALL, "down_block_types": ["DownBlock2D"] * 2})
    with pytest.raises(ConfigError, match="act_fn 'relu' is not supported"):
        AutoencoderKL(**SMALL, act_fn="relu")
