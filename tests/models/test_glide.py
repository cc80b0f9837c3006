"""GLIDE's networks against a float64 oracle of the formulas, and diffusers' network with added keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import GlideTextOutput, GlideTokenizer, GlideUNet, glide_inpainting
from fastldm.models.adm_configs import GLIDE
from tests.models.adm_oracle import Oracle, close, diffusers_state, randomised

TINY = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "n_vocab": 50,
    "text_ctx": 9,
    "xf_width": 48,
    "xf_layers": 2,
    "xf_heads": 3,
}
VARIANTS = {
    "plain": {},
    "no_padding": {"xf_padding": False},
    "no_final_norm": {"xf_final_ln": False},
    "heads": {"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2, "learn_sigma": False},
    "added_embedding": {"use_scale_shift_norm": False, "xf_heads": 2},
    "convolutions": {"resblock_updown": False},
    "pooling": {"resblock_updown": False, "conv_resample": False},
    "three_levels": {"channel_mult": (1, 1, 2), "attention_resolutions": (16, 4), "num_res_blocks": 2},
    "super_res": {"super_res": True},
    "inpaint": {"inpaint": True},
    "super_res_inpaint": {"super_res": True, "inpaint": True},
}


def build(**fields):
    return randomised(GlideUNet(**{**TINY, **fields}))


def texts(model, batch=3):
    """Tokens and, with padding, masks of 0, 5 and all tokens."""
    length = model.config.text_ctx
    tokens = torch.randint(model.config.n_vocab, (batch, length))
    mask = torch.arange(length) < torch.tensor([0, 5, length])[:batch, None]
    return {"tokens": tokens, "mask": mask} if model.config.xf_padding else {"tokens": tokens}


def pictures(model, batch=3, size=(16, 8)):
    given = {}
    if model.config.super_res:
        given["low_res"] = torch.randn(batch, 3, size[0] // 4, size[1] // 4)
    if model.config.inpaint:
        given["inpaint_image"] = torch.randn(batch, 3, *size)
        given["inpaint_mask"] = (torch.rand(batch, 1, *size) < 0.5).float()
    return given


def inputs(model, batch=3):
    return torch.randn(batch, 3, 16, 8), torch.tensor([0.0, 437.25, 999.0])[:batch]


def seen_by_the_first_layer(x, low_res=None, inpaint_image=None, inpaint_mask=None):
    parts = [x.double()]
    if inpaint_image is not None:
        parts += [inpaint_image.double() * inpaint_mask, inpaint_mask.double()]
    if low_res is not None:
        parts += [F.interpolate(low_res.double(), x.shape[2:], mode="bilinear")]
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_the_formula_s(name):
    model = build(**VARIANTS[name])
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    oracle = Oracle(model.state_dict(), model.config)
    read = oracle.read(text["tokens"], text.get("mask"))
    found = model.encode_text(**text)
    close(found.xf_proj, read[0])
    close(found.xf_out, read[1])
    wanted = oracle.unet(seen_by_the_first_layer(x, **given), t, text=read)
    assert wanted.std() > 0.1
    close(model(x, t, **text, **given).sample, wanted)
    assert oracle.seen == set(model.state_dict())
    assert wanted.shape[1] == (6 if model.config.learn_sigma else 3)


@torch.no_grad()
def test_texts_and_pictures_all_show_in_the_output():
    model = build(super_res=True, inpaint=True)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    wanted = model(x, t, **text, **given).sample
    changes = {
        "tokens": (text["tokens"] + 1) % 50,
        "mask": ~text["mask"],
        "low_res": given["low_res"] + 1,
        "inpaint_image": given["inpaint_image"] + 1,
        "inpaint_mask": 1 - given["inpaint_mask"],
    }
    for name, value in changes.items():
        other = model(x, t, **{**text, **given, name: value}).sample
        same = [torch.allclose(a, b, atol=1e-3) for a, b in zip(wanted, other)]
        # The empty text has no tokens to change.
        assert same == [name == "tokens", False, False], name
    hidden = given["inpaint_image"] + 5 * (1 - given["inpaint_mask"])
    assert torch.equal(model(x, t, **text, **{**given, "inpaint_image": hidden}).sample, wanted)
    known = {**given, "inpaint_mask": given["inpaint_mask"].bool()}
    assert torch.equal(model(x, t, **text, **known).sample, wanted)
    masks = {"inpaint_image": None, "inpaint_mask": None}
    nothing = {"inpaint_image": torch.randn(3, 3, 16, 8), "inpaint_mask": torch.zeros(3, 1, 16, 8)}
    none, zero = (model(x, t, **text, **{**given, **what}).sample for what in (masks, nothing))
    assert torch.equal(none, zero)


@torch.no_grad()
def test_a_text_is_read_once_for_all_steps():
    model = build()
    (x, t), text = inputs(model), texts(model)
    calls = []
    model.transformer.register_forward_hook(lambda *args: calls.append(1))
    read = model.encode_text(**text)
    assert isinstance(read, GlideTextOutput)
    for step in (t, t + 1):
        found = model(x, step, text=read).sample
        assert len(calls) == 1
        assert torch.equal(found, GlideUNet.forward(model, x, step, **text).sample)
        calls.pop()


@torch.no_grad()
def test_an_empty_prompt_and_a_caption_of_the_tokenizer():
    tokenizer = GlideTokenizer.from_captions(["a red circle"], 9, merges=20)
    model = build(n_vocab=tokenizer.vocab_size)
    x, t = inputs(model, 2)
    tokens, mask = tokenizer(["a red circle", ""])
    found = model(x, t, tokens, mask).sample
    assert torch.equal(found, model(x, t, tokens=tokens, mask=mask, return_dict=False)[0])
    padding = model.final_ln(model.transformer(model.padding_embedding[None]))
    close(model.encode_text(tokens, mask).xf_out[1], padding[0])


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"super_res": True}], ids=["base", "super_res"])
def test_diffusers_network_of_the_same_weights_agrees(fields):
    model = build(**fields)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    peer = UNet2DConditionModel(
        sample_size=16,
        in_channels=6 if fields else 3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    ).eval()
    peer.load_state_dict(diffusers_state(model.state_dict(), model.config))
    read = model.encode_text(**text)
    seen = seen_by_the_first_layer(x, **given).float()
    wanted = peer(seen, t, read.xf_out, class_labels=read.xf_proj).sample
    close(model(x, t, text=read, **given).sample, wanted)


@torch.no_grad()
def test_the_text_transformer_is_torch_s_of_the_same_weights():
    model = build(xf_final_ln=False)
    text = texts(model)
    peer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(48, 3, 192, 0.0, "gelu", batch_first=True, norm_first=True),
        2,
        enable_nested_tensor=False,
    ).eval()
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    names |= {"attn.c_proj": "self_attn.out_proj"}
    state = {}
    for i in range(2):
        block = model.transformer.resblocks[i]
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                state[f"layers.{i}.{theirs}.{kind}"] = block.get_parameter(f"{ours}.{kind}")
            interleaved = block.attn.c_qkv.get_parameter(kind).unflatten(0, (3, 3, 16))
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = interleaved.transpose(0, 1).flatten(0, 2)
    peer.load_state_dict(state)
    hidden = model.token_embedding(text["tokens"]) + model.positional_embedding
    hidden = torch.where(text["mask"][..., None], hidden, model.padding_embedding)
    close(model.encode_text(**text).xf_out, peer(hidden))


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("base", 385_030_726, 783),
        ("base_inpaint", 385_030_726 + 4 * 192 * 9, 783),
        ("upsample", 398_361_286, 797),
        ("upsample_inpaint", 398_361_286 + 4 * 192 * 9, 797),
    ],
)
def test_the_published_networks_have_their_sizes_and_keys(name, parameters, keys):
    with torch.device("meta"):
        model = GlideUNet(**GLIDE[name])
    state = model.state_dict()
    assert (sum(p.numel() for p in model.parameters()), len(state)) == (parameters, keys)
    assert (
        state["input_blocks.0.0.weight"].shape[1]
        == {
            "base": 3,
            "base_inpaint": 7,
            "upsample": 6,
            "upsample_inpaint": 10,
        }[name]
    )
    assert {key: tuple(state[key].shape) for key in SHAPES} == SHAPES


SHAPES = {
    "token_embedding.weight": (50257, 512),
    "positional_embedding": (128, 512),
    "padding_embedding": (128, 512),
    "final_ln.weight": (512,),
    "transformer_proj.weight": (768, 512),
    "transformer.resblocks.15.attn.c_qkv.weight": (1536, 512),
    "transformer.resblocks.15.mlp.c_fc.bias": (2048,),
    "middle_block.1.qkv.weight": (2304, 768, 1),
    "middle_block.1.encoder_kv.weight": (1536, 512, 1),
    "middle_block.1.proj_out.weight": (768, 768, 1),
}


def test_openai_files_load_as_they_are(tmp_path):
    model = build(super_res=True)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    torch.save(model.state_dict(), tmp_path / "upsample.pt")
    loaded = GlideUNet.from_openai(tmp_path / "upsample.pt", **TINY, super_res=True)
    assert torch.equal(loaded(x, t, **text, **given).sample, model(x, t, **text, **given).sample)
    said = r"1 missing \(padding_embedding\); 1 of another shape \(input_blocks.0.0.weight .*, 3, 3, 3\), not"
    torch.save(build(xf_padding=False).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=said):
        GlideUNet.from_openai(tmp_path / "other.pt", **TINY, super_res=True)


@torch.no_grad()
def test_a_folder_comes_back(tmp_path):
    model = build(inpaint=True)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    model.save_pretrained(tmp_path)
    loaded = GlideUNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, t, **text, **given).sample, model(x, t, **text, **given).sample)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("super_res", [False, True])
def test_a_network_made_for_inpainting_is_the_base_until_it_is_trained(super_res, dtype, layout):
    base = build(super_res=super_res).to(dtype=dtype, memory_format=layout)
    model = glide_inpainting(base)
    assert (model.dtype, model.training) == (dtype, False)
    (x, t), text, given = inputs(base), texts(base), pictures(model)
    x, given = x.to(dtype), {name: picture.to(dtype) for name, picture in given.items()}
    x = x.contiguous(memory_format=layout)
    ours = {name: picture for name, picture in given.items() if name == "low_res"}
    wanted = base(x, t, **text, **ours).sample
    assert torch.equal(model(x, t, **text, **given).sample, wanted)
    first = model.input_blocks[0][0].weight
    assert not first[:, 3:7].any()
    assert first[:, :3].all()


def test_a_network_made_for_inpainting_is_a_copy_that_learns_to_see_the_picture():
    base = build().train()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = glide_inpainting(base)
    assert model.training
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    model(x, t, **text, **given).sample.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model.input_blocks[0][0].weight.grad[:, 3:].abs().amax((0, 2, 3)) > 0).all()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in before.items())
    with pytest.raises(InputError, match="inpaints already"):
        glide_inpainting(model)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"xf_heads": 5}, "xf_heads=5"),
        ({"xf_heads": 0}, "xf_heads=0"),
        ({"xf_heads": 12}, "multiple of 8"),
        ({"num_head_channels": 24}, "num_head_channels=24"),
        ({"cache_text_emb": True}, "cache_text_emb"),
        ({"use_new_attention_order": False}, "use_new_attention_order"),
        ({"attention_resolutions": (32,)}, r"\[32\]"),
    ],
)
def test_unusable_configurations_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        GlideUNet(**{**TINY, **fields})


TOKENS, MASK = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tokens", "mask", "said"),
    [
        (TOKENS[:, :8], MASK[:, :8], r"tokens \(2, 8\).*\(B, 9\)"),
        (TOKENS[0], MASK[0], r"tokens \(9,\)"),
        (TOKENS + 50, MASK, "tokens has values from 50 to 50; accepted are 0 to 49"),
        (TOKENS - 1, MASK, "from -1 to -1"),
        (TOKENS, None, "mask of the tokens is missing"),
        (TOKENS, MASK[:, :8], r"mask \(2, 8\)"),
        (TOKENS, MASK.float(), "torch.float32"),
        (TOKENS[:1], MASK[:1], "1 texts for 2 pictures"),
        (None, None, "give either tokens"),
    ],
)
def test_unusable_texts_are_refused(tokens, mask, said):
    with pytest.raises(InputError, match=said):
        build()(torch.zeros(2, 3, 16, 16), 0, tokens, mask)


def test_a_text_is_given_once():
    model, x = build(), torch.zeros(2, 3, 16, 16)
    text = model.encode_text(TOKENS, MASK)
    with pytest.raises(InputError, match="give either"):
        model(x, 0, TOKENS, MASK, text=text)
    with pytest.raises(InputError, match="read already"):
        model(x, 0, mask=MASK, text=text)
    with pytest.raises(InputError, match="has no padding"):
        build(xf_padding=False).encode_text(TOKENS, MASK)


PICTURE = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({}, {"low_res": PICTURE}, "enlarges nothing"),
        ({}, {"inpaint_image": PICTURE, "inpaint_mask": PICTURE[:, :1]}, "glide_inpainting"),
        ({"super_res": True}, {}, "low_res is missing"),
        ({"super_res": True}, {"low_res": PICTURE[:1]}, r"low_res \(1, 3, 16, 16\)"),
        ({"inpaint": True}, {"inpaint_image": PICTURE}, "both or neither"),
        ({"inpaint": True}, {"inpaint_mask": PICTURE[:, :1]}, "both or neither"),
        ({"inpaint": True}, {"inpaint_image": PICTURE, "inpaint_mask": PICTURE}, r"\(2, 1, 16, 16\)"),
        ({"inpaint": True}, {"inpaint_image": PICTURE[..., :8], "inpaint_mask": PICTURE[:, :1]}, "16, 8"),
    ],
)
def test_unusable_pictures_are_refused(fields, given, said):
    with pytest.raises(InputError, match=said):
        build(**fields)(torch.zeros(2, 3, 16, 16), 0, TOKENS, MASK, **given)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(InputError, match="multiples of 2"):
        build()(torch.zeros(2, 3, 15, 16), 0, TOKENS, MASK)


@pytest.mark.parametrize("name", ["plain", "super_res_inpaint"])
def test_checkpointing_keeps_the_gradients_and_all_weights_have_one(name):
    model = build(**VARIANTS[name], dropout=0.0).train()
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    grads = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        model(x, t, **text, **given).sample.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads))
    assert model.transformer.gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "super_res_inpaint"])
def test_half_precision_stays_near(dtype, name):
    model = build(**VARIANTS[name])
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    wanted = model(x, t, **text, **given).sample
    given = {name: picture.to(dtype) for name, picture in given.items()}
    found = model.to(dtype)(x.to(dtype), t, **text, **given).sample
    assert found.dtype == dtype
    # A couple of dozen layers, each rounded once or twice.
    assert (found.float() - wanted).abs().max() < 40 * torch.finfo(dtype).eps * wanted.abs().max()


@torch.no_grad()
def test_channels_last_goes_through():
    model = build(super_res=True, inpaint=True)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    wanted = model(x, t, **text, **given).sample
    model.to(memory_format=torch.channels_last)
    found = model(x.contiguous(memory_format=torch.channels_last), t, **text, **given).sample
    close(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_it_compiles_to_one_graph():
    model = build(super_res=True, inpaint=True, xf_layers=1)
    (x, t), text, given = inputs(model), texts(model), pictures(model)
    wanted = model(x, t, **text, **given).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x, t, **text, **given).sample, wanted)
