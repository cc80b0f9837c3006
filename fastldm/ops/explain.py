"""Which backend a call would take, and why not each other one."""

from __future__ import annotations

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputError, InputTypeError
from fastldm.ops.attention import prepare as prepare_attention
from fastldm.ops.group_norm import prepare as prepare_group_norm
from fastldm.ops.vq import prepare_ema_update, prepare_nearest

_PREPARE = {
    "attention": ("attention", prepare_attention),
    "group_norm": ("group_norm", prepare_group_norm),
    "vq_nearest": ("vq_nearest", prepare_nearest),
    "vq_quantize": ("vq_nearest", prepare_nearest),
    "vq_ema_update": ("vq_ema_update", prepare_ema_update),
}


def explain(op_name: str, *args, backend: str = "auto", **kwargs) -> dispatch.Explanation:
    """The backend that `fastldm.ops.<op_name>(*args, **kwargs)` would run on now, and why not each other one.

    Looks at metadata only and runs nothing. Print the result, or read `.chosen` and `.reasons`.
    Raises InputError for an unknown operation, InputTypeError where no name comes first, and what the
    operation raises for wrong arguments.
    """
    if not isinstance(op_name, str):
        raise InputTypeError(
            f"the name of an operation comes first, got {shown(op_name)}; use one of: {', '.join(_PREPARE)}"
        )
    if op_name not in _PREPARE:
        raise InputError(f"unknown operation {op_name!r}; use one of: {', '.join(_PREPARE)}")
    op, prepare = _PREPARE[op_name]
    return dispatch.why(op, backend, prepare(*args, **kwargs))
