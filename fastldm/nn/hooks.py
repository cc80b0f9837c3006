"""Whether calling a module does more than its class says."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def only_computes(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hooks, no other forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
