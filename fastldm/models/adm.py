"""ADM, the UNet of "Diffusion models beat GANs" (Dhariwal & Nichol 2021), as in OpenAI's guided-diffusion.

Parameters have the names and shapes of OpenAI's files, which load as they are:

    time_embed.{0, 2}, label_emb, input_blocks.i.j, middle_block.j, output_blocks.i.j, out.{0, 2}
    a residual block: in_layers.{0, 2}, emb_layers.1, out_layers.{0, 3}, skip_connection
    attention: norm, qkv, proj_out, and in GLIDE encoder_kv
    between resolutions: one of the two above, or op (down) and conv (up)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import ConfigError, InputError
from fastldm.models import weights
from fastldm.models.adm_blocks import GROUPS, Blocks, Stage, zeroed
from fastldm.models.base import Model, configurable
from fastldm.models.unet import UNet2DConditionOutput
from fastldm.nn import GroupNorm, timestep_embedding

M = TypeVar("M", bound="ADMNetwork")


class ADMNetwork(Model):
    """What ADM's UNet, its classifier and GLIDE share: the time embedding, the way down, the way up.

    A subclass calls `_build_encoder` and, if it has a way up, `_build_decoder` from its `__init__`.
    """

    # `enable_gradient_checkpointing` and `torch_dtype` stand for the latter two.
    peer_defaults: ClassVar[dict[str, Any]] = {"dims": 2, "use_checkpoint": False, "use_fp16": False}

    @classmethod
    def from_openai(
        cls: type[M], path: str | os.PathLike, *, torch_dtype: torch.dtype | None = None, **config: Any
    ) -> M:
        """A model, in evaluation mode, on the CPU, from one of OpenAI's files.

        Args:
            path: a pickled state_dict (.pt), or .safetensors.
            torch_dtype: of the parameters; None = float32 whatever is stored.
            config: the fields of this class. `fastldm.models.adm_configs` has them for the published files:
                the weights show neither the heads nor the order of `qkv`.

        Raises:
            CheckpointError: the file cannot be read, or its weights are not those of such a model.
            ConfigError: for fields that do not fit together.
        """
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        with weights.SkipInit():
            model = cls.from_config(config)
        model.load_checked(weights.read_state_dict(Path(path), dtype), source=path)
        return model.to(dtype).eval()

    def _make_blocks(self, *, new_order: bool = False, encoder_channels: int | None = None) -> Blocks:
        config = self.config
        return Blocks(
            emb_channels=4 * config.model_channels,
            dropout=config.dropout,
            use_scale_shift_norm=config.use_scale_shift_norm,
            resblock_updown=config.resblock_updown,
            conv_resample=config.conv_resample,
            num_head_channels=config.num_head_channels,
            use_new_attention_order=new_order,
            encoder_channels=encoder_channels,
        )

    def _build_encoder(self, blocks: Blocks, in_channels: int) -> list[int]:
        """`time_embed`, `input_blocks` and `middle_block`; returns the width of each input block's output."""
        config, heads = self.config, self.config.num_heads
        widths, with_attention = self._levels()
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, blocks.emb_channels),
            nn.SiLU(),
            nn.Linear(blocks.emb_channels, blocks.emb_channels),
        )
        skips = [widths[0]]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, widths[0], 3, padding=1))])
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers = [blocks.res(skips[-1], width)]
                if level in with_attention:
                    layers.append(blocks.attention(width, heads))
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(blocks.down(width)))
                skips.append(width)
        width = widths[-1]
        self.middle_block = Stage(
            blocks.res(width, width), blocks.attention(width, heads), blocks.res(width, width)
        )
        return skips

    def _build_decoder(self, blocks: Blocks, skips: list[int], out_channels: int) -> None:
        """`output_blocks`, each with one skip connection joined to its input, and `out`."""
        config = self.config
        widths, with_attention = self._levels()
        heads = config.num_heads if config.num_heads_upsample == -1 else config.num_heads_upsample
        self.output_blocks = nn.ModuleList()
        below = widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            for i in range(config.num_res_blocks + 1):
                layers = [blocks.res(below + skips.pop(), width)]
                if level in with_attention:
                    layers.append(blocks.attention(width, heads))
                if level and i == config.num_res_blocks:
                    layers.append(blocks.up(width))
                self.output_blocks.append(Stage(*layers))
                below = width
        self.out = nn.Sequential(
            GroupNorm(GROUPS, widths[0], activation="silu"),
            nn.Identity(),
            zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1)),
        )

    def _levels(self) -> tuple[list[int], set[int]]:
        """The width of each level, and the levels with attention."""
        config = self.config
        widths = [int(factor * config.model_channels) for factor in config.channel_mult]
        if not widths or any(width < 1 or width % GROUPS for width in widths):
            raise ConfigError(
                f"model_channels={config.model_channels} times channel_mult={tuple(config.channel_mult)} "
                f"gives the widths {widths}; each must be a multiple of {GROUPS}"
            )
        for name in ("in_channels", "out_channels", "num_res_blocks"):
            if config[name] < 1:
                raise ConfigError(f"{name}={config[name]}: use 1 or more")
        if not 0 <= config.dropout <= 1:
            raise ConfigError(f"dropout={config.dropout}: use a probability, 0 to 1")
        factor = self._size_factor()
        if config.image_size < 1 or config.image_size % factor:
            raise ConfigError(
                f"image_size={config.image_size} cannot be halved for {len(widths)} levels; use a multiple "
                f"of {factor}"
            )
        sizes = [config.image_size >> level for level in range(len(widths))]
        unknown = sorted(set(config.attention_resolutions) - set(sizes))
        if unknown:
            raise ConfigError(
                f"attention_resolutions {unknown} are no resolutions of this network, which has {sizes}; "
                "give sides in pixels, as on guided-diffusion's command line"
            )
        return widths, {sizes.index(size) for size in config.attention_resolutions}

    def _size_factor(self) -> int:
        """What height and width are multiples of: the last level's are so much smaller."""
        return 2 ** (len(self.config.channel_mult) - 1)

    def _check_sample(self, sample: Tensor) -> None:
        channels, factor = self.config.in_channels, self._size_factor()
        if (
            sample.ndim != 4
            or sample.shape[1] != channels
            or any(side < 1 or side % factor for side in sample.shape[2:])
        ):
            raise InputError(
                f"sample {tuple(sample.shape)}: give (B, {channels}, H, W) with H and W multiples of {factor}"
            )

    def _embed_time(self, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """(B, 4 * model_channels), in the dtype of the sample."""
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timesteps) not in (1, len(sample)):
            raise InputError(
                f"{len(timesteps)} timesteps for {len(sample)} pictures; give one, or one for each"
            )
        features = timestep_embedding(
            timesteps.expand(len(sample)), self.config.model_channels, flip_sin_to_cos=True, freq_shift=0
        )
        return self.time_embed(features.to(sample.dtype))

    def _encode(self, hidden: Tensor, emb: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """The output of every input block."""
        skips = []
        for block in self.input_blocks:
            hidden = block(hidden, emb, context)
            skips.append(hidden)
        return skips

    def _walk(self, hidden: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """All the way down and up: (B, C, H, W) to (B, out_channels, H, W)."""
        skips = self._encode(hidden, emb, context)
        hidden = self.middle_block(skips[-1], emb, context)
        for block in self.output_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), emb, context)
        return self.out(hidden)


class ADMUNet(ADMNetwork):
    """The UNet of ADM over pictures or latents, conditioned on a timestep and optionally on a class.

    Fields have the names, and the defaults, of guided-diffusion's networks and command line.

    Args:
        image_size: side of the pictures it is for, which says where `attention_resolutions` are; any height
            and width that can be halved often enough can be given.
        model_channels: base width, `--num_channels` on the command line. Each width is a multiple of 32.
        out_channels: of the prediction; `learn_sigma` doubles them for the learned variance (Nichol &
            Dhariwal 2021).
        num_res_blocks: residual blocks per level; going up there is one more.
        attention_resolutions: sides, in pixels, of the feature maps with attention. The middle has it always.
        channel_mult: width of each level over `model_channels`.
        conv_resample: convolutions between levels, where `resblock_updown` does not put residual blocks.
        num_classes: how many classes there are; None for a model without.
        num_heads, num_heads_upsample: heads of each attention, on the way down and up (-1 = as down).
        num_head_channels: channels per head instead; -1 = go by the number of heads.
        use_scale_shift_norm: adaptive group norm, see `fastldm.models.adm_blocks.ResBlock`.
        use_new_attention_order: how `qkv` is laid out, see `AttentionBlock`: weights made with one order
            load with the other, and compute something else.

    Raises:
        ConfigError: for fields that do not fit together.
    """

    @configurable
    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 3,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = 4,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        blocks = self._make_blocks(new_order=use_new_attention_order)
        skips = self._build_encoder(blocks, self._input_channels())
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * model_channels)
        self._build_decoder(blocks, skips, 2 * out_channels if learn_sigma else out_channels)

    def _input_channels(self) -> int:
        """Channels of what the first convolution sees."""
        return self.config.in_channels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from a noisy `sample` (B, in_channels, H, W).

        Args:
            timestep: a number, or a tensor of one or B of them; fractions are fine.
            class_labels: int64 (B,), needed if and only if there are classes.
            return_dict: False returns a tuple of one tensor.

        Raises:
            InputError: for a size that cannot be halved often enough, and for labels that are missing, not
                wanted, of another shape or (seen on the CPU) of no class.
        """
        self._check_sample(sample)
        return self._predict(sample, sample, timestep, class_labels, return_dict)

    def _predict(
        self,
        sample: Tensor,
        hidden: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        return_dict: bool,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """From a checked sample, and `hidden`, that with whatever else the first convolution sees."""
        emb = self._embed_time(timestep, sample)
        classes = self.config.num_classes
        if (class_labels is None) != (classes is None):
            told = "missing: this model has" if class_labels is None else "given, but this model has no"
            raise InputError(f"class_labels are {told} classes")
        if class_labels is not None:
            if class_labels.shape != sample.shape[:1]:
                raise InputError(
                    f"class_labels {tuple(class_labels.shape)} for {len(sample)} pictures; give one for each"
                )
            check_ids("class_labels", class_labels, classes)
            emb = emb + self.label_emb(class_labels)
        output = self._walk(hidden, emb)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class ADMSuperRes(ADMUNet):
    """ADM's upsampler: an `ADMUNet` that sees a small picture beside the noisy large one.

    Fields are those of `ADMUNet`; `in_channels` counts the channels of one of the two pictures.
    """

    def _input_channels(self) -> int:
        return 2 * self.config.in_channels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        low_res: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from a noisy `sample` (B, in_channels, H, W) and `low_res` (B, in_channels, h, w).

        `low_res` is resized bilinearly to H and W. The rest, and what is refused, is as in `ADMUNet`.
        """
        self._check_sample(sample)
        hidden = joined([sample, resized(low_res, sample)], like=sample)
        return self._predict(sample, hidden, timestep, class_labels, return_dict)


def resized(low_res: Tensor | None, sample: Tensor) -> Tensor:
    """The small picture at the size of the large one; `InputError` if there is none for each."""
    if low_res is None:
        raise InputError("low_res is missing: this model enlarges a picture")
    if low_res.ndim != 4 or low_res.shape[:2] != sample.shape[:2] or 0 in low_res.shape[2:]:
        raise InputError(
            f"low_res {tuple(low_res.shape)} for a sample {tuple(sample.shape)}; give one of the same batch "
            "and channels, of any height and width from 1"
        )
    return F.interpolate(low_res, sample.shape[2:], mode="bilinear", align_corners=False)


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """One after the other along the channels, in the memory format of `like`.

    `torch.cat` alone forgets channels-last at a part that is not, or is empty.
    """
    plain = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if plain else torch.channels_last
    return torch.cat(list(parts), dim=1).contiguous(memory_format=layout)


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """`InputError` unless the ids are int64 or int32, and all of them in 0..count-1.

    The latter is seen on the CPU outside torch.compile only: on a GPU each step would wait for it.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name} are {ids.dtype}; give int64")
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise InputError(f"{name} has values from {low} to {high}; accepted are 0 to {count - 1}")
