"""ADM and GLIDE as plain functions of a state_dict, in float64, written from the papers' formulas.

Nothing of fastldm is used: group norm, attention, convolutions between resolutions are spelt out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Oracle:
    """A network of the fields `f` and the weights `state`, computed in float64."""

    def __init__(self, state, f):
        self.state = {key: tensor.double() for key, tensor in state.items()}
        self.f = dict(f)
        self.seen = set()

    def get(self, key):
        self.seen.add(key)
        return self.state[key]

    def has(self, prefix):
        return any(key.startswith(prefix) for key in self.state)

    def affine(self, name, x):
        """A linear layer over the last dimension, its weight with or without a trailing 1."""
        weight = self.get(f"{name}.weight")
        return x @ weight.reshape(weight.shape[0], -1).T + self.get(f"{name}.bias")

    def conv(self, name, x, stride=1):
        weight = self.get(f"{name}.weight")
        return F.conv2d(x, weight, self.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, name, x, scale=0.0, shift=0.0):
        grouped = x.reshape(len(x), 32, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        normed = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        y = normed * self.get(f"{name}.weight").view(shape) + self.get(f"{name}.bias").view(shape)
        return y * (1 + scale) + shift

    def layer_norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    @staticmethod
    def attend(q, k, v):
        """Over (B, S, heads, D)."""
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)

    def heads(self, channels, way):
        if self.f.get("num_head_channels", -1) != -1:
            return channels // self.f["num_head_channels"]
        up = self.f.get("num_heads_upsample", -1)
        return self.f["num_heads"] if way == "down" or up == -1 else up

    def attention(self, name, x, text, heads, new_order):
        b, c, h, w = x.shape
        tokens = self.norm(f"{name}.norm", x).reshape(b, c, h * w).transpose(1, 2)
        qkv, d = self.affine(f"{name}.qkv", tokens), c // heads
        q, k, v = self.split(qkv, heads, d, 3, new_order)
        if text is not None:
            text_k, text_v = self.split(self.affine(f"{name}.encoder_kv", text), heads, d, 2, False)
            k, v = torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)
        out = self.affine(f"{name}.proj_out", self.attend(q, k, v))
        return x + out.transpose(1, 2).reshape(x.shape)

    @staticmethod
    def split(x, heads, d, parts, together):
        """Column by column: where each head's part is, in either order."""
        found = []
        for part in range(parts):
            starts = [(part * heads + i) * d if together else (i * parts + part) * d for i in range(heads)]
            found.append(torch.stack([x[..., start : start + d] for start in starts], dim=-2))
        return found

    @staticmethod
    def halve(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    @staticmethod
    def double(x):
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def res(self, name, x, emb, change=lambda x: x):
        hidden = self.conv(f"{name}.in_layers.2", change(F.silu(self.norm(f"{name}.in_layers.0", x))))
        added = self.affine(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if self.f["use_scale_shift_norm"]:
            hidden = self.norm(f"{name}.out_layers.0", hidden, *added.chunk(2, 1))
        else:
            hidden = self.norm(f"{name}.out_layers.0", hidden + added)
        hidden = self.conv(f"{name}.out_layers.3", F.silu(hidden))
        x = change(x)
        return hidden + (
            self.conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection.") else x
        )

    def run(self, name, kinds, x, emb, text, way):
        for j, kind in enumerate(kinds):
            layer = f"{name}.{j}"
            if kind == "conv":
                x = self.conv(layer, x)
            elif kind == "res":
                x = self.res(layer, x, emb)
            elif kind == "attention":
                order = self.f.get("use_new_attention_order", False)
                x = self.attention(layer, x, text, self.heads(x.shape[1], way), order)
            elif self.f["resblock_updown"]:
                x = self.res(layer, x, emb, self.halve if kind == "down" else self.double)
            elif not self.f.get("conv_resample", True):
                x = self.halve(x) if kind == "down" else self.double(x)
            else:
                x = (
                    self.conv(f"{layer}.op", x, 2)
                    if kind == "down"
                    else self.conv(f"{layer}.conv", self.double(x))
                )
        return x

    def embedding(self, t):
        width = self.f["model_channels"]
        half = width // 2
        # In float32 as published: at t = 999 the last bit of a frequency shows in the features.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], 1).double()
        return self.affine("time_embed.2", F.silu(self.affine("time_embed.0", features)))

    def encode(self, x, emb, text=None):
        """The outputs of the input blocks and of the middle."""
        depth, levels = self.f["num_res_blocks"], len(self.f["channel_mult"])
        kinds = [["conv"]]
        for level in range(levels):
            attended = self.f["image_size"] // 2**level in self.f["attention_resolutions"]
            kinds += [["res", "attention"] if attended else ["res"]] * depth
            kinds += [["down"]] if level < levels - 1 else []
        maps = []
        for i, block in enumerate(kinds):
            x = self.run(f"input_blocks.{i}", block, x, emb, text, "down")
            maps.append(x)
        middle = ["res", "attention", "res"]
        return maps, self.run("middle_block", middle, x, emb, text, "down")

    def decode(self, maps, x, emb, text=None):
        depth, levels = self.f["num_res_blocks"], len(self.f["channel_mult"])
        i = 0
        for level in reversed(range(levels)):
            attended = self.f["image_size"] // 2**level in self.f["attention_resolutions"]
            for j in range(depth + 1):
                kinds = ["res", "attention"] if attended else ["res"]
                kinds += ["up"] if level and j == depth else []
                x = torch.cat([x, maps.pop()], 1)
                x = self.run(f"output_blocks.{i}", kinds, x, emb, text, "up")
                i += 1
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def unet(self, x, t, labels=None, text=None):
        """`text` is (projection, tokens)."""
        emb = self.embedding(t)
        if labels is not None:
            emb = emb + self.get("label_emb.weight")[labels]
        tokens = None
        if text is not None:
            emb, tokens = emb + text[0], text[1]
        maps, middle = self.encode(x.double(), emb, tokens)
        return self.decode(maps, middle, emb, tokens)

    def read(self, tokens, mask):
        """GLIDE's text transformer: (projection, tokens)."""
        x = self.get("token_embedding.weight")[tokens] + self.get("positional_embedding")
        if self.f["xf_padding"]:
            keep = mask[..., None].double()
            x = keep * x + (1 - keep) * self.get("padding_embedding")
        width, heads = x.shape[-1], self.f["xf_heads"]
        for i in range(self.f["xf_layers"]):
            block = f"transformer.resblocks.{i}"
            qkv = self.affine(f"{block}.attn.c_qkv", self.layer_norm(f"{block}.ln_1", x))
            attended = self.attend(*self.split(qkv, heads, width // heads, 3, False))
            x = x + self.affine(f"{block}.attn.c_proj", attended)
            inner = self.affine(f"{block}.mlp.c_fc", self.layer_norm(f"{block}.ln_2", x))
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            x = x + self.affine(f"{block}.mlp.c_proj", inner)
        if self.f["xf_final_ln"]:
            x = self.layer_norm("final_ln", x)
        return self.affine("transformer_proj", x[:, -1]), x

    def classify(self, x, t):
        emb = self.embedding(t)
        maps, middle = self.encode(x.double(), emb)
        pool = self.f["pool"]
        if pool.startswith("spatial"):
            means = torch.cat([m.mean((2, 3)) for m in (*maps, middle)], 1)
            hidden = self.affine("out.0", means)
            hidden = hidden.relu() if pool == "spatial" else F.silu(self.norm("out.1", hidden))
            return self.affine("out.2" if pool == "spatial" else "out.3", hidden)
        hidden = F.silu(self.norm("out.0", middle))
        if pool == "adaptive":
            return self.affine("out.3", hidden.mean((2, 3)))
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        tokens = tokens + self.get("out.2.positional_embedding").T
        heads, d = self.heads(tokens.shape[-1], "down"), self.f["num_head_channels"]
        q, k, v = self.split(self.affine("out.2.qkv_proj", tokens), heads, d, 3, True)
        return self.affine("out.2.c_proj", self.attend(q, k, v)[:, 0])


def diffusers_state(ours, f):
    """The weights of `ours` under the names of diffusers' UNets; GLIDE's text transformer is left out."""
    depth, levels = f["num_res_blocks"], len(f["channel_mult"])
    places = {"input_blocks.0.0.": "conv_in."}
    for level in range(levels):
        attention = f["image_size"] >> level in f["attention_resolutions"]
        for i in range(depth):
            block = f"input_blocks.{1 + level * (depth + 1) + i}"
            places[f"{block}.0."] = f"down_blocks.{level}.resnets.{i}."
            if attention:
                places[f"{block}.1."] = f"down_blocks.{level}.attentions.{i}."
        places[f"input_blocks.{(level + 1) * (depth + 1)}.0."] = f"down_blocks.{level}.downsamplers.0."
        for i in range(depth + 1):
            block = f"output_blocks.{(levels - 1 - level) * (depth + 1) + i}"
            stage = f"up_blocks.{levels - 1 - level}"
            places[f"{block}.0."] = f"{stage}.resnets.{i}."
            if attention:
                places[f"{block}.1."] = f"{stage}.attentions.{i}."
            places[f"{block}.{1 + attention}."] = f"{stage}.upsamplers.0."
    places |= {f"middle_block.{2 * i}.": f"mid_block.resnets.{i}." for i in (0, 1)}
    places |= {"middle_block.1.": "mid_block.attentions.0."}
    places |= {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2."}
    places |= {"label_emb.": "class_embedding.", "out.0.": "conv_norm_out.", "out.2.": "conv_out."}
    layers = {
        "in_layers.0.": "norm1.",
        "in_layers.2.": "conv1.",
        "emb_layers.1.": "time_emb_proj.",
        "out_layers.0.": "norm2.",
        "out_layers.3.": "conv2.",
        "skip_connection.": "conv_shortcut.",
        "norm.": "group_norm.",
        "proj_out.": "to_out.0.",
        "op.": "conv.",
    }
    state = {}
    for key, tensor in ours.items():
        found = [(old, new) for old, new in places.items() if key.startswith(old)]
        if not found:
            continue
        ((old, new),) = found
        rest, tensor = key[len(old) :], tensor.squeeze(-1) if tensor.ndim == 3 else tensor
        if rest.startswith(("qkv.", "encoder_kv.")):
            layer, kind = rest.split(".")
            names = ("to_q", "to_k", "to_v") if layer == "qkv" else ("add_k_proj", "add_v_proj")
            heads = len(tensor) // len(names) // f["num_head_channels"]
            if f.get("use_new_attention_order"):
                parts = tensor.chunk(3)
            else:
                parts = tensor.unflatten(0, (heads, len(names), -1)).transpose(0, 1).flatten(1, 2)
            state |= {f"{new}{name}.{kind}": part for name, part in zip(names, parts)}
            continue
        for a, b in layers.items():
            rest = b + rest[len(a) :] if rest.startswith(a) else rest
        state[new + rest] = tensor
    return state


def randomised(model):
    """The model with all weights drawn, those that start as zero too: everything shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.2)
            if ".weight" in name and parameter.ndim == 1:
                parameter.add_(1)
    return model.eval()


def close(found, wanted):
    """Within 1e-5, absolute, of float64."""
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=0)
