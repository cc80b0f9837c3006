"""How an operation is registered with PyTorch: schema, kernel, fake, autograd, autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.forward_ad import unpack_dual

_LIBRARY = torch.library.Library("fastldm", "DEF")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast_tensors: int = 0,
) -> torch._ops.OpOverload:
    """Registers `fastldm::<schema>` and returns the op.

    Under autocast the first `autocast_tensors` arguments are cast to the autocast dtype (float64 is left
    alone) and the kernel runs with autocast off, so that PyTorch ops inside a backend do not cast once more.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastldm::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastldm, name).default

    def autocast(*args):
        if autocast_tensors:
            dtype = torch.get_autocast_dtype(args[0].device.type)
            cast = (a if a.dtype == torch.float64 else a.to(dtype) for a in args[:autocast_tensors])
            args = (*cast, *args[autocast_tensors:])
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*args)

    _LIBRARY.impl(name, autocast, "AutocastCPU")
    _LIBRARY.impl(name, autocast, "AutocastCUDA")
    torch.library.register_autograd(
        f"fastldm::{name}", backward or _no_gradient(name), setup_context=setup_context, lib=_LIBRARY
    )
    return op


def refuse_transforms(name: str, *inputs: torch.Tensor | None) -> None:
    """Raises NotImplementedError for the derivatives that an op registered here cannot give.

    To a dual tensor (forward mode) PyTorch would give a zero tangent, without a word; to torch.func.grad and
    its like an error about autograd.Function and setup_context.
    """
    if any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"ops.{name} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use backward"
        )
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    if any(x is not None and _differentiated_by_func(x) for x in inputs):
        raise NotImplementedError(
            f"ops.{name} is not differentiated by torch.func (grad, vjp, jacrev); use torch.autograd.grad or "
            "backward"
        )


def _differentiated_by_func(x: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):  # vmap wraps too
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False


def _no_gradient(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"fastldm::{name} has no gradient: second derivatives are not supported")

    return backward
