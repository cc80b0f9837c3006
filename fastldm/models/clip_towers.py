"""CLIP's two towers: a causal text transformer and a vision transformer (Radford et al. 2021, section 2.4).

Both are pre-norm transformers of the same blocks. Keys and `config.json` are those of transformers'
CLIPTextModel and CLIPVisionModel; folders load in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError, InputError
from fastldm.models.base import Config, Model, configurable
from fastldm.models.outputs import Output
from fastldm.nn import TimestepEmbedding, checkpointing, timestep_embedding

# The end-of-text id of configurations written before the field meant something (OpenAI's are among them).
ARGMAX_EOS = 2

# What else transformers writes, or wrote, into a configuration: notes, and settings of text generation.
_NOTES = """
architectures dtype finetuning_task gradient_checkpointing id2label label2id num_labels prefix problem_type
return_dict task_specific_params tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype
torchscript transformers_version use_bfloat16
"""
_GENERATION = """
bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty
do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
sep_token_id suppress_tokens temperature tf_legacy_loss top_k top_p typical_p
"""
BOOKKEEPING = frozenset(f"{_NOTES} {_GENERATION}".split())
# Fields that would change the network, with the one value at which they do not.
_NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "dropout": 0.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "pruned_heads": {},
}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI trained with (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass
class CLIPTowerOutput(Output):
    """last_hidden_state: (B, S, hidden_size); pooler_output: (B, hidden_size)."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class _Tower(Model):
    """What the towers share: transformers' files and what its configurations hold beside the network's."""

    weights_name: ClassVar[str] = "model.safetensors"
    pickled_weights_name: ClassVar[str] = "pytorch_model.bin"
    ignored_config_keys: ClassVar[frozenset[str]] = BOOKKEEPING
    _file_prefix: ClassVar[str]
    """Before every key of a file: transformers 4 needs it, 5 drops it and reads either."""

    def _exported_config(self) -> dict[str, Any]:
        return {
            **self.config,
            "model_type": self.peer_defaults["model_type"],
            "architectures": [type(self).__name__],
            "attention_dropout": 0.0,
        }

    def _file_key(self, key: str) -> str:
        return self._file_prefix + key

    def _convert_old_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # Old versions of transformers stored the positions 0, 1, ...
        return {
            key.removeprefix(self._file_prefix): tensor
            for key, tensor in state.items()
            if not key.endswith("embeddings.position_ids")
        }


class CLIPTextModel(_Tower):
    """Token ids to one state per token and the state at the end of the text.

    Args:
        vocab_size, max_position_embeddings: kinds of tokens, and the most a text may have.
        hidden_size, intermediate_size: widths of the tokens and of the feed-forward.
        num_attention_heads: each is hidden_size / num_attention_heads wide, a multiple of 8.
        hidden_act: "quick_gelu" (OpenAI) or "gelu".
        eos_token_id: the text's state is that of its first token of this id. At 2, which configurations of
            OpenAI's weights state, it is that of its largest id: the end of text in OpenAI's vocabulary.
        projection_dim: stored for transformers; CLIPModel has the projection.
        bos_token_id, pad_token_id: stored; the tokenizer places them.
    """

    peer_defaults: ClassVar[Mapping[str, Any]] = {**_NEUTRAL, "model_type": "clip_text_model"}
    _file_prefix: ClassVar[str] = "text_model."

    @configurable
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int | None = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        super().__init__()
        if not isinstance(eos_token_id, Integral):
            raise ConfigError(f"eos_token_id={eos_token_id!r}: give the one id that ends a text")
        self.embeddings = _TextEmbeddings(self.config)
        self.encoder = _Encoder(self.config)
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> CLIPTowerOutput | tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            input_ids: int64 (B, S), S at most `max_position_embeddings`. Each text holds its end of text;
                one that does not is read at its first token, as by transformers.
            attention_mask: (B, S), nonzero where a token takes part; None = everywhere. What follows the end
                of text cannot reach its state, so padding on the right needs no mask.
            position_ids: int64 (1 or B, S); None = 0, 1, ...

        Raises:
            InputError: for more tokens than there are positions.
        """
        length, limit = input_ids.shape[-1], self.config.max_position_embeddings
        if length > limit:
            raise InputError(f"{length} tokens, but the text tower has {limit} positions; cut the caption")
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        hidden = self.embeddings(input_ids, position_ids)
        hidden = self.final_layer_norm(self.encoder(hidden, mask, is_causal=True))
        if self.config.eos_token_id == ARGMAX_EOS:
            ends = input_ids.argmax(dim=-1)
        else:
            ends = (input_ids == self.config.eos_token_id).int().argmax(dim=-1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        return CLIPTowerOutput(hidden, pooled) if return_dict else (hidden, pooled)


class CLIPVisionModel(_Tower):
    """Pictures to one state per patch, a class token first, and the normed state of that token.

    Args:
        image_size, patch_size: side of the square pictures and patches in pixels; the picture is cut into
            (image_size // patch_size)^2 patches.
        hidden_size, intermediate_size, num_attention_heads, hidden_act: as in CLIPTextModel.
        timestep_conditioning: noised CLIP (Nichol et al. 2022, section 2.4): the tower is told how noisy its
            pictures are. Sinusoidal features of the timestep (Ho et al. 2020) go through two linear layers
            and are added to every token; the second layer starts at zero, so t has no effect at first.
        projection_dim: stored for transformers; CLIPModel has the projection.
    """

    peer_defaults: ClassVar[Mapping[str, Any]] = {**_NEUTRAL, "model_type": "clip_vision_model"}
    # Early versions wrote the fields of text generation here as well.
    ignored_config_keys: ClassVar[frozenset[str]] = BOOKKEEPING | {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
    _file_prefix: ClassVar[str] = "vision_model."

    @configurable
    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        timestep_conditioning: bool = False,
    ) -> None:
        super().__init__()
        sides = (image_size, patch_size)
        if not all(isinstance(side, Integral) for side in sides) or not 1 <= patch_size <= image_size:
            raise ConfigError(
                f"image_size={image_size!r}, patch_size={patch_size!r}: give sides in pixels, patches at "
                "most as large as the picture"
            )
        self.embeddings = _VisionEmbeddings(self.config)
        self.time_embedding = None
        if timestep_conditioning:
            self.time_embedding = TimestepEmbedding(hidden_size, hidden_size)
            nn.init.zeros_(self.time_embedding.linear_2.weight)
            nn.init.zeros_(self.time_embedding.linear_2.bias)
        # The key is misspelt in every checkpoint.
        self.pre_layrnorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.encoder = _Encoder(self.config)
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def _exported_config(self) -> dict[str, Any]:
        config = super()._exported_config()
        if not config["timestep_conditioning"]:
            del config["timestep_conditioning"]
        return config

    def forward(
        self, pixel_values: Tensor, timestep: Tensor | int | None = None, return_dict: bool = True
    ) -> CLIPTowerOutput | tuple[Tensor, Tensor]:
        """Encode pictures.

        Args:
            pixel_values: (B, num_channels, image_size, image_size), normalised as the model was trained.
            timestep: (B,) or one number, of x_t ~ q(x_t | x_0); None = 0, pictures without noise. Only for
                towers with `timestep_conditioning`.

        Raises:
            InputError: for pictures of another size, or a timestep that this tower does not take.
        """
        channels, side = self.config.num_channels, self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (channels, side, side):
            raise InputError(
                f"pictures {tuple(pixel_values.shape)}, but the image tower takes (B, {channels}, {side}, "
                f"{side}); resize them"
            )
        hidden = self.embeddings(pixel_values)
        if self.time_embedding is not None:
            hidden = hidden + self._embedded_time(timestep, hidden)[:, None]
        elif timestep is not None:
            raise InputError("this image tower takes no timestep; build it with timestep_conditioning=True")
        hidden = self.encoder(self.pre_layrnorm(hidden))
        pooled = self.post_layernorm(hidden[:, 0])
        return CLIPTowerOutput(hidden, pooled) if return_dict else (hidden, pooled)

    def _embedded_time(self, timestep: Tensor | int | None, like: Tensor) -> Tensor:
        """(1 or B, hidden_size) in the dtype of `like` (B, S, hidden_size)."""
        steps = torch.as_tensor(0 if timestep is None else timestep, device=like.device).reshape(-1)
        if len(steps) not in (1, len(like)):
            raise InputError(f"{len(steps)} timesteps for {len(like)} pictures; give one, or one per picture")
        features = timestep_embedding(steps, like.shape[-1], flip_sin_to_cos=True, freq_shift=0.0)
        return self.time_embedding(features.to(self.time_embedding.linear_1.weight.dtype))


class _TextEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02 * config.initializer_factor)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)[None]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        std = config.initializer_range * config.initializer_factor
        nn.init.normal_(self.class_embedding, std=width**-0.5 * config.initializer_factor)
        nn.init.normal_(self.patch_embedding.weight, std=std)
        nn.init.normal_(self.position_embedding.weight, std=std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        for layer in self.layers:
            hidden = checkpointing.run(layer, hidden, mask, is_causal, enabled=self.gradient_checkpointing)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), mask, is_causal)
        return hidden + self.mlp(self.layer_norm2(hidden))


class _SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads or width // heads % 8:
            raise ConfigError(
                f"hidden_size={width} in num_attention_heads={heads}: each head must be a multiple of 8 wide"
            )
        self.head_dim = width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        out_std = width**-0.5 * config.initializer_factor
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            _init(projection, out_std * _depth_factor(config))
        _init(self.out_proj, out_std)

    def forward(self, hidden: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = ops.attention(q, k, v, mask, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.hidden_act not in _ACTIVATIONS:
            known = " or ".join(_ACTIVATIONS)
            raise ConfigError(f"hidden_act={config.hidden_act!r} is not offered; use {known}")
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        _init(self.fc1, (2 * config.hidden_size) ** -0.5 * config.initializer_factor)
        _init(self.fc2, config.hidden_size**-0.5 * _depth_factor(config) * config.initializer_factor)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


def _depth_factor(config: Config) -> float:
    """Makes up for the sum of 2 residual branches per layer (Radford et al. 2019, section 2.3)."""
    return (2 * config.num_hidden_layers) ** -0.5


def _init(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
