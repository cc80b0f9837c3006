"""The conditional UNet against diffusers' class of the same name: keys, outputs, gradients, folders."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from diffusers import UNet2DConditionModel as PeerUNet

from fastldm.errors import ConfigError, InputError
from fastldm.models import UNet2DConditionModel

DOWN_XA, DOWN, DOWN_A = "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
UP_XA, UP, UP_A = "CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"

SD1 = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN_XA, DOWN_XA, DOWN),
    "up_block_types": (UP, UP_XA, UP_XA),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
UNCONDITIONAL = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": (DOWN, DOWN_A, DOWN_A),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (UP_A, UP_A, UP),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
SDXL = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": (DOWN, DOWN_XA, DOWN_XA),
    "up_block_types": (UP_XA, UP_XA, UP),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}

# name: (configuration, latent height and width, what else forward is given)
CASES = {
    "sd1": (SD1, (16, 16), ["context"]),
    "sd1_odd_size": (SD1, (13, 18), ["context"]),
    "sd1_context_mask": (SD1, (8, 8), ["context", "context_mask"]),
    "sd1_controlnet": (SD1, (12, 8), ["context", "controlnet"]),
    "sd1_scale_shift": ({**SD1, "resnet_time_scale_shift": "scale_shift"}, (8, 8), ["context"]),
    "sd1_scale_factor": (
        {**SD1, "mid_block_scale_factor": 1.5, "center_input_sample": True, "dropout": 0.3},
        (8, 8),
        ["context"],
    ),
    "sd1_guidance_embedding": ({**SD1, "time_cond_proj_dim": 12}, (8, 8), ["context", "timestep_cond"]),
    "sd1_kernels": (
        {**SD1, "conv_in_kernel": 5, "conv_out_kernel": 1, "in_channels": 9, "time_embedding_dim": 48},
        (8, 8),
        ["context"],
    ),
    "sd1_only_cross_attention": ({**SD1, "only_cross_attention": (True, False, False)}, (8, 8), ["context"]),
    "only_cross_attention_at_the_last_stage": (
        {
            **SD1,
            "down_block_types": (DOWN, DOWN_XA, DOWN_XA),
            "up_block_types": (UP_XA, UP_XA, UP),
            "only_cross_attention": (False, False, True),
        },
        (8, 8),
        ["context"],
    ),
    "only_cross_attention_everywhere": ({**SD1, "only_cross_attention": True}, (8, 8), ["context"]),
    "sd1_asymmetric_pad": (
        {**SD1, "downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
        (9, 12),
        ["context"],
    ),
    "sd2": (
        {
            **SD1,
            "attention_head_dim": (2, 4, 8),
            "use_linear_projection": True,
            "upcast_attention": True,
            "cross_attention_dim": (24, 24, 24),
        },
        (8, 8),
        ["context"],
    ),
    "sdxl": (SDXL, (8, 12), ["context", "text_time"]),
    "asymmetric_depth": (
        {
            **SDXL,
            "layers_per_block": (1, 2, 1),
            "mid_block_type": None,
            "transformer_layers_per_block": (0, (2, 1), (1,)),
            "reverse_transformer_layers_per_block": ((1, 3), (2, 1, 1), 0),
        },
        (8, 8),
        ["context", "text_time"],
    ),
    "ldm_class_table": ({**SD1, "num_class_embeds": 5}, (8, 8), ["context", "labels"]),
    "ldm_class_token": (SD1, (8, 8), ["one_token"]),
    "class_timestep": ({**SD1, "class_embed_type": "timestep"}, (8, 8), ["context", "labels"]),
    "class_identity_concat": (
        {**SD1, "class_embed_type": "identity", "class_embeddings_concat": True},
        (8, 8),
        ["context", "label_vectors"],
    ),
    "class_projection": (
        {**SD1, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 128},
        (8, 8),
        ["context", "label_vectors"],
    ),
    "class_simple_projection": (
        {**SD1, "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 128},
        (8, 8),
        ["context", "label_vectors"],
    ),
    "unconditional": (UNCONDITIONAL, (16, 8), []),
    "unconditional_head_dims": (
        {**UNCONDITIONAL, "attention_head_dim": (8, 16, 32), "num_class_embeds": 5},
        (8, 8),
        ["labels"],
    ),
    "self_attention_mask": (
        {
            **SD1,
            "block_out_channels": (32, 32),
            "down_block_types": (DOWN, DOWN_XA),
            "up_block_types": (UP_XA, UP),
        },
        (8, 8),
        ["context", "attention_mask"],
    ),
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which every layer matters: unit gain, norms and biases away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))


def pair(config: dict) -> tuple[UNet2DConditionModel, PeerUNet]:
    peer = PeerUNet(**config).eval()
    randomize(peer)
    ours = UNet2DConditionModel(**config).eval()
    ours.load_checked({key: value.clone() for key, value in peer.state_dict().items()}, source="the peer")
    return ours, peer


def inputs(peer: PeerUNet, size: tuple[int, int], extras: list[str], seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = peer.config
    dim = config.cross_attention_dim
    dim = dim if isinstance(dim, int) else dim[0]
    given = {
        "sample": draw(2, config.in_channels, *size),
        "timestep": torch.tensor([17, 981]),
        "encoder_hidden_states": None,
    }
    if "context" in extras:
        given["encoder_hidden_states"] = draw(2, 7, dim)
    if "one_token" in extras:
        given["encoder_hidden_states"] = draw(2, 1, dim)
    if "context_mask" in extras:
        given["encoder_attention_mask"] = torch.tensor([[1] * 7, [1, 1, 1, 0, 1, 0, 0]])
    if "attention_mask" in extras:
        given["attention_mask"] = torch.arange(16).expand(2, -1) < torch.tensor([[16], [9]])
    if "timestep_cond" in extras:
        given["timestep_cond"] = draw(2, config.time_cond_proj_dim)
    if "labels" in extras:
        given["class_labels"] = torch.tensor([4, 1])
    if "label_vectors" in extras:
        given["class_labels"] = draw(2, 128)
    if "text_time" in extras:
        given["added_cond_kwargs"] = {
            "text_embeds": draw(2, 20),
            "time_ids": torch.tensor(
                [[64.0, 48.0, 0.0, 3.0, 64.0, 64.0], [32.0, 32.0, 5.0, 0.0, 64.0, 48.0]]
            ),
        }
    if "controlnet" in extras:
        height, width = size
        w0, w1, w2 = config.block_out_channels
        scales = [(w0, 1)] * 3 + [(w0, 2)] + [(w1, 2)] * 2 + [(w1, 4)] + [(w2, 4)] * 2
        given["down_block_additional_residuals"] = tuple(
            draw(2, w, height // s, width // s) for w, s in scales
        )
        given["mid_block_additional_residual"] = draw(2, w2, height // 4, width // 4)
    return given


@pytest.mark.parametrize("name", CASES)
def test_matches_diffusers(name):
    config, size, extras = CASES[name]
    ours, peer = pair(config)
    assert set(ours.state_dict()) == set(peer.state_dict())
    given = inputs(peer, size, extras)
    with torch.no_grad():
        expected = peer(**given).sample
        output = ours(**given).sample
    assert 0.2 < expected.std() < 20, "the weights do not exercise the network"
    assert (output - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "timestep", [7, 7.5, torch.tensor(7), torch.tensor([7.25]), torch.tensor([3.5, 900.0])]
)
def test_timestep_forms_match_diffusers(timestep):
    ours, peer = pair(SD1)
    given = {**inputs(peer, (8, 8), ["context"]), "timestep": timestep}
    with torch.no_grad():
        expected = peer(**given).sample
        (output,) = ours(**given, return_dict=False)
    assert (output - expected).abs().max() <= 1e-5


def test_the_arguments_stand_where_diffusers_has_them():
    ours, peer = (list(signature(cls.forward).parameters) for cls in (UNet2DConditionModel, PeerUNet))
    assert ours == peer


def test_the_output_is_read_by_name_key_and_position():
    model = UNet2DConditionModel(**UNCONDITIONAL).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 4, 8, 8), 3)
    assert output[0] is output["sample"] is output.sample


@pytest.mark.parametrize("name", ["sd1_scale_shift", "sdxl", "unconditional"])
def test_gradients_match_diffusers(name):
    config, size, extras = CASES[name]
    ours, peer = pair(config)
    given = inputs(peer, size, extras)
    sample = given.pop("sample")
    gradients = []
    for model in (peer, ours):
        model.requires_grad_(True)
        leaf = sample.clone().requires_grad_()
        output = model(leaf, **given).sample
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)) / output.numel() ** 0.5
        (output * weight).sum().backward()
        gradients.append({"sample": leaf.grad} | {k: p.grad for k, p in model.named_parameters()})
    expected, got = gradients
    assert expected.keys() == got.keys()
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 0.1
    for key, gradient in expected.items():
        assert (got[key] - gradient).abs().max() <= 1e-5 * max(scale, 1), key


def test_channels_last_matches_and_stays():
    ours, peer = pair(SD1)
    given = inputs(peer, (16, 16), ["context"])
    with torch.no_grad():
        expected = ours(**given).sample
        layouts = []
        ours.up_blocks[-1].register_forward_hook(
            lambda _module, _args, output: layouts.append(
                output.is_contiguous(memory_format=torch.channels_last)
            )
        )
        ours.to(memory_format=torch.channels_last)
        given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
        output = ours(**given).sample
    assert layouts == [True]
    assert (output - expected).abs().max() <= 1e-5


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    ours, peer = pair({**CASES["unconditional"][0], "down_block_types": (DOWN, DOWN_A, DOWN_XA)})
    given = inputs(peer, (8, 8), [])
    given["encoder_hidden_states"] = torch.randn(2, 3, 1280, generator=torch.Generator().manual_seed(5))
    calls = []
    for watched in (
        ours.down_blocks[2].attentions[0].transformer_blocks[0],
        ours.down_blocks[1].attentions[0],
    ):
        # recomputation stops at the last tensor it needs, before hooks that come after forward
        watched.register_forward_pre_hook(lambda module, _args: calls.append(type(module).__name__))
    gradients = []
    for enabled in (False, True):
        ours.enable_gradient_checkpointing(enabled)
        ours.zero_grad(set_to_none=True)
        ours(**given).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert sorted(calls) == ["Attention"] * 3 + ["BasicTransformerBlock"] * 3
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd1_odd_size", "sdxl"])
def test_compiles_in_one_graph(name):
    config, size, extras = CASES[name]
    ours, peer = pair(config)
    given = inputs(peer, size, extras)
    torch.compiler.reset()
    with torch.no_grad():
        expected = ours(**given).sample
        output = torch.compile(ours, fullgraph=True, backend="aot_eager")(**given).sample
    assert (output - expected).abs().max() <= 1e-5


def test_half_precision_follows_the_sample():
    ours, peer = pair(SDXL)
    given = inputs(peer, (8, 8), ["context", "text_time"])
    with torch.no_grad():
        expected = ours(**given).sample
        ours.to(torch.bfloat16)
        given["sample"] = given["sample"].bfloat16()
        given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
        given["added_cond_kwargs"]["text_embeds"] = given["added_cond_kwargs"]["text_embeds"].bfloat16()
        output = ours(**given).sample
    assert output.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: an error of 2^-8 per layer, averaged over layers, stays well under one in ten
    assert (output.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "unconditional_head_dims"])
def test_folders_go_both_ways(name, tmp_path):
    config, size, extras = CASES[name]
    ours, peer = pair(config)
    given = inputs(peer, size, extras)
    peer.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    ours_again = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    peer_again, report = PeerUNet.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected = peer(**given).sample
        for model in (ours_again, peer_again):
            assert (model(**given).sample - expected).abs().max() <= 1e-5
    assert not ours_again.training
    theirs = {k: v for k, v in peer_again.config.items() if not k.startswith("_")}
    assert theirs == {
        k: v for k, v in PeerUNet.from_pretrained(tmp_path / "theirs").config.items() if k in theirs
    }


STABLE_DIFFUSION_1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [DOWN_XA, DOWN_XA, DOWN_XA, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, UP_XA, UP_XA, UP_XA],
}
STABLE_DIFFUSION_2_1 = {
    **STABLE_DIFFUSION_1,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
STABLE_DIFFUSION_XL = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [DOWN, DOWN_XA, DOWN_XA],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [UP_XA, UP_XA, UP],
    "upcast_attention": None,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (STABLE_DIFFUSION_1, 859_520_964),
        (STABLE_DIFFUSION_2_1, 865_910_724),
        (STABLE_DIFFUSION_XL, 2_567_463_684),
    ],
    ids=["sd1", "sd2_1", "sdxl"],
)
def test_published_configurations(config, parameters):
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(config)
        peer = PeerUNet.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in peer.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": (DOWN_XA, DOWN_XA, "KDownBlock2D")}, "down_block_types is 'KDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"block_out_channels": (32, 64)}, "down_block_types has 3 values and block_out_channels 2"),
        ({"block_out_channels": (32, 64, 60)}, "norm_num_groups 16 does not divide 60"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 .heads. does not divide 32"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0; use whole numbers from 1"),
        ({"attention_head_dim": (2, -4, 8)}, r"attention_head_dim is \(2, -4, 8\); use"),
        ({"time_embedding_dim": 0}, "time_embedding_dim is 0; use"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
        ({"class_embed_type": "other"}, "class_embed_type"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"transformer_layers_per_block": (1, (1, 1), 1)}, "reverse_transformer_layers_per_block"),
        ({"transformer_layers_per_block": (1, 1)}, "transformer_layers_per_block has 2 values"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type only at 'positional'"),
        ({"num_attention_heads": 4}, "num_attention_heads only at None"),
        ({"num_heads": 4}, "no configuration field 'num_heads'"),
    ],
)
def test_wrong_configuration_is_named(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        UNet2DConditionModel.from_config({**SD1, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd1", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
        ("sd1", {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ("sd1", {"encoder_attention_mask": torch.ones(2, 1, 7)}, "encoder_attention_mask has shape"),
        ("sd1", {"mid_block_additional_residual": torch.zeros(1)}, "go together"),
        ("sd1", {"down_intrablock_additional_residuals": [torch.zeros(1)]}, "T2I-Adapter.* pass None"),
        (
            "sd1",
            {
                "mid_block_additional_residual": torch.zeros(1),
                "down_block_additional_residuals": [torch.zeros(1)],
            },
            "has 1 tensors; this UNet has 9",
        ),
        ("ldm_class_table", {"class_labels": None}, "class_labels is missing"),
        ("sdxl", {"added_cond_kwargs": None}, "text_embeds and time_ids"),
    ],
)
def test_wrong_input_is_named(name, change, message):
    model = UNet2DConditionModel(**CASES[name][0])
    given = {"sample": torch.zeros(1, 4, 8, 8), "timestep": 0, "encoder_hidden_states": torch.zeros(1, 7, 24)}
    with pytest.raises(InputError, match=message):
        model(**{**given, **change})
