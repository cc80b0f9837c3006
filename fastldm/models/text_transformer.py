"""The text transformer of latent diffusion: tau_theta for captions (Rombach et al. 2022, section 3.3).

Keys and `config.json` are those of diffusers' LDMBertModel, which reads what this one writes and the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError, InputError
from fastldm.models.base import Config, Model, configurable
from fastldm.models.outputs import Output
from fastldm.nn import checkpointing


@dataclass
class TextEncoderOutput(Output):
    """last_hidden_state: (B, S, d_model)."""

    last_hidden_state: Tensor


class LDMBertModel(Model):
    """A bidirectional pre-norm transformer over token ids, with learned positions.

    Args:
        d_model: width of the tokens, the UNet's `cross_attention_dim`.
        encoder_attention_heads, head_dim: their product need not be d_model. head_dim is a multiple of 8.
        dropout: on the embeddings and on what each sublayer adds; activation_dropout: inside the
            feed-forward.
    """

    weights_name: ClassVar[str] = "model.safetensors"
    pickled_weights_name: ClassVar[str] = "pytorch_model.bin"
    # The peer reads none of these in its forward pass, or (attention_dropout) ours has no place for it.
    peer_defaults: ClassVar[dict[str, Any]] = {
        "encoder_layerdrop": 0.0,
        "attention_dropout": 0.0,
        "activation_function": "gelu",
        "classifier_dropout": 0.0,
        "scale_embedding": False,
        "use_cache": True,
    }
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset(
        {"architectures", "dtype", "model_type", "num_hidden_layers", "torch_dtype", "transformers_version"}
    )

    @configurable
    def __init__(
        self,
        vocab_size: int = 30522,
        max_position_embeddings: int = 77,
        encoder_layers: int = 32,
        encoder_ffn_dim: int = 5120,
        encoder_attention_heads: int = 8,
        head_dim: int = 64,
        d_model: int = 1280,
        dropout: float = 0.1,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        pad_token_id: int = 0,
    ) -> None:
        super().__init__()
        if head_dim % 8:
            raise ConfigError(f"head_dim={head_dim}: use a multiple of 8")
        self.model = _Encoder(self.config)
        self.to_logits = nn.Linear(d_model, vocab_size)
        self.apply(self._init_weights)
        # The peer's folders hold this layer, but no output needs it: training must not wait for its gradient.
        self.to_logits.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _exported_config(self) -> dict[str, Any]:
        # What transformers needs to recognise the folder.
        return {**super()._exported_config(), "model_type": "ldmbert", "architectures": ["LDMBertModel"]}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> TextEncoderOutput | tuple[Tensor]:
        """Encode tokens.

        Args:
            input_ids: int64 (B, S), S at most `max_position_embeddings`.
            attention_mask: (B, S), nonzero where a token takes part; None = everywhere, padding included, as
                latent diffusion was trained.
            position_ids: int64 (1 or B, S); None = 0, 1, ...

        Raises:
            InputError: for more tokens than there are positions.
        """
        length, limit = input_ids.shape[-1], self.config.max_position_embeddings
        if length > limit:
            raise InputError(f"{length} tokens, but the text encoder has {limit} positions; cut the caption")
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        hidden = self.model(input_ids, position_ids, mask)
        return TextEncoderOutput(hidden) if return_dict else (hidden,)


class _Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        hidden = F.dropout(hidden, self.dropout, self.training)
        for layer in self.layers:
            hidden = checkpointing.run(layer, hidden, mask, enabled=self.gradient_checkpointing)
        return self.layer_norm(hidden)


class _Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.self_attn = _SelfAttention(config.d_model, config.encoder_attention_heads, config.head_dim)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        # The norm before the feed-forward, under the name the checkpoints give it.
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        attended = self.self_attn(self.self_attn_layer_norm(hidden), mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        inner = F.gelu(self.fc1(self.final_layer_norm(hidden)))
        inner = self.fc2(F.dropout(inner, self.activation_dropout, self.training))
        hidden = hidden + F.dropout(inner, self.dropout, self.training)
        if hidden.dtype == torch.float16:
            # The residual stream of the 1.4B model can leave the range of half floats.
            limit = torch.finfo(torch.float16).max - 1000
            hidden = hidden.clamp(-limit, limit)
        return hidden


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = ops.attention(q, k, v, mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
