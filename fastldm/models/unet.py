"""The UNet that predicts noise from a noisy latent, a timestep and a condition (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from fastldm.errors import ConfigError, InputError
from fastldm.models.base import Model, configurable
from fastldm.models.outputs import Output
from fastldm.models.unet_blocks import (
    DOWN_BLOCKS,
    MID_BLOCKS,
    UP_BLOCKS,
    AttentionSettings,
    Condition,
    DownBlock2D,
    MidBlock2D,
    ResnetSettings,
    UpBlock2D,
)
from fastldm.nn import Downsample2D, GroupNorm, TimestepEmbedding, Timesteps, Upsample2D


@dataclass
class UNet2DConditionOutput(Output):
    """`sample` (B, out_channels, H, W): the model's prediction."""

    sample: torch.Tensor


class UNet2DConditionModel(Model):
    """A UNet over latents, conditioned on a timestep and optionally on a context, a class or a size.

    Fields and parameters have the names and meaning of those in diffusers' class of this name, so that the
    UNets of latent diffusion, Stable Diffusion 1 and 2 and SDXL load as they are. Fields that can be given
    once or per stage are marked (*).

    Args:
        sample_size: height and width of the latents it is for; kept for pipelines, any size can be given.
        center_input_sample: map the input from [0, 1] to [-1, 1] first.
        flip_sin_to_cos, freq_shift: of the timestep features, see `fastldm.nn.timestep_embedding`.
        down_block_types, up_block_types: "DownBlock2D", "AttnDownBlock2D" (self-attention),
            "CrossAttnDownBlock2D" (transformer with context), and the same with "Up".
        mid_block_type: "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" or None.
        only_cross_attention: (*) the transformers' first attention sees the context as well.
        layers_per_block: (*) residual blocks per stage; going up there is one more.
        downsample_padding: 0 pads bottom and right only, see `fastldm.nn.Downsample2D`.
        mid_block_scale_factor: residual blocks in the middle divide by it.
        act_fn: "silu" (also called "swish").
        cross_attention_dim: (*) width of the context.
        transformer_layers_per_block: (*) transformer blocks per residual block, per stage a number or a list.
        reverse_transformer_layers_per_block: the same going up, when it is not simply reversed.
        attention_head_dim: (*) the number of heads in transformers, channels per head in "Attn..." stages.
        class_embed_type: how class labels join the time embedding: None (a table of `num_class_embeds`, if
            given), "timestep", "identity", "projection" or "simple_projection".
        addition_embed_type: None or "text_time" (SDXL: pooled text and sizes join the time embedding).
        upcast_attention: accepted and without effect, since `fastldm.ops.attention` accumulates in float32.
        resnet_time_scale_shift: "default" or "scale_shift".
        time_cond_proj_dim: width of an optional second input of the time embedding.
        class_embeddings_concat: concatenate the class embedding to the time embedding instead of adding it.

    Raises `ConfigError` for fields that do not fit together and for the peer's that are not supported.
    """

    peer_defaults: ClassVar[Mapping[str, Any]] = {
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "attention_type": "default",
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    }

    @configurable
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1.0,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: int | Sequence[int | Sequence[int]] = 1,
        reverse_transformer_layers_per_block: Sequence[int | Sequence[int]] | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        time_embedding_dim: int | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        class_embeddings_concat: bool = False,
    ):
        super().__init__()
        _check_choice("act_fn", act_fn, ("silu", "swish"))
        _check_choice("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        self.center_input_sample = center_input_sample
        self.class_embed_type = class_embed_type
        self.class_embeddings_concat = class_embeddings_concat
        self.addition_embed_type = addition_embed_type

        width = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, width, conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        for field in ("attention_head_dim", "time_embedding_dim"):
            _check_positive(field, self.config[field])
        time_embed_dim = 4 * width if time_embedding_dim is None else time_embedding_dim
        self.time_proj = Timesteps(width, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(width, time_embed_dim, cond_proj_dim=time_cond_proj_dim)
        self.class_embedding = _class_embedding(
            class_embed_type, num_class_embeds, projection_class_embeddings_input_dim, width, time_embed_dim
        )
        self.add_embedding = None
        _check_choice("addition_embed_type", addition_embed_type, (None, "text_time"))
        if addition_embed_type == "text_time":
            if addition_time_embed_dim is None or projection_class_embeddings_input_dim is None:
                raise ConfigError(
                    "addition_embed_type 'text_time' needs addition_time_embed_dim and "
                    "projection_class_embeddings_input_dim"
                )
            self.add_time_proj = Timesteps(addition_time_embed_dim, flip_sin_to_cos, freq_shift)
            self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, time_embed_dim)

        self._build_stages(2 * time_embed_dim if class_embeddings_concat else time_embed_dim)

        self.conv_norm_out = GroupNorm(norm_num_groups, width, eps=norm_eps, activation="silu")
        self.conv_out = nn.Conv2d(width, out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2)

    def _build_stages(self, temb_channels: int) -> None:
        """`down_blocks`, `mid_block` and `up_blocks` of `self.config`."""
        config = self.config
        widths = list(config.block_out_channels)
        count = len(widths)
        down_kinds = _kinds("down_block_types", config.down_block_types, DOWN_BLOCKS, count)
        up_kinds = _kinds("up_block_types", config.up_block_types, UP_BLOCKS, count)
        (mid_kind,) = _kinds("mid_block_type", [config.mid_block_type], MID_BLOCKS, 1)
        self.has_cross_attention = "cross" in (*down_kinds, mid_kind, *up_kinds)

        depths = _per_stage("layers_per_block", config.layers_per_block, count)
        head_dims = _per_stage("attention_head_dim", config.attention_head_dim, count)
        context_dims = _per_stage("cross_attention_dim", config.cross_attention_dim, count)
        only_cross = _per_stage("only_cross_attention", config.only_cross_attention, count)
        down_layers = _per_stage("transformer_layers_per_block", config.transformer_layers_per_block, count)
        up_layers = config.reverse_transformer_layers_per_block
        if up_layers is None:
            if not all(isinstance(layers, int) for layers in down_layers):
                raise ConfigError(
                    "transformer_layers_per_block holds lists; give reverse_transformer_layers_per_block too"
                )
            up_layers = down_layers[::-1]
        up_layers = _per_stage("reverse_transformer_layers_per_block", up_layers, count)

        groups = config.norm_num_groups
        for width in widths:
            if width % groups:
                raise ConfigError(f"norm_num_groups {groups} does not divide {width} of block_out_channels")
        resnet = ResnetSettings(
            temb_channels=temb_channels,
            groups=groups,
            eps=config.norm_eps,
            dropout=config.dropout,
            time_embedding_norm=config.resnet_time_scale_shift,
        )
        attention = [
            AttentionSettings(
                head_dim=widths[i] if head_dims[i] is None else head_dims[i],
                groups=groups,
                eps=config.norm_eps,
                cross_attention_dim=context_dims[i],
                use_linear_projection=config.use_linear_projection,
                only_cross_attention=only_cross[i],
            )
            for i in range(count)
        ]

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]
        for i, kind in enumerate(down_kinds):
            width, depth = widths[i], depths[i]
            resnets = [resnet.build(width if j else skip_widths[-1], width) for j in range(depth)]
            attentions = attention[i].build(kind, width, _expand(down_layers[i], depth))
            skip_widths += [width] * depth
            downsampler = None
            if i < count - 1:
                downsampler = Downsample2D(width, padding=config.downsample_padding)
                skip_widths.append(width)
            self.down_blocks.append(DownBlock2D(resnets, attentions, downsampler))

        self.mid_block = None
        if config.mid_block_type is not None:
            # diffusers passes only_cross_attention to the other stages alone
            middle = replace(attention[-1], only_cross_attention=False)
            attentions = middle.build(mid_kind, widths[-1], _expand(down_layers[-1], 1))
            scale = config.mid_block_scale_factor
            resnets = [resnet.build(widths[-1], widths[-1], scale) for _ in range(2 if attentions else 1)]
            self.mid_block = MidBlock2D(resnets, attentions)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, kind in enumerate(up_kinds):
            stage = count - 1 - i
            width, depth = widths[stage], depths[stage] + 1
            resnets = [resnet.build((width if j else below) + skip_widths.pop(), width) for j in range(depth)]
            settings = attention[stage]
            if kind == "self":  # diffusers does not reverse attention_head_dim for these
                settings = replace(settings, head_dim=width if head_dims[i] is None else head_dims[i])
            attentions = settings.build(kind, width, _expand(up_layers[i], depth))
            self.up_blocks.append(UpBlock2D(resnets, attentions, Upsample2D(width) if stage else None))
            below = width

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict from a noisy `sample` (B, in_channels, H, W), any H and W.

        Args:
            timestep: a number, or a tensor of one or B of them.
            encoder_hidden_states: context (B, S, cross_attention_dim); needed if any stage cross-attends.
            class_labels: (B,), or (B, D) for the projecting `class_embed_type`s; needed if there is one.
            timestep_cond: (B, time_cond_proj_dim), added to the timestep features.
            attention_mask: (B, H * W) for the self-attention in transformers, nonzero for positions to attend
                to; usable only where these are all at one resolution.
            cross_attention_kwargs: for callers of diffusers; None or empty.
            added_cond_kwargs: for "text_time", `text_embeds` (B, D) and `time_ids` (B, n).
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's, one for each skip
                connection and one for the middle; both or neither.
            down_intrablock_additional_residuals: for callers of diffusers; None (T2I-Adapters are not
                supported).
            encoder_attention_mask: (B, S), nonzero for context tokens to attend to; a row without any gets 0
                from the attention.
            return_dict: False returns a tuple of one tensor.

        Raises `InputError` for conditions that are missing or not supported.
        """
        if cross_attention_kwargs:
            raise InputError(
                f"cross_attention_kwargs {sorted(cross_attention_kwargs)} are not supported; pass none"
            )
        if down_intrablock_additional_residuals is not None:
            raise InputError(
                "down_intrablock_additional_residuals (of a T2I-Adapter) are not supported; pass None"
            )
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise InputError(
                "down_block_additional_residuals and mid_block_additional_residual go together; give both"
            )
        if self.has_cross_attention and encoder_hidden_states is None:
            raise InputError("encoder_hidden_states is missing: this UNet has cross-attention")
        if self.center_input_sample:
            sample = 2 * sample - 1.0

        condition = Condition(
            temb=self._embed(sample, timestep, timestep_cond, class_labels, added_cond_kwargs),
            context=encoder_hidden_states,
            attention_mask=_key_mask("attention_mask", attention_mask),
            context_mask=_key_mask("encoder_attention_mask", encoder_attention_mask),
        )
        hidden = self.conv_in(sample)
        skips = [hidden]
        for down_block in self.down_blocks:
            skips += down_block(skips[-1], condition)
        hidden = skips[-1]
        if down_block_additional_residuals is not None:
            if len(down_block_additional_residuals) != len(skips):
                raise InputError(
                    f"down_block_additional_residuals has {len(down_block_additional_residuals)} tensors; "
                    f"this UNet has {len(skips)} skip connections"
                )
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals)]
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, condition)
        if mid_block_additional_residual is not None:
            hidden = hidden + mid_block_additional_residual
        for up_block in self.up_blocks:
            hidden = up_block(hidden, skips, condition)
        output = self.conv_out(self.conv_norm_out(hidden))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        timestep_cond: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The time embedding (B, temb_channels) with whatever joins it."""
        batch, dtype = sample.shape[0], sample.dtype
        if isinstance(timestep, torch.Tensor):
            timesteps = timestep.to(sample.device).reshape(-1).expand(batch)
        else:
            timesteps = torch.full((batch,), timestep, dtype=torch.float32, device=sample.device)
        embedding = self.time_embedding(self.time_proj(timesteps).to(dtype), timestep_cond)

        if self.class_embedding is not None:
            if class_labels is None:
                raise InputError("class_labels is missing: this UNet is conditioned on classes")
            if self.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)
            classes = self.class_embedding(class_labels).to(dtype)
            if self.class_embeddings_concat:
                embedding = torch.cat([embedding, classes], dim=-1)
            else:
                embedding = embedding + classes

        if self.add_embedding is not None:
            given = added_cond_kwargs or {}
            if "text_embeds" not in given or "time_ids" not in given:
                raise InputError(
                    f"added_cond_kwargs needs text_embeds and time_ids for this UNet; it has {sorted(given)}"
                )
            sizes = self.add_time_proj(given["time_ids"].flatten()).reshape(batch, -1)
            added = torch.cat([given["text_embeds"], sizes.to(given["text_embeds"].dtype)], dim=-1)
            embedding = embedding + self.add_embedding(added.to(embedding.dtype))
        return embedding


def _class_embedding(
    kind: str | None, num_classes: int | None, input_dim: int | None, timestep_dim: int, time_embed_dim: int
) -> nn.Module | None:
    _check_choice("class_embed_type", kind, (None, "timestep", "identity", "projection", "simple_projection"))
    if kind in ("projection", "simple_projection") and input_dim is None:
        raise ConfigError(f"class_embed_type {kind!r} needs projection_class_embeddings_input_dim")
    if kind == "timestep":
        return TimestepEmbedding(timestep_dim, time_embed_dim)
    if kind == "identity":
        return nn.Identity()
    if kind == "projection":
        return TimestepEmbedding(input_dim, time_embed_dim)
    if kind == "simple_projection":
        return nn.Linear(input_dim, time_embed_dim)
    return None if num_classes is None else nn.Embedding(num_classes, time_embed_dim)


def _check_choice(field: str, value: str | None, choices: Iterable[str | None]) -> None:
    if value not in choices:
        raise ConfigError(f"{field} is {value!r}; accepted are {', '.join(map(repr, choices))}")


def _check_positive(field: str, value: int | Sequence[int] | None) -> None:
    """ConfigError for a number below 1, given once or among those of the stages; None is left to defaults."""
    given = value if isinstance(value, Sequence) else [value]
    if any(number is not None and number < 1 for number in given):
        raise ConfigError(f"{field} is {value!r}; use whole numbers from 1")


def _kinds(
    field: str, names: Sequence[str | None], kinds: Mapping[str | None, str | None], count: int
) -> list[str | None]:
    """The kinds of attention of the named stages."""
    for name in names:
        _check_choice(field, name, kinds)
    return [kinds[name] for name in _per_stage(field, list(names), count)]


def _per_stage(field: str, value: Any, count: int) -> list[Any]:
    """A field given once, or once per stage, as a list of one value per stage."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ConfigError(
            f"{field} has {len(value)} values and block_out_channels {count}; give one per stage"
        )
    return list(value)


def _expand(layers: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The number of transformer blocks after each of `count` residual blocks of one stage."""
    if isinstance(layers, int):
        return (layers,) * count
    if len(layers) < count:
        raise ConfigError(
            f"transformer layers {list(layers)} are given for {count} residual blocks of a stage"
        )
    return tuple(layers[:count])


def _key_mask(name: str, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A (B, S) mask of zeros and ones as bool."""
    if mask is not None and mask.ndim != 2:
        raise InputError(
            f"{name} has shape {tuple(mask.shape)}; give (batch, tokens), nonzero for tokens to keep"
        )
    return None if mask is None else mask.bool()
