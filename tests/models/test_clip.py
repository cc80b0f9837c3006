"""CLIP against transformers' CLIPModel: keys, towers, logits, loss, gradients, folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers import CLIPModel as PeerCLIP
from transformers import CLIPTextModel as PeerText
from transformers import CLIPVisionModel as PeerVision

from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import CLIPModel, CLIPTextModel, CLIPVisionModel
from fastldm.models.clip import MAX_LOGIT_SCALE, contrastive_loss

TEXT = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def tiny(text=(), vision=(), **fields):
    return {
        "text_config": {**TEXT, **dict(text)},
        "vision_config": {**VISION, **dict(vision)},
        "projection_dim": 40,
        **fields,
    }


def pair(text=(), vision=()):
    """transformers' model with weights large enough to mix the tokens, and ours with the same."""
    theirs = PeerCLIP(CLIPConfig(**tiny(text, vision))).eval()
    for name, parameter in theirs.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=0.2)
    ours = CLIPModel.from_config(tiny(text, vision)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def models():
    return pair()


def peer_texts(theirs, ids, **options):
    """The last hidden state and the projected text, as transformers 5 gives them at once."""
    output = theirs.text_model(ids, **options)
    return output.last_hidden_state, theirs.text_projection(output.pooler_output)


def captions(batch=4, length=20, eos=59, pad=59):
    """Ids that end at different places and are padded after that."""
    ids = torch.randint(3, 58, (batch, length))
    for row, end in zip(ids, torch.linspace(length // 3, length - 1, batch).int().tolist()):
        row[0], row[end], row[end + 1 :] = 58, eos, pad
    return ids


def pictures(batch=4):
    return torch.randn(batch, 3, 24, 24)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_keys_and_shapes_are_the_peer_s(models):
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert ours == theirs


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_every_output_is_the_peer_s(act):
    ours, theirs = pair({"hidden_act": act}, {"hidden_act": act})
    ids, images = captions(), pictures()
    found, wanted = ours(ids, images, return_loss=True), theirs(ids, images, return_loss=True)
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(found[name], wanted[name])
    for name in ("text_model_output", "vision_model_output"):
        close(found[name].last_hidden_state, wanted[name].last_hidden_state)
    close(found.text_model_output.pooler_output, peer_texts(theirs, ids)[1])
    pooled = theirs.vision_model(images).pooler_output
    close(found.vision_model_output.pooler_output, theirs.visual_projection(pooled))
    assert wanted.logits_per_image.std() > 0.1  # pictures and texts differ


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_other_numbers_of_texts_than_of_pictures(act, models):
    ours, theirs = models
    ids, images = captions(5), pictures(2)
    close(ours(ids, images).logits_per_image, theirs(ids, images).logits_per_image)
    with pytest.raises(InputError, match=r"\(2, 5\).*one text per picture"):
        ours(ids, images, return_loss=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("eos", "pad"),
    [
        (59, 59),  # transformers' tokenizer: the end of text is also the padding; its first place counts
        (59, 0),  # OpenAI's tokenizer
        (7, 59),  # an end of text that is not the largest id
        (2, 0),  # OpenAI's configurations: 2 stands for the largest id
        (2, 2),
    ],
)
def test_the_end_of_text_is_the_peer_s(eos, pad):
    ours, theirs = pair({"eos_token_id": eos})
    ids = captions(eos=59 if eos == 2 else eos, pad=pad)
    if eos == 7:
        ids[:, 1:3] = torch.tensor([8, 57])
    found = ours.get_text_features(ids)
    close(found.pooler_output, peer_texts(theirs, ids)[1])
    first = ours.text_projection(found.last_hidden_state[:, 0])
    assert (found.pooler_output - first).abs().max() > 0.1


@torch.no_grad()
def test_a_text_without_an_end_is_read_where_the_peer_reads_it(models):
    ours, theirs = models
    ids = torch.randint(3, 50, (2, 9))
    close(ours.get_text_features(ids).pooler_output, peer_texts(theirs, ids)[1])


@torch.no_grad()
def test_masks_and_positions_are_the_peer_s(models):
    ours, theirs = models
    ids, positions = captions(3), torch.arange(19, -1, -1)[None]
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, 8:], mask[1, 1:3] = 0, 0
    found = ours.get_text_features(ids, attention_mask=mask, position_ids=positions)
    states, pooled = peer_texts(theirs, ids, attention_mask=mask, position_ids=positions)
    close(found.pooler_output, pooled)
    close(found.last_hidden_state, states)
    assert (found.pooler_output - ours.get_text_features(ids).pooler_output).abs().max() > 0.1


@torch.no_grad()
def test_padding_on_the_left_is_the_peer_s(models):
    ours, theirs = models
    ids = captions(2)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    found, (states, pooled) = ours.get_text_features(ids, mask), peer_texts(theirs, ids, attention_mask=mask)
    close(found.pooler_output, pooled)
    close(found.last_hidden_state[:, 3:], states[:, 3:])


@torch.no_grad()
def test_padding_on_the_right_changes_no_text(models):
    ours, _ = models
    ids = captions()
    other = torch.where((ids == 59).cumsum(1) > 1, 5, ids)
    assert not torch.equal(ids, other)
    close(ours.get_text_features(other).pooler_output, ours.get_text_features(ids).pooler_output)


def test_gradients_are_the_peer_s_and_checkpointing_keeps_them(models):
    ours, theirs = models
    ids, images = captions(), pictures()
    theirs(ids, images, return_loss=True).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for enabled in (False, True):
        ours.enable_gradient_checkpointing(enabled)
        ours.zero_grad()
        ours(ids, images, return_loss=True).loss.backward()
        for name, parameter in ours.named_parameters():
            scale = max(wanted[name].abs().max().item(), 1e-3)
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5 * scale + 1e-7, rtol=1e-3)


def test_the_loss_is_the_mean_of_both_cross_entropies():
    logits = torch.randn(5, 5) * 4
    log_rows, log_columns = logits.double().log_softmax(1), logits.double().log_softmax(0)
    expected = -(log_rows.diagonal().mean() + log_columns.diagonal().mean()) / 2
    assert contrastive_loss(logits).item() == pytest.approx(expected.item(), rel=1e-6)
    assert contrastive_loss(100 * torch.eye(5)).item() < 1e-6
    assert contrastive_loss(logits.half()).dtype == torch.float32


def test_the_temperature_is_kept_above_a_hundredth(models):
    ours, _ = models
    before = ours.logit_scale.item()
    ours.clamp_logit_scale()
    assert ours.logit_scale.item() == before
    ours.logit_scale.data.fill_(9.0)
    ours.clamp_logit_scale()
    assert ours.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    assert ours.logit_scale.exp().item() == pytest.approx(100)


def test_fresh_weights_are_spread_as_the_peer_s():
    """Standard deviations of OpenAI's initialisation, within five of their standard errors."""
    wide = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    config = tiny(wide, wide)
    ours, theirs = CLIPModel.from_config(config), PeerCLIP(CLIPConfig(**config))
    for name, wanted in theirs.state_dict().items():
        found = ours.state_dict()[name]
        if wanted.numel() < 100 or wanted.std() == 0:
            torch.testing.assert_close(found.mean(), wanted.mean(), atol=0.1, rtol=0)
        else:
            error = 5 * 2**0.5 * (2 * wanted.numel()) ** -0.5
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=error), name


@torch.no_grad()
def test_folders_load_in_both_directions(models, tmp_path):
    ours, theirs = models
    ids, images = captions(), pictures()
    wanted = theirs(ids, images).logits_per_image
    theirs.save_pretrained(tmp_path / "theirs")
    close(CLIPModel.from_pretrained(tmp_path / "theirs")(ids, images).logits_per_image, wanted)
    ours.save_pretrained(tmp_path / "ours")
    back, report = PeerCLIP.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    close(back.eval()(ids, images).logits_per_image, wanted)
    written, read = (json.loads((tmp_path / k / "config.json").read_text()) for k in ("ours", "theirs"))
    for tower in ("text_config", "vision_config"):
        assert read.pop(tower).items() <= {**written.pop(tower), "torch_dtype": "float32"}.items()
    noted = {"transformers_version", "dtype", "torch_dtype"}
    assert {key: value for key, value in read.items() if key not in noted} == written


@torch.no_grad()
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_the_towers_load_alone_in_both_directions(models, tmp_path, tower, prefixed):
    """As in Stable Diffusion's folders; until transformers 5 there is a prefix before every key."""
    ours_class, peer_class, given = {
        "text": (CLIPTextModel, PeerText, captions()),
        "vision": (CLIPVisionModel, PeerVision, pictures()),
    }[tower]
    peer = peer_class(getattr(models[1].config, f"{tower}_config")).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(tmp_path / "theirs")
    file, prefix = tmp_path / "theirs" / "model.safetensors", f"{tower}_model."
    state = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    state["embeddings.position_ids"] = torch.arange(20)[None]
    state = {f"{prefix}{key}" if prefixed else key: tensor for key, tensor in state.items()}
    save_file(state, file, metadata={"format": "pt"})

    wanted, loaded = peer(given), ours_class.from_pretrained(tmp_path / "theirs")
    close(loaded(given).pooler_output, wanted.pooler_output)
    close(loaded(given, return_dict=False)[0], wanted.last_hidden_state)
    loaded.save_pretrained(tmp_path / "ours")
    assert ours_class.from_pretrained(tmp_path / "ours").state_dict().keys() == loaded.state_dict().keys()
    back, report = peer_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    close(back.eval()(given).pooler_output, wanted.pooler_output)


def test_a_config_as_transformers_4_wrote_it_loads():
    junk = {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": None,
        "attention_dropout": 0.0,
        "bad_words_ids": None,
        "dropout": 0.0,
        "id2label": {"0": "LABEL_0"},
        "max_length": 20,
        "pruned_heads": {},
        "torch_dtype": "float32",
        "transformers_version": "4.16.0.dev0",
    }
    config = tiny({**junk, "bos_token_id": 0, "eos_token_id": 2}, {**junk, "eos_token_id": None})
    old = {
        "text_config_dict": None,
        "vision_config_dict": None,
        "torch_dtype": "float32",
        "model_type": "clip",
    }
    model = CLIPModel.from_config({**config, **old})
    assert model.text_model.config.eos_token_id == 2
    assert model.state_dict().keys() == CLIPModel.from_config(tiny()).state_dict().keys()


def test_a_tower_said_twice_is_the_second_one_as_in_the_peer():
    stated = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 60}
    config = {**tiny(), "text_config_dict": stated}
    peer = CLIPConfig(**config).text_config
    ours = CLIPModel.from_config(config).text_model.config
    for name in ours:
        assert ours[name] == getattr(peer, name), name
    assert ours.hidden_size == 64


def test_half_precision_stays_near(models):
    ours, _ = models
    ids, images = captions(), pictures()
    with torch.no_grad():
        full = ours(ids, images).image_embeds
        half = ours.to(torch.bfloat16)(ids, images).image_embeds
    assert half.dtype == torch.bfloat16
    # 8 bits per rounding, a dozen roundings along the residual stream
    assert (half.float() - full).abs().mean() < 12 * 2**-8 * full.abs().mean()


def test_the_timestep_has_no_effect_at_first_and_learns_from_there(models):
    ours, _ = models
    noised = CLIPModel.from_config(tiny(vision={"timestep_conditioning": True}))
    missing, unexpected = noised.load_state_dict(ours.state_dict(), strict=False)
    assert {k.split(".")[1] for k in missing} == {"time_embedding"}
    assert not unexpected
    images = pictures()
    plain = ours.get_image_features(images).pooler_output
    for t in (None, 7, torch.tensor([0, 10, 500, 999])):
        assert torch.equal(noised.get_image_features(images, t).pooler_output, plain)
    noised.get_image_features(images, 500).pooler_output.square().sum().backward()
    assert noised.vision_model.time_embedding.linear_2.weight.grad.abs().sum() > 0
    torch.nn.init.normal_(noised.vision_model.time_embedding.linear_2.weight)
    with torch.no_grad():
        late = noised.get_image_features(images, torch.tensor([0, 10, 500, 999])).pooler_output
        none = noised.get_image_features(images).pooler_output
        assert torch.equal(none, noised.get_image_features(images, 0).pooler_output)
    close(late[:1], none[:1])
    assert (late[1:] - none[1:]).abs().amax(dim=1).min() > 1e-2


def test_the_timestep_conditioning_is_kept_in_the_folder(tmp_path):
    noised = CLIPModel.from_config(tiny(vision={"timestep_conditioning": True})).eval()
    torch.nn.init.normal_(noised.vision_model.time_embedding.linear_2.weight)
    noised.save_pretrained(tmp_path)
    loaded, images = CLIPModel.from_pretrained(tmp_path), pictures()
    with torch.no_grad():
        assert torch.equal(
            loaded.get_image_features(images, 9).pooler_output,
            noised.get_image_features(images, 9).pooler_output,
        )


def test_tuple_outputs(models):
    ours, _ = models
    ids, images = captions(), pictures()
    assert len(ours(ids, images, return_dict=False)) == 6
    assert len(ours(ids, images, return_loss=True, return_dict=False)) == 7
    assert ours.get_text_features(ids, return_dict=False)[1].shape == (4, 40)
    assert ours.get_image_features(images, return_dict=False)[1].shape == (4, 40)


def test_unusable_input_is_refused(models, tmp_path):
    ours, _ = models
    with pytest.raises(InputError, match="21 tokens"):
        ours.get_text_features(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32\).*resize"):
        ours.get_image_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="takes no timestep"):
        ours.get_image_features(pictures(), 3)
    noised = CLIPModel.from_config(tiny(vision={"timestep_conditioning": True}))
    with pytest.raises(InputError, match="3 timesteps for 4 pictures"):
        noised.get_image_features(pictures(), torch.arange(3))
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing.*layers\.3"):
        CLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny({"attention_dropout": 0.1}), "attention_dropout"),
        (tiny({"hidden_act": "relu"}), "hidden_act='relu'"),
        (tiny({"hidden_size": 50}), "hidden_size=50"),
        (tiny({"num_attention_heads": 4}), "multiple of 8"),
        (tiny({"eos_token_id": [1, 2]}), "eos_token_id"),
        (tiny({"model_type": "bert"}), "model_type"),
        (tiny(vision={"patch_size": 30}), "patch_size=30"),
        (tiny(vision={"layers": 3}), "layers"),
        (tiny(model_type="siglip"), "model_type"),
        ({"text_config": 3}, "text_config"),
    ],
)
def test_unusable_configurations_are_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        CLIPModel.from_config(config)
