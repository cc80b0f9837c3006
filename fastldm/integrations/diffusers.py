"""Rules for diffusers: residual blocks, attention processors, the vector quantiser."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastldm import ops
from fastldm.integrations.rules import Match
from fastldm.integrations.sdpa import calls_sdpa, redirected, redirected_forward
from fastldm.integrations.swapping import original_class
from fastldm.integrations.torch_nn import is_norm, is_silu, norm, takes


def _resnet_block(module: nn.Module) -> Match | None:
    if original_class(module) is not ResnetBlock2D:
        return None
    if original_class(module.norm1) is not nn.GroupNorm or original_class(module.norm2) is not nn.GroupNorm:
        return Match("group_norm", skipped="its norms are not nn.GroupNorm")
    if type(module.nonlinearity) is not nn.SiLU:
        return Match(
            "group_norm", skipped=f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
        )
    folded = {"default": ", channel bias", "scale_shift": ", scale, shift"}
    folded = "" if module.time_emb_proj is None else folded.get(module.time_embedding_norm, "")
    now = f"group norm + SiLU; group norm + SiLU{folded}"
    return Match("group_norm", now, _resnet_block_members, covers=("norm1", "norm2"))


def _resnet_block_members(base: type, backend: str) -> dict:
    def forward(self, input_tensor, temb=None, *args, **kwargs):
        fits = is_norm(self.norm1) and is_norm(self.norm2) and is_silu(self.nonlinearity)
        if not fits or args or kwargs or not takes(input_tensor) or not _embeds(self, temb):
            return base.forward(self, input_tensor, temb, *args, **kwargs)

        hidden = norm(self.norm1, input_tensor, backend, activation="silu")
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and hidden.shape[0] >= 64:  # as the original has it
                input_tensor, hidden = input_tensor.contiguous(), hidden.contiguous()
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)

        if self.time_emb_proj is None:
            options = {}
        else:
            embedding = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = embedding.chunk(2, dim=1)
                options = {"scale": scale, "shift": shift}
            else:
                options = {"channel_bias": embedding}
        hidden = norm(self.norm2, hidden, backend, activation="silu", **options)
        hidden = self.conv2(self.dropout(hidden))

        if self.conv_shortcut is not None:
            if self.training:  # as the original has it, for the strides of the gradients
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + hidden) / self.output_scale_factor

    return {"forward": forward}


def _embeds(block: ResnetBlock2D, temb: torch.Tensor | None) -> bool:
    """Whether `temb` is what the block was built for: (N, temb_channels), or nothing."""
    if block.time_emb_proj is None:
        return temb is None and block.time_embedding_norm != "scale_shift"
    return block.time_embedding_norm in ("default", "scale_shift") and temb is not None and temb.dim() == 2


def _processor(module: nn.Module) -> Match | None:
    """The attention processor of a module that has one."""
    processor = getattr(module, "processor", None)
    if processor is None or not hasattr(module, "set_processor"):
        return None
    kind = original_class(processor)
    return Match(
        "attention",
        "fused attention",
        _processor_members,
        attribute="processor",
        skipped=_why_not(processor, kind),
    )


def _why_not(processor: object, kind: type) -> str | None:
    if isinstance(processor, nn.Module):
        return "it has weights of its own"
    if kind.__module__.partition(".")[0] != "diffusers":
        return "it is not one of diffusers'"
    if not calls_sdpa(vars(kind).get("__call__")):
        return "it does not call scaled_dot_product_attention"
    chosen = getattr(processor, "_attention_backend", None)
    if chosen is not None:
        return f"its attention backend was set to {getattr(chosen, 'value', chosen)}"
    return None


def _processor_members(base: type, backend: str) -> dict:
    return {"__call__": redirected(base.__call__, backend)}


def _calls_attention(module: nn.Module) -> Match | None:
    """Modules of diffusers that call PyTorch's attention themselves."""
    kind = original_class(module)
    if kind.__module__.partition(".")[0] != "diffusers" or not calls_sdpa(vars(kind).get("forward")):
        return None
    return Match("attention", "fused attention", redirected_forward)


def _vector_quantizer(module: nn.Module) -> Match | None:
    if original_class(module) is not VectorQuantizer:
        return None
    return Match("vq_nearest", "nearest code without the array of distances", _vector_quantizer_members)


def _vector_quantizer_members(base: type, backend: str) -> dict:
    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).contiguous()
        indices = ops.vq_nearest(rows, self.embedding.weight, backend=backend)
        codes = self.embedding(indices)
        to_codes, to_rows = (codes - rows.detach()).square().mean(), (codes.detach() - rows).square().mean()
        # `legacy` has beta on the term of the codebook, as the checkpoints were trained.
        loss = to_rows + self.beta * to_codes if self.legacy else self.beta * to_rows + to_codes
        quantized = (rows + (codes - rows).detach()).permute(0, 3, 1, 2).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten() if self.remap is None else indices.reshape(-1, 1)
        return quantized, loss, (None, None, indices)

    return {"forward": forward}


RULES = (_resnet_block, _processor, _vector_quantizer, _calls_attention)
