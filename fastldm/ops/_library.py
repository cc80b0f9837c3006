"""How an operation is registered with PyTorch: schema, kernel, fake, autograd, autocast.

A call in plain eager mode goes past PyTorch's dispatcher straight to the kernel, or to an autograd.Function
around it: of a custom op written in Python the dispatcher costs about 10 microseconds, as much as a small
layer takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputTypeError, UnsupportedError

_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
_LIBRARY = torch.library.Library("fastldm", "DEF")
_AUTOCAST_KEYS = _Keys(_Key.AutocastCPU) | _Keys(_Key.AutocastCUDA)


def _keys(*names: str) -> int:
    keys = _Keys(getattr(_Key, names[0]))
    for name in names[1:]:
        keys = keys | _Keys(getattr(_Key, name))
    return keys.raw_repr()


# What the dispatcher knows about a tensor that only autograd and autocast act on (no subclass, not fake, not
# wrapped by torch.func, not lazily negated, ...), made in normal or inference mode; and about a thread that
# no mode or tracer watches.
_PLAIN_TENSORS = {
    _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"),
    _keys("CPU", "AutocastCPU"),
    _keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA"),
    _keys("CUDA", "AutocastCUDA"),
}
_PLAIN_THREADS = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast_tensors: int = 0,
    composite: Callable[[tuple], Tensor | None] = lambda args: None,
) -> Callable:
    """Registers `fastldm::<schema>` and returns the function that calls it.

    Where `composite` has a result for the arguments of a call whose gradient is wanted, this is returned, as
    the only output.
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
    function = backward and _autograd_function(name, kernel, backward, setup_context)

    def call(*args):
        if torch.compiler.is_compiling() or not _is_plain(args):
            return op(*args)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            return kernel(*args)
        if function is None:
            return op(*args)
        result = composite(args)
        return function.apply(*args) if result is None else (result,)

    return call


def _is_plain(args: tuple) -> bool:
    """Whether PyTorch's dispatcher would do nothing with this call but to hand it to autograd."""
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_THREADS:
        return False
    if forward_ad._current_level >= 0 or torch._C._is_any_autocast_enabled():
        return False
    keys_of = torch._C._dispatch_keys
    for arg in args:
        if isinstance(arg, Tensor) and keys_of(arg).raw_repr() not in _PLAIN_TENSORS:
            return False
    return True


def _autograd_function(name: str, kernel: Callable, backward: Callable, setup_context: Callable) -> type:
    def forward(ctx, *args):
        # PyTorch's own way to call setup_context inspects the signature of forward on every call (40 us).
        output = kernel(*args)
        setup_context(ctx, args, output)
        # Saved tensors carry the state too, but not through hooks that save copies of them.
        ctx.backward_as_now = dispatch.keeping_state(backward)
        return output

    def backward_as_then(ctx, *grads):
        return ctx.backward_as_now(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_as_then)}
    return type(f"{name}_function", (torch.autograd.Function,), methods)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, x: object) -> None:
    """InputTypeError unless x is a dense tensor of a floating-point dtype that operations compute in."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise InputTypeError(
            f"{name} must be floating point (float32, bfloat16, float16, float64), got {x.dtype}"
        )
    if x.layout is not torch.strided:
        raise InputTypeError(f"{name} must be a dense tensor, got layout {x.layout}; call .to_dense()")


def check_number(name: str, value: object, kind: type = float) -> None:
    """InputTypeError unless value is a real number, or with `kind` int a whole one; symbolic ones are."""
    accepted = (int, torch.SymInt) if kind is int else (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(value, accepted) or isinstance(value, bool):
        wanted = "a whole number" if kind is int else "a number"
        raise InputTypeError(f"{name} must be {wanted}, got {shown(value)}")


def refuse_transforms(name: str, *inputs: Tensor | None) -> None:
    """Raises UnsupportedError for the derivatives that an op registered here cannot give.

    To a dual tensor (forward mode) PyTorch would give a zero tangent, without a word; to torch.func.grad and
    its like an error about autograd.Function and setup_context.
    """
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in inputs):
        raise UnsupportedError(
            f"ops.{name} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use backward"
        )
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    if any(x is not None and _differentiated_by_func(x) for x in inputs):
        raise UnsupportedError(
            f"ops.{name} is not differentiated by torch.func (grad, vjp, jacrev); use torch.autograd.grad or "
            "backward"
        )


def differentiating() -> bool:
    """Whether what runs now is differentiated in a way that `refuse_transforms` refuses."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    kinds = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return forward_ad._current_level >= 0 or (
        torch._C._are_functorch_transforms_active()
        and any(level.key() in kinds for level in functorch.get_interpreter_stack())
    )


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _differentiated_by_func(x: Tensor) -> bool:
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
