"""Gradient checkpointing: recompute a layer in the backward pass instead of keeping its activations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(module: nn.Module, *args: torch.Tensor | None, enabled: bool) -> torch.Tensor:
    """`module(*args)`, checkpointed where `enabled` and gradients are being recorded.

    A module that calls this has an attribute `gradient_checkpointing`, False at first, and passes it as
    `enabled`; `Model.enable_gradient_checkpointing` sets it on every such module.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)
