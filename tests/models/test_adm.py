"""ADM's UNet and upsampler against a float64 oracle of the formulas, and diffusers' network of that kind."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

from fastldm import ops
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import ADMSuperRes, ADMUNet, UNet2DConditionOutput
from fastldm.models.adm_configs import ADM, ADM_UPSAMPLERS
from tests.models.adm_oracle import Oracle, close, diffusers_state, randomised

TINY = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "channel_mult": (1, 2),
    "num_heads": 2,
    "num_head_channels": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
VARIANTS = {
    "plain": {},
    "new_order": {"use_new_attention_order": True},
    "head_channels": {"num_head_channels": 16, "use_new_attention_order": True, "num_classes": 7},
    "heads_up": {"num_heads": 4, "num_heads_upsample": 1},
    "added_embedding": {"use_scale_shift_norm": False},
    "convolutions": {"resblock_updown": False},
    "pooling": {"resblock_updown": False, "conv_resample": False, "use_scale_shift_norm": False},
    "classes": {"num_classes": 7, "learn_sigma": True},
    "three_levels": {
        "channel_mult": (0.5, 1, 2),
        "model_channels": 64,
        "attention_resolutions": (16, 4),
        "num_res_blocks": 2,
    },
    "latents": {"in_channels": 4, "out_channels": 5, "dropout": 0.3},
}


def build(cls=ADMUNet, **fields):
    return randomised(cls(**{**TINY, **fields}))


def inputs(model, size=(16, 8), batch=3):
    x = torch.randn(batch, model.config.in_channels, *size)
    given = {}
    if model.config.num_classes is not None:
        given["class_labels"] = torch.tensor([0, 6, 3])[:batch]
    return x, torch.tensor([0.0, 437.25, 999.0])[:batch], given


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_the_formula_s(name):
    model = build(**VARIANTS[name])
    x, t, given = inputs(model)
    oracle = Oracle(model.state_dict(), model.config)
    found = model(x, t, **given).sample
    wanted = oracle.unet(x, t, given.get("class_labels"))
    assert wanted.std() > 0.1
    close(found, wanted)
    assert oracle.seen == set(model.state_dict())
    fields = {"in_channels": 3, "out_channels": 3, **VARIANTS[name]}
    assert found.shape[1] == fields["out_channels"] * (2 if "learn_sigma" in fields else 1)


@torch.no_grad()
@pytest.mark.parametrize("small", [(8, 4), (3, 5), (16, 8)])
def test_the_upsampler_sees_the_small_picture_bilinearly_enlarged(small):
    model = build(ADMSuperRes, num_classes=7)
    x, t, given = inputs(model)
    low_res = torch.randn(3, 3, *small)
    found = model(x, t, low_res=low_res, **given).sample
    rows, columns = (matrix(n, m) for n, m in zip(small, (16, 8)))
    large = torch.einsum("ih,jw,bchw->bcij", rows, columns, low_res.double())
    oracle = Oracle(model.state_dict(), model.config)
    close(found, oracle.unet(torch.cat([x.double(), large], 1), t, given["class_labels"]))
    assert model.input_blocks[0][0].in_channels == 6


def matrix(small, large):
    """Bilinear interpolation of a line: pixel centres, clamped at the ends."""
    at = ((torch.arange(large) + 0.5) * small / large - 0.5).double().clamp(0, small - 1)
    below = at.floor().long()
    weights = torch.zeros(large, small, dtype=torch.float64)
    weights[torch.arange(large), below] += 1 - (at - below)
    weights[torch.arange(large), (below + 1).clamp(max=small - 1)] += at - below
    return weights


@torch.no_grad()
@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_diffusers_network_of_the_same_weights_agrees(updown, norm, order):
    fields = {
        **TINY,
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 3),
        "attention_resolutions": (8, 4),
        "num_head_channels": 16,
        "use_new_attention_order": order,
        "resblock_updown": updown,
        "use_scale_shift_norm": norm,
        "num_classes": 7,
    }
    model = build(**fields)
    sampling = "resnet" if updown else "conv"
    down = "ResnetDownsampleBlock2D" if updown else "DownBlock2D"
    up = "ResnetUpsampleBlock2D" if updown else "UpBlock2D"
    peer = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=(down, "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", up),
        downsample_type=sampling,
        upsample_type=sampling,
        resnet_time_scale_shift="scale_shift" if norm else "default",
        attention_head_dim=16,
        attn_norm_num_groups=32,
        num_class_embeds=7,
    ).eval()
    peer.load_state_dict(diffusers_state(model.state_dict(), fields))
    x, t, given = inputs(model, (16, 16))
    close(model(x, t, **given).sample, peer(x, t, **given).sample)


# The sizes that the paper's tables give in millions, and the keys of the released files' layout.
COUNTS = {
    "64x64_diffusion": (295_904_454, 541),
    "128x128_diffusion": (421_529_606, 493),
    "256x256_diffusion": (553_838_086, 567),
    "256x256_diffusion_uncond": (552_814_086, 566),
    "512x512_diffusion": (558_997_638, 645),
    "64_256_upsampler": (311_795_910, 567),
    "128_512_upsampler": (308_835_270, 537),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_networks_have_their_sizes(name):
    with torch.device("meta"):
        model = ADMUNet(**ADM[name]) if name in ADM else ADMSuperRes(**ADM_UPSAMPLERS[name])
    state = model.state_dict()
    assert (sum(p.numel() for p in model.parameters()), len(state)) == COUNTS[name]
    assert all(
        tensor.ndim == 3 for key, tensor in state.items() if key.endswith(("qkv.weight", "proj_out.weight"))
    )


def test_an_untrained_network_predicts_nothing():
    """Every residual branch and the last convolution start as zero (Dhariwal & Nichol's initialisation)."""
    model = ADMUNet(**TINY)
    zero = {name for name, p in model.named_parameters() if not p.any() and name.endswith("weight")}
    assert zero == {
        n for n in model.state_dict() if n.endswith(("out_layers.3.weight", "proj_out.weight"))
    } | {"out.2.weight"}
    assert not model(torch.randn(2, 3, 16, 16), 5).sample.any()


def test_openai_files_load_as_they_are(tmp_path):
    model = build(num_classes=7)
    x, t, given = inputs(model)
    wanted = model(x, t, **given).sample
    path, old = tmp_path / "model.pt", tmp_path / "old.pt"
    torch.save(model.state_dict(), path)
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    fields = {**TINY, "num_classes": 7}
    for file in (path, old):
        loaded = ADMUNet.from_openai(file, **fields)
        assert not loaded.training
        assert torch.equal(loaded(x, t, **given).sample, wanted)
    half = ADMUNet.from_openai(path, torch_dtype=torch.bfloat16, **fields)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.save({key: tensor.half() for key, tensor in model.state_dict().items()}, path)
    assert ADMUNet.from_openai(path, **fields).dtype == torch.float32


def test_a_folder_comes_back(tmp_path):
    model = build(num_classes=7)
    x, t, given = inputs(model)
    model.save_pretrained(tmp_path)
    loaded = ADMUNet.from_pretrained(tmp_path)
    assert loaded.config == model.config or dict(loaded.config) == {
        key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()
    }
    assert torch.equal(loaded(x, t, **given).sample, model(x, t, **given).sample)
    (sample,) = loaded(x, t, return_dict=False, **given)
    assert torch.equal(sample, model(x, t, **given)[0])
    assert isinstance(model(x, t, **given), UNet2DConditionOutput)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("out.0.bias"), r"1 missing \(out.0.bias\)"),
        (lambda s: s.update({"label_emb.weight": torch.zeros(7, 128)}), r"1 unexpected \(label_emb.weight\)"),
        (
            lambda s: s.update({"middle_block.1.qkv.weight": s["middle_block.1.qkv.weight"][..., 0]}),
            r"1 of another shape \(middle_block.1.qkv.weight is \(192, 64\), not \(192, 64, 1\)\)",
        ),
        (lambda s: s.clear(), "missing"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_error(tmp_path, change, said):
    state = dict(build().state_dict())
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=said):
        ADMUNet.from_openai(tmp_path / "model.pt", **TINY)


def test_a_file_with_code_or_none_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.nn.Linear(1, 1)}, path)
    for file in (path, tmp_path / "none.pt"):
        with pytest.raises(CheckpointError, match=f"cannot read the weights in {file}"):
            ADMUNet.from_openai(file, **TINY)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_channels": 48}, "multiple of 32"),
        ({"channel_mult": ()}, "widths"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"image_size": 17}, "multiple of 2"),
        ({"attention_resolutions": (8, 32)}, r"\[32\].*\[16, 8\]"),
        ({"num_head_channels": 24}, "num_head_channels=24"),
        ({"num_head_channels": 4}, "num_head_channels=4"),
        ({"num_head_channels": 0}, "num_head_channels=0"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads_upsample": 0}, "num_heads=0"),
        ({"channel_mult": "1,2"}, "channel_mult takes a list of float, got '1,2'"),
        ({"attention_resolutions": "8"}, "attention_resolutions takes a list of int, got '8'"),
        ({"dims": 3}, "dims"),
        ({"use_fp16": True}, "use_fp16"),
        ({"class_cond": True}, "class_cond"),
    ],
)
def test_unusable_configurations_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ADMUNet(**{**TINY, **fields})


@pytest.mark.parametrize(
    ("shape", "timestep", "given", "said"),
    [
        ((2, 3, 15, 16), 0, {}, r"\(2, 3, 15, 16\).*multiples of 2"),
        ((2, 3, 16, 0), 0, {}, "multiples of 2"),
        ((2, 4, 16, 16), 0, {}, r"\(B, 3, H, W\)"),
        ((3, 16, 16), 0, {}, r"\(B, 3, H, W\)"),
        ((2, 3, 16, 16), [0, 1, 2], {}, "3 timesteps for 2 pictures"),
        ((2, 3, 16, 16), 0, {"class_labels": [0, 1]}, "has no classes"),
    ],
)
def test_unusable_inputs_are_refused(shape, timestep, given, said):
    given = {name: torch.tensor(value) for name, value in given.items()}
    with pytest.raises(InputError, match=said):
        build()(torch.zeros(shape), torch.tensor(timestep), **given)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "missing"),
        ([0], r"\(1,\) for 2"),
        ([0, 7], "from 0 to 7.*0 to 6"),
        ([-1, 3], "from -1 to 3"),
        ([0.0, 1.0], "float32; give int64"),
        ([True, False], "bool; give int64"),
    ],
)
def test_unusable_labels_are_refused(labels, said):
    labels = None if labels is None else torch.tensor(labels)
    with pytest.raises(InputError, match=f"class_labels.*{said}"):
        build(num_classes=7)(torch.zeros(2, 3, 16, 16), 0, labels)


@pytest.mark.parametrize("shape", [None, (1, 3, 8, 8), (2, 4, 8, 8), (3, 8, 8), (2, 3, 0, 8)])
def test_the_upsampler_refuses_a_picture_that_is_missing_or_does_not_fit(shape):
    low_res = None if shape is None else torch.zeros(shape)
    with pytest.raises(InputError, match="low_res"):
        build(ADMSuperRes)(torch.zeros(2, 3, 16, 16), 0, low_res=low_res)


@pytest.mark.parametrize("variant", ["head_channels", "convolutions", "pooling"])
def test_checkpointing_keeps_the_gradients_and_all_weights_have_one(variant):
    model = build(**VARIANTS[variant]).train()
    x, t, given = inputs(model)
    grads = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        model(x, t, **given).sample.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_checkpointing_recomputes(monkeypatch):
    model = build()
    x, t, _ = inputs(model)
    calls = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(1) or attention(*args))
    counts = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        calls.clear()
        model(x, t).sample.sum().backward()
        counts.append(len(calls))
    assert counts == [4, 8]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["head_channels", "convolutions"])
def test_half_precision_stays_near(dtype, name):
    model = build(**VARIANTS[name])
    x, t, given = inputs(model)
    wanted = model(x, t, **given).sample
    found = model.to(dtype)(x.to(dtype), t, **given).sample
    assert found.dtype == dtype
    # A couple of dozen layers, each rounded once or twice.
    limit = 40 * torch.finfo(dtype).eps * wanted.abs().max()
    assert (found.float() - wanted).abs().max() < limit


@torch.no_grad()
def test_channels_last_goes_through():
    model = build(ADMSuperRes)
    x, t, _ = inputs(model)
    low_res = torch.randn(3, 3, 4, 4)
    wanted = model(x, t, low_res=low_res).sample
    strides = {}
    model.to(memory_format=torch.channels_last)
    for name, module in model.named_modules():
        if name in ("input_blocks.3.1", "middle_block", "output_blocks.1.1"):
            module.register_forward_hook(lambda m, args, out, name=name: strides.update({name: out}))
    model.input_blocks[0].register_forward_pre_hook(lambda m, args: strides.update(input=args[0]))
    found = model(x.contiguous(memory_format=torch.channels_last), t, low_res=low_res).sample
    close(found, wanted)
    assert len(strides) == 4
    for out in (*strides.values(), found):
        assert out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_it_compiles_to_one_graph():
    model = build(ADMSuperRes, num_classes=7)
    x, t, given = inputs(model)
    given["low_res"] = torch.randn(3, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x, t, **given).sample, model(x, t, **given).sample)


@torch.no_grad()
def test_timesteps_may_be_numbers_and_fractions():
    model = build()
    x = torch.randn(2, 3, 16, 16)
    for t in (7, 7.5, torch.tensor(7.5), torch.tensor([7])):
        every = torch.as_tensor(t).reshape(-1).expand(2)
        assert torch.equal(model(x, t).sample, model(x, every).sample)
    assert not torch.allclose(model(x, 7).sample, model(x, 7.5).sample, atol=1e-4)


def test_dropout_is_between_the_second_norm_and_its_convolution():
    model = build(dropout=0.5).train()
    x, t, _ = inputs(model)
    assert not torch.equal(model(x, t).sample, model(x, t).sample)
    model.eval()
    assert torch.equal(model(x, t).sample, model(x, t).sample)
    assert all(module.p == 0.5 for module in model.modules() if isinstance(module, torch.nn.Dropout))
