"""The Triton kernels of `kernels/` as a backend: on a CUDA device, or anywhere under Triton's interpreter."""

from __future__ import annotations

import importlib.util

import torch

from fastldm.errors import UnsupportedError
from fastldm.implementation import Implementation
from fastldm.kernels.common.support import interpreted

# Module of kernels/, prefix of its functions.
_OPS = {
    "attention": ("attention", ""),
    "group_norm": ("group_norm", ""),
    "vq_nearest": ("vq", "nearest_"),
    "vq_ema_update": ("vq", "ema_update_"),
}


def implementation(op: str) -> Implementation:
    """Raises UnsupportedError where neither a GPU nor the interpreter can run a kernel."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("the package triton is not installed; `pip install triton` (Linux only)")
    if not torch.cuda.is_available() and not interpreted():
        raise UnsupportedError("needs a CUDA GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, as a test")
    name, prefix = _OPS[op]
    try:
        module = importlib.import_module(f"fastldm.kernels.{name}")
    except ImportError as error:
        raise UnsupportedError(f"the Triton kernels cannot be imported: {error}") from error
    parts = ("forward", "backward", "supports", "supports_backward", "slower", "slower_backward")
    found = {part: getattr(module, prefix + part, None) for part in parts}
    return Implementation(**{part: function for part, function in found.items() if function is not None})
