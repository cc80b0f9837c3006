"""OpenAI's layout of CLIP with a vision transformer, which OpenCLIP shares, to and from `CLIPModel`.

    visual.{class_embedding, positional_embedding, conv1, ln_pre, ln_post, proj}
    visual.transformer.resblocks.i.{ln_1, ln_2, attn.{in_proj_weight, in_proj_bias, out_proj}}
    visual.transformer.resblocks.i.mlp.{c_fc, c_proj}
    token_embedding, positional_embedding, transformer.resblocks.i..., ln_final, text_projection, logit_scale

Queries, keys and values are one matrix there, and the two projections multiply from the right.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.models.clip import CLIPModel
from fastldm.models.clip_towers import ARGMAX_EOS
from fastldm.models.weights import SkipInit, read_state_dict

_HEAD_DIM = 64

# Beginnings of keys there and here, without those of the blocks.
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_LAYERS = {
    "ln_1.": "layer_norm1.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")
# Numbers and the causal mask, which some files hold beside the weights.
_EXTRA = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks\.)(\d+)\.(.+)")


def load_openai_clip(
    path: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, **how: Any
) -> CLIPModel:
    """A CLIPModel, in evaluation mode, from a file of OpenAI's layout.

    Args:
        path: .safetensors, a pickled state_dict, a checkpoint of OpenCLIP's training that holds one, or a
            TorchScript archive such as OpenAI's .pt files.
        torch_dtype: of the parameters; None = float32 whatever is stored.
        how: see `from_openai_state_dict`.

    Raises:
        CheckpointError: the file cannot be read, or is of another layout.
    """
    path = Path(path)
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    state = _read_archive(path, dtype) if _is_archive(path) else read_state_dict(path, dtype)
    return from_openai_state_dict(state, source=path, **how).to(dtype)


def from_openai_state_dict(
    state: Mapping[str, Tensor],
    *,
    hidden_act: str = "quick_gelu",
    vision_heads: int | None = None,
    text_heads: int | None = None,
    source: str | os.PathLike = "the state_dict",
) -> CLIPModel:
    """A CLIPModel, in evaluation mode, of the sizes and weights of `state`.

    The texts are read at their largest id, as OpenAI's model reads them.

    Args:
        hidden_act: "quick_gelu" for OpenAI's weights, "gelu" for most of OpenCLIP's: the weights do not say.
        vision_heads, text_heads: attention heads of each tower; None = one per 64 channels, as OpenAI's.
        source: what messages call it.

    Raises:
        CheckpointError: weights of another layout, such as CLIP with a ResNet.
        ConfigError: heads that do not fit.
    """
    state = {key: tensor for key, tensor in _bare(state).items() if key not in _EXTRA}
    if "visual.conv1.weight" not in state or "visual.class_embedding" not in state:
        resnet = any(key.startswith("visual.layer1.") for key in state)
        kind = "CLIP with a ResNet" if resnet else "another layout"
        if "vision_model.embeddings.class_embedding" in state:
            kind = "transformers' layout, whose folders CLIPModel.from_pretrained loads"
        raise CheckpointError(
            f"{source} is of {kind}; give OpenAI's layout of CLIP with a vision transformer (visual.conv1, "
            "visual.class_embedding, ...)"
        )
    try:
        config = _config(state, hidden_act, vision_heads, text_heads)
    except KeyError as error:
        raise CheckpointError(f"{source} does not fit CLIP: {error.args[0]} is missing") from None
    except (ValueError, IndexError):
        raise CheckpointError(f"{source} does not fit CLIP: its weights have other dimensions") from None
    with SkipInit():
        model = CLIPModel.from_config(config)
    model.load_checked(_to_ours(state), source=source)
    return model.eval()


def to_openai_state_dict(model: CLIPModel) -> dict[str, Tensor]:
    """The weights of `model` in OpenAI's layout; those of a transposed projection are copies.

    Raises:
        CheckpointError: for noised CLIP, whose timestep layers have no place there.
    """
    if model.vision_model.time_embedding is not None:
        raise CheckpointError("OpenAI's layout has no place for timestep_conditioning; use save_pretrained")
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    towers = {ours: theirs for theirs, ours in _TOWERS.items()}
    layers = {ours: theirs for theirs, ours in _LAYERS.items()}
    block = re.compile(r"((?:vision|text)_model\.encoder\.layers\.)(\d+)\.(.+)")
    state = {}
    own = model.state_dict()
    for key, tensor in own.items():
        match = block.fullmatch(key)
        if match is None:
            theirs = _renamed(key, names)
            state[theirs] = tensor.T.contiguous() if theirs in _TRANSPOSED else tensor
            continue
        tower, index, rest = match.groups()
        prefix = f"{towers[tower]}{index}."
        if rest.startswith("self_attn.q_proj."):
            kind = rest.rpartition(".")[2]
            parts = [own[f"{tower}{index}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
        elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            state[prefix + _renamed(rest, layers)] = tensor
    return state


def _to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys that are not of the layout stay as they are, for the model to refuse."""
    ours = {}
    for key, tensor in state.items():
        match = _BLOCK.fullmatch(key)
        if match is None:
            ours[_renamed(key, _NAMES)] = tensor.T.contiguous() if key in _TRANSPOSED else tensor
            continue
        tower, index, rest = match.groups()
        prefix = f"{_TOWERS[tower]}{index}."
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            for part, piece in zip("qkv", tensor.chunk(3)):
                ours[f"{prefix}self_attn.{part}_proj.{kind}"] = piece.clone()
        else:
            ours[prefix + _renamed(rest, _LAYERS)] = tensor
    return ours


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what OpenCLIP puts before keys: `module.` in training on several devices, and `text.` where the
    text tower is a module of its own."""
    return {key.removeprefix("module.").removeprefix("text."): value for key, value in state.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return key


def _config(
    state: Mapping[str, Tensor], hidden_act: str, vision_heads: int | None, text_heads: int | None
) -> dict[str, Any]:
    """The sizes that the weights show."""

    def tower(prefix: str, width: int, heads: int | None) -> dict[str, Any]:
        blocks = {match[2] for key in state if (match := _BLOCK.fullmatch(key)) and match[1] == prefix}
        return {
            "hidden_size": width,
            "intermediate_size": state[f"{prefix}0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": len(blocks),
            "num_attention_heads": heads or max(1, width // _HEAD_DIM),
            "hidden_act": hidden_act,
            "projection_dim": projection,
        }

    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, channels, patch, _ = state["visual.conv1.weight"].shape
    projection = state["text_projection"].shape[1]
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "projection_dim": projection,
        "text_config": {
            **tower("transformer.resblocks.", text_width, text_heads),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["positional_embedding"]),
            "pad_token_id": 0,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": ARGMAX_EOS,
        },
        "vision_config": {
            **tower("visual.transformer.resblocks.", vision_width, vision_heads),
            "num_channels": channels,
            "patch_size": patch,
            "image_size": side * patch,
        },
    }


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which has a table of constants that a pickle has not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _read_archive(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a TorchScript archive; none of its code is run."""
    try:
        archive = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"cannot read the weights in {path}: {reason}") from error
    return {
        key: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for key, tensor in archive.state_dict().items()
    }
