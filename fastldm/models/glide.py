"""GLIDE's networks (Nichol et al. 2022): ADM told a text by a transformer trained with it.

The text reaches the UNet twice: the transformer's last token joins the time embedding, and all its tokens
stand before the places of the feature map in every attention. Parameters are those of ADM and

    token_embedding, positional_embedding, padding_embedding, final_ln, transformer_proj
    transformer.resblocks.i.{ln_1, attn.c_qkv, attn.c_proj, ln_2, mlp.c_fc, mlp.c_proj}

as in OpenAI's glide-text2im, whose files load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError, InputError
from fastldm.models.adm import ADMNetwork, check_ids, joined, resized
from fastldm.models.adm_blocks import Stage, split_heads
from fastldm.models.base import configurable
from fastldm.models.outputs import Output
from fastldm.models.unet import UNet2DConditionOutput
from fastldm.models.weights import SkipInit
from fastldm.nn import checkpointing
from fastldm.ops.attention import HEAD_DIMS


@dataclass
class GlideTextOutput(Output):
    """xf_proj: (B, 4 * model_channels), joins the time embedding; xf_out: (B, text_ctx, xf_width)."""

    xf_proj: Tensor
    xf_out: Tensor


class GlideUNet(ADMNetwork):
    """GLIDE's UNet: the base network, the upsampler, and both for inpainting.

    Fields have the names and defaults of glide-text2im's base network; those not listed are as in `ADMUNet`.

    Args:
        in_channels: of the noisy picture; what `super_res` and `inpaint` bring is added to them.
        n_vocab: token ids are smaller than this.
        text_ctx: tokens per text, see `GlideTokenizer`.
        xf_width, xf_layers, xf_heads: of the text transformer.
        xf_final_ln: a layer norm after it.
        xf_padding: tokens outside the mask become learned padding. Without it a network sees no mask.
        super_res: it enlarges a picture, `low_res`.
        inpaint: it sees the known part of the picture, `inpaint_image` where `inpaint_mask` is 1.

    Raises:
        ConfigError: for fields that do not fit together.
    """

    peer_defaults: ClassVar[dict[str, Any]] = {
        **ADMNetwork.peer_defaults,
        # `encode_text` is the cache; no published network predicts its text.
        "cache_text_emb": False,
        "share_unemb": False,
        "xf_ar": 0.0,
    }

    @configurable
    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 192,
        out_channels: int = 3,
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        conv_resample: bool = True,
        num_heads: int = 1,
        num_head_channels: int = 64,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        learn_sigma: bool = True,
        n_vocab: int = 50257,
        text_ctx: int = 128,
        xf_width: int = 512,
        xf_layers: int = 16,
        xf_heads: int = 8,
        xf_final_ln: bool = True,
        xf_padding: bool = True,
        super_res: bool = False,
        inpaint: bool = False,
    ) -> None:
        super().__init__()
        if xf_heads < 1 or xf_width % xf_heads or xf_width // xf_heads not in HEAD_DIMS:
            raise ConfigError(
                f"xf_width={xf_width} and xf_heads={xf_heads}: divide the width into heads of a multiple "
                "of 8 up to 256, or of 512"
            )
        blocks = self._make_blocks(encoder_channels=xf_width)
        extra = in_channels * super_res + (in_channels + 1) * inpaint
        skips = self._build_encoder(blocks, in_channels + extra)
        if inpaint:
            width = self.input_blocks[0][0].out_channels
            self.input_blocks[0] = Stage(_InpaintingConv2d(in_channels, in_channels + extra, width))
        self._build_decoder(blocks, skips, 2 * out_channels if learn_sigma else out_channels)

        self.token_embedding = nn.Embedding(n_vocab, xf_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = _table(text_ctx, xf_width)
        if xf_padding:
            self.padding_embedding = _table(text_ctx, xf_width)
        self.transformer = _Transformer(xf_width, xf_layers, xf_heads)
        self.final_ln = nn.LayerNorm(xf_width) if xf_final_ln else nn.Identity()
        self.transformer_proj = nn.Linear(xf_width, blocks.emb_channels)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> GlideTextOutput:
        """Read texts: once for all steps of sampling, as nothing here depends on the picture.

        Args:
            tokens: int64 (B, text_ctx).
            mask: bool (B, text_ctx), True for tokens of the text; needed if and only if there is
                `xf_padding`. A text without any is the empty one, which guidance compares with.

        Raises:
            InputError: for other shapes, a mask that is missing, not wanted or not bool, and (seen on the
                CPU) tokens outside the vocabulary.
        """
        length = self.config.text_ctx
        if tokens.ndim != 2 or tokens.shape[1] != length:
            raise InputError(f"tokens {tuple(tokens.shape)}: give (B, {length}), as GlideTokenizer does")
        if (mask is None) == self.config.xf_padding:
            told = "missing: this network has" if mask is None else "given, but this network has no"
            raise InputError(f"the mask of the tokens is {told} padding (xf_padding)")
        check_ids("tokens", tokens, self.config.n_vocab)
        hidden = self.token_embedding(tokens) + self.positional_embedding
        if mask is not None:
            if mask.shape != tokens.shape or mask.dtype != torch.bool:
                raise InputError(
                    f"mask {tuple(mask.shape)} of {mask.dtype} for tokens {tuple(tokens.shape)}; give a bool "
                    "for each token, True for those of the text"
                )
            hidden = torch.where(mask[..., None], hidden, self.padding_embedding)
        hidden = self.final_ln(self.transformer(hidden))
        return GlideTextOutput(xf_proj=self.transformer_proj(hidden[:, -1]), xf_out=hidden)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        text: GlideTextOutput | None = None,
        low_res: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from a noisy `sample` (B, in_channels, H, W).

        Args:
            timestep: a number, or a tensor of one or B of them; fractions are fine.
            tokens, mask: the texts, see `encode_text`.
            text: what `encode_text` made of them, in their place.
            low_res: (B, in_channels, h, w), resized bilinearly to H and W; needed with `super_res`.
            inpaint_image, inpaint_mask: the shape of `sample`, and (B, 1, H, W) with 1 or True where the
                picture is known. Both or neither: without them nothing is known.
            return_dict: False returns a tuple of one tensor.

        Raises:
            InputError: for sizes that cannot be halved often enough, for pictures that are missing, of
                another shape, or not wanted by this network, and for texts that do not fit.
        """
        self._check_sample(sample)
        hidden = self._input(sample, low_res, inpaint_image, inpaint_mask)
        if (tokens is None) == (text is None):
            raise InputError("give either tokens and their mask, or text from encode_text")
        if text is None:
            text = self.encode_text(tokens, mask)
        elif mask is not None:
            raise InputError("mask is given with text, which has been read already; pass it to encode_text")
        if len(text.xf_out) != len(sample):
            raise InputError(f"{len(text.xf_out)} texts for {len(sample)} pictures; give one for each")
        emb = self._embed_time(timestep, sample) + text.xf_proj
        output = self._walk(hidden, emb, text.xf_out)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _input(
        self, sample: Tensor, low_res: Tensor | None, image: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """What the first convolution sees: sample, known part and its mask, enlarged picture."""
        parts = [sample]
        if self.config.inpaint:
            if (image is None) != (mask is None):
                raise InputError("inpaint_image and inpaint_mask go together; give both or neither")
            if image is None:
                image, mask = torch.zeros_like(sample), torch.zeros_like(sample[:, :1])
            wanted = (len(sample), 1, *sample.shape[2:])
            if image.shape != sample.shape or mask.shape != wanted:
                raise InputError(
                    f"inpaint_image {tuple(image.shape)} and inpaint_mask {tuple(mask.shape)}: give "
                    f"{tuple(sample.shape)} and {wanted}"
                )
            mask = mask.to(sample.dtype)
            parts += [image * mask, mask]
        elif image is not None or mask is not None:
            raise InputError("this network does not inpaint; make it one with glide_inpainting, or give none")
        if self.config.super_res:
            parts.append(resized(low_res, sample))
        elif low_res is not None:
            raise InputError("low_res is given, but this network enlarges nothing (super_res)")
        return joined(parts, like=sample)


def glide_inpainting(model: GlideUNet) -> GlideUNet:
    """A copy of a trained network to train further for inpainting (Nichol et al. 2022, "Image inpainting").

    It has input channels for the known part and its mask, with weights of zero: whatever these show, its
    output is bit for bit that of `model` until it is trained.

    Raises:
        InputError: `model` is one for inpainting already.
    """
    if model.config.inpaint:
        raise InputError("this network inpaints already; train it further as it is")
    with SkipInit():
        copy = GlideUNet.from_config({**model.config, "inpaint": True})
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    first, own = "input_blocks.0.0.weight", model.config.in_channels
    weight = state[first]
    known = weight.new_zeros(len(weight), own + 1, *weight.shape[2:])
    state[first] = joined([weight[:, :own], known, weight[:, own:]], like=weight)
    copy.load_checked(state, source="the network")
    return copy.train(model.training)


class _InpaintingConv2d(nn.Conv2d):
    """A 3x3 convolution that sums what belongs to the known part of the picture apart from the rest.

    The channels are those of the sample (`own`), of the known part and its mask (`own + 1`), and any more. In
    one sum the order of the additions, and so the rounding, would depend on channels whose weights are 0.
    """

    def __init__(self, own: int, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.own, 2 * self.own + 1
        rest, rest_weight = (joined([y[:, :first], y[:, last:]], like=y) for y in (x, self.weight))
        known = F.conv2d(x[:, first:last], self.weight[:, first:last], padding=1)
        return F.conv2d(rest, rest_weight, self.bias, padding=1) + known


class _Transformer(nn.Module):
    """Pre-norm, over all tokens, padding included."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_TextBlock(width, heads) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.resblocks:
            hidden = checkpointing.run(block, hidden, enabled=self.gradient_checkpointing)
        return hidden


class _TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _TextAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _TextMLP(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden))
        return hidden + self.mlp(self.ln_2(hidden))


class _TextAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Its rows are the queries, keys and values of one head after the other.
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        attended = ops.attention(*split_heads(self.c_qkv(hidden), 3, self.heads))
        return self.c_proj(attended.transpose(1, 2).flatten(2))


class _TextMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(hidden)))


def _table(rows: int, width: int) -> nn.Parameter:
    """One learned vector per position, with the spread of CLIP's."""
    table = nn.Parameter(torch.empty(rows, width))
    nn.init.normal_(table, std=0.01)
    return table
