"""Vector quantisation: nearest code, straight-through quantisation, codebook statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm import dispatch
from fastldm.errors import InputError, InputTypeError
from fastldm.ops._library import check_number, check_tensor, define, refuse_transforms


def vq_nearest(z: Tensor, codebook: Tensor, *, backend: str = "auto") -> Tensor:
    """Index of the nearest code of each row of `z`.

    Args:
        z: (..., D), floating point.
        codebook: (K, D), floating point (its dtype may differ from that of `z`), finite.
        backend: "auto" or the name of a backend, which is a requirement.

    Returns:
        int64 (...): the float64 argmin over k of `||z - codebook[k]||^2` of the values given, the lowest
        index on exact ties, the same on every backend. A row of `z` with NaN or infinity gives 0. No
        gradient.

    Raises:
        InputTypeError: an argument that is not floating point.
        InputError: an empty codebook, D or devices that differ; on the CPU, a codebook with NaN or infinity.
        UnsupportedError: a backend asked for by name cannot do this call.
    """
    z, codebook = prepare_nearest(z, codebook)
    return _vq_nearest(z.detach(), codebook, backend)


def vq_quantize(z: Tensor, codebook: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Replaces each row of `z` by its nearest code, with the straight-through gradient.

    Arguments and errors as `vq_nearest`.

    Returns:
        z_q: (..., D), exactly `codebook[indices]` in the dtype of `z`. Its gradient goes to `z` unchanged and
            none to the codebook (arXiv 1711.00937, section 3.2).
        indices: int64 (...).

    Raises:
        UnsupportedError: differentiation by torch.func (grad, vjp, ...) or in forward mode.
    """
    refuse_transforms("vq_quantize", z)
    return _vq_quantize(*prepare_nearest(z, codebook), backend)


def vq_ema_update(
    z: Tensor, indices: Tensor, num_codes: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What an exponential-moving-average codebook update adds up (arXiv 1711.00937, appendix A.1).

    Args:
        z: (..., D), floating point.
        indices: int64 (...), each in 0 .. num_codes - 1 (checked on the CPU).
        num_codes: K.
        backend: "auto" or the name of a backend, which is a requirement.

    Returns:
        counts: int64 (K,), how many rows of `z` fell on each code.
        sums: float32 (K, D), the sum of these rows. Bit-equal from run to run. No gradient.

    Raises:
        InputTypeError: `z` not floating point, `indices` not int64.
        InputError: shapes or devices that do not fit together, an index out of range.
        UnsupportedError: a backend asked for by name cannot do this call.
    """
    return _vq_ema_update(*prepare_ema_update(z, indices, num_codes), backend)


def prepare_nearest(z, codebook) -> tuple:
    """The checked arguments of the operation, without the backend."""
    check_tensor("z", z)
    check_tensor("codebook", codebook)
    if z.dim() < 1 or codebook.dim() != 2:
        raise InputError(
            f"z must be (..., D), codebook (K, D), got {tuple(z.shape)}, {tuple(codebook.shape)}"
        )
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise InputError(
            f"codebook must have at least one code and one dimension, got {tuple(codebook.shape)}"
        )
    if z.shape[-1] != codebook.shape[1]:
        raise InputError(f"z and codebook must share D, got {z.shape[-1]} and {codebook.shape[1]}")
    if z.device != codebook.device:
        raise InputError(f"z and codebook must be on one device, got {z.device} and {codebook.device}")
    return z, codebook.detach()


def prepare_ema_update(z, indices, num_codes) -> tuple:
    """The checked arguments of the operation, without the backend."""
    check_tensor("z", z)
    check_number("num_codes", num_codes, int)
    if not isinstance(indices, Tensor):
        raise InputTypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if z.dim() < 1 or z.shape[:-1] != indices.shape:
        raise InputError(
            f"z must be (..., D) and indices (...), got {tuple(z.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype != torch.int64:
        raise InputTypeError(f"indices must be int64, got {indices.dtype}")
    if num_codes < 1:
        raise InputError(f"num_codes must be at least 1, got {num_codes}")
    if z.device != indices.device:
        raise InputError(f"z and indices must be on one device, got {z.device} and {indices.device}")
    return z.detach(), indices, num_codes


def _nearest_kernel(z, codebook, backend):
    # A check of the values waits for the device, so other devices go without.
    if codebook.device.type == "cpu" and not _all_finite(codebook):
        raise InputError("codebook holds NaN or infinity; the training step that wrote it has diverged")
    if z.numel() == 0:
        return z.new_zeros(z.shape[:-1], dtype=torch.int64)
    return dispatch.run("vq_nearest", "forward", backend, (z, codebook), dispatch.current_state())


def _all_finite(x: Tensor) -> bool:
    # One pass without a temporary: a sum of finite numbers is finite unless it overflows.
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())


def _nearest_fake(z, codebook, backend):
    return z.new_empty(z.shape[:-1], dtype=torch.int64)


def _quantize_kernel(z, codebook, backend):
    indices = _nearest_kernel(z, codebook, backend)
    return codebook[indices].to(z.dtype), indices


def _quantize_fake(z, codebook, backend):
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int64)


def _quantize_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])


def _quantize_backward(ctx, grad_z_q, grad_indices):
    return grad_z_q, None, None


def _ema_update_kernel(z, indices, num_codes, backend):
    if indices.device.type == "cpu" and indices.numel() > 0:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= num_codes:
            raise InputError(f"indices must lie in 0 .. {num_codes - 1}, got {low} .. {high}")
    if z.numel() == 0:
        counts = torch.bincount(indices.flatten(), minlength=num_codes)
        return counts, z.new_zeros((num_codes, z.shape[-1]), dtype=torch.float32)
    args = (z, indices, num_codes)
    return dispatch.run("vq_ema_update", "forward", backend, args, dispatch.current_state())


def _ema_update_fake(z, indices, num_codes, backend):
    counts = z.new_empty((num_codes,), dtype=torch.int64)
    return counts, z.new_empty((num_codes, z.shape[-1]), dtype=torch.float32)


_vq_nearest = define(
    "vq_nearest(Tensor z, Tensor codebook, str backend) -> Tensor", _nearest_kernel, _nearest_fake
)
_vq_quantize = define(
    "vq_quantize(Tensor z, Tensor codebook, str backend) -> (Tensor, Tensor)",
    _quantize_kernel,
    _quantize_fake,
    backward=_quantize_backward,
    setup_context=_quantize_setup_context,
)
_vq_ema_update = define(
    "vq_ema_update(Tensor z, Tensor indices, SymInt num_codes, str backend) -> (Tensor, Tensor)",
    _ema_update_kernel,
    _ema_update_fake,
)
