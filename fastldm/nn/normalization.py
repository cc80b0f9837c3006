"""Group normalisation with what follows it folded in."""

from __future__ import annotations

import torch
from torch import nn

from fastldm import ops


class GroupNorm(nn.GroupNorm):
    """`act(GN(x + channel_bias) * (1 + scale) + shift)` through `fastldm.ops.group_norm`.

    The parameters are those of `torch.nn.GroupNorm`; `activation` is None or "silu".
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
    ):
        super().__init__(num_groups, num_channels, eps=eps, affine=affine)
        self.activation = activation

    def forward(
        self,
        input: torch.Tensor,
        *,
        channel_bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`input` is (N, C, ...); `channel_bias`, `scale`, `shift` are (N, C), broadcast over the rest."""
        return ops.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            channel_bias=channel_bias,
            scale=scale,
            shift=shift,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
