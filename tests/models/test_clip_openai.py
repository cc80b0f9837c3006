"""OpenAI's layout of CLIP, in a model written with `nn.MultiheadAttention`, to CLIPModel and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPModel as PeerCLIP

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import CLIPModel
from fastldm.models.clip_openai import from_openai_state_dict, load_openai_clip, to_openai_state_dict

HEADS = {"vision_heads": 4, "text_heads": 3}


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, act):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", act())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, act):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, act) for _ in range(layers)))

    def forward(self, x, mask=None):
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class Visual(nn.Module):
    def __init__(self, width, act, embed):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(10, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, 2, HEADS["vision_heads"], act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAICLIP(nn.Module):
    def __init__(self, act=QuickGELU, vision=32, text=48, embed=40):
        super().__init__()
        self.visual = Visual(vision, act, embed)
        self.transformer = Transformer(text, 3, HEADS["text_heads"], act)
        self.token_embedding = nn.Embedding(60, text)
        self.positional_embedding = nn.Parameter(torch.randn(20, text))
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.randn(text, embed))
        self.logit_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        for parameter in self.parameters():
            if parameter.ndim > 0:
                nn.init.normal_(parameter, std=0.2)

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.text_projection

    def forward(self, images, ids):
        pictures, texts = self.visual(images), self.encode_text(ids)
        pictures, texts = (x / x.norm(dim=1, keepdim=True) for x in (pictures, texts))
        return self.logit_scale.exp() * pictures @ texts.t()


@pytest.fixture
def openai():
    return OpenAICLIP().eval()


def batch():
    """Pictures, and texts whose end is 59, the largest id, padded with 0 as OpenAI's."""
    ids = torch.randint(3, 58, (4, 20))
    for row, end in zip(ids, (6, 11, 15, 19)):
        row[0], row[end], row[end + 1 :] = 58, 59, 0
    return torch.randn(4, 3, 24, 24), ids


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("act", "name"), [(QuickGELU, "quick_gelu"), (nn.GELU, "gelu")])
def test_the_outputs_are_those_of_the_layout_s_model(act, name):
    theirs = OpenAICLIP(act).eval()
    ours = from_openai_state_dict(theirs.state_dict(), hidden_act=name, **HEADS)
    images, ids = batch()
    close(ours.get_image_features(images).pooler_output, theirs.visual(images))
    close(ours.get_text_features(ids).pooler_output, theirs.encode_text(ids))
    close(ours(ids, images).logits_per_image, theirs(images, ids))
    assert theirs(images, ids).std() > 0.1
    no_end = torch.randint(0, 50, (3, 9))
    close(ours.get_text_features(no_end).pooler_output, theirs.encode_text(no_end))


def test_the_layout_comes_back_bit_for_bit(openai):
    state = openai.state_dict()
    back = to_openai_state_dict(from_openai_state_dict(state, **HEADS))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@torch.no_grad()
def test_the_saved_folder_is_transformers(openai, tmp_path):
    ours = from_openai_state_dict(openai.state_dict(), **HEADS)
    ours.save_pretrained(tmp_path)
    images, ids = batch()
    close(PeerCLIP.from_pretrained(tmp_path)(ids, images).logits_per_image, openai(images, ids))


def test_the_sizes_are_read_from_the_weights():
    """With a head per 64 channels, as every model of OpenAI's has."""
    model = OpenAICLIP(vision=64, text=192)
    config = from_openai_state_dict(model.state_dict()).config
    assert config.text_config["num_attention_heads"] == 3
    assert config.vision_config["num_attention_heads"] == 1
    assert config.vision_config["image_size"] == 24
    assert config.text_config["max_position_embeddings"] == 20
    assert (config.text_config["vocab_size"], config.projection_dim) == (60, 40)


class Sizes(nn.Module):
    """OpenAI's archives hold three numbers beside the weights."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, getattr(model, name))
        for name, value in (("input_resolution", 24), ("context_length", 20), ("vocab_size", 60)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "archive"])
def test_files_of_every_kind_load(openai, tmp_path, kind):
    from safetensors.torch import save_file

    file = tmp_path / ("clip.safetensors" if kind == "safetensors" else "clip.pt")
    images, ids = batch()
    wanted = openai(images, ids)
    if kind == "safetensors":
        save_file(openai.state_dict(), file)
    elif kind == "pickle":
        torch.save(openai.state_dict(), file)
    else:
        torch.jit.save(torch.jit.trace(Sizes(openai), torch.zeros(1)), str(file))
    ours = load_openai_clip(file, **HEADS)
    assert not ours.training
    close(ours(ids, images).logits_per_image, wanted)
    assert load_openai_clip(file, torch_dtype=torch.bfloat16, **HEADS).dtype == torch.bfloat16


def test_what_is_no_such_layout_is_refused(openai, tmp_path):
    state = openai.state_dict()
    with pytest.raises(CheckpointError, match="ResNet"):
        from_openai_state_dict({"visual.layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"transformers' layout, whose folders CLIPModel\.from_pre"):
        from_openai_state_dict(CLIPModel.from_config(TINY).state_dict())
    with pytest.raises(CheckpointError, match=r"text_projection is missing"):
        from_openai_state_dict({k: v for k, v in state.items() if k != "text_projection"}, **HEADS)
    with pytest.raises(CheckpointError, match=r"unexpected \(visual\.extra\)"):
        from_openai_state_dict({**state, "visual.extra": torch.zeros(1)}, **HEADS)
    without = {k: v for k, v in state.items() if k != "transformer.resblocks.1.mlp.c_fc.bias"}
    with pytest.raises(CheckpointError, match=r"missing \(text_model\.encoder\.layers\.1\.mlp\.fc1\.bias\)"):
        from_openai_state_dict(without, **HEADS)
    with pytest.raises(ConfigError, match="num_attention_heads=5"):
        from_openai_state_dict(state, vision_heads=5)
    (tmp_path / "clip.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"clip\.pt"):
        load_openai_clip(tmp_path / "clip.pt")
    noised = CLIPModel.from_config({**TINY, "vision_config": {**VISION, "timestep_conditioning": True}})
    with pytest.raises(CheckpointError, match="timestep_conditioning"):
        to_openai_state_dict(noised)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}
TINY = {
    "vision_config": VISION,
    "text_config": {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    },
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("own_tower", [False, True])
def test_checkpoints_of_openclip_s_training_load(openai, tmp_path, prefix, own_tower):
    def name(key):
        tower = "text." * (own_tower and not key.startswith(("visual.", "logit_scale")))
        return prefix + tower + key

    state = {name(key): tensor for key, tensor in openai.state_dict().items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    saved = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}
    torch.save(saved, tmp_path / "epoch_3.pt")
    images, ids = batch()
    found = load_openai_clip(tmp_path / "epoch_3.pt", **HEADS)(ids, images)
    with torch.no_grad():
        close(found.logits_per_image, openai(images, ids))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({"epoch": 3}, r"holds an int under 'epoch', where .*save model\.state_dict\(\) alone"),
        ({1: torch.zeros(1)}, "holds a Tensor under 1, where"),
        (torch.nn.Linear(1, 1), r"pickle of more than tensors \(torch\.nn\.modules\.linear\.Linear\)"),
        (b"", "it is empty; download or save it again"),
        (b"junk", "it is no PyTorch file, or not a whole one"),
        (b"PK\x03\x04junk", "it is no PyTorch file, or not a whole one"),
        (b'{"a": 1}', "it is no PyTorch file, or not a whole one"),
        ({"visual.conv1.weight": torch.zeros(1), "visual.class_embedding": torch.zeros(1)}, "is missing"),
        (None, "No such file"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, content, said):
    file = tmp_path / "clip.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_openai_clip(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_other_dimensions_are_refused(openai):
    state = {**openai.state_dict(), "visual.conv1.weight": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError, match="its weights have other dimensions"):
        from_openai_state_dict(state, **HEADS)
    with pytest.raises(CheckpointError, match="its weights have other dimensions"):
        from_openai_state_dict({**openai.state_dict(), "text_projection": torch.zeros(4)}, **HEADS)
