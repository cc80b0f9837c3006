"""Gradient checkpointing: recompute a layer in the backward pass instead of keeping its activations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastldm import dispatch


def run(module: nn.Module, *args: torch.Tensor | None, enabled: bool) -> torch.Tensor:
    """`module(*args)`, checkpointed where `enabled` and gradients are being recorded.

    A module that calls this has an attribute `gradient_checkpointing`, False at first, and passes it as
    `enabled`; `Model.enable_gradient_checkpointing` sets it on every such module.

    The recomputation runs under the backend policy, and for the recorders, of the forward pass. In a compiled
    model it runs under those in force at the backward pass, as nothing but tensors passes there.
    """
    if not (enabled and torch.is_grad_enabled()):
        return module(*args)
    function = module if torch.compiler.is_compiling() else dispatch.keeping_state(module)
    return checkpoint(function, *args, use_reentrant=False)
