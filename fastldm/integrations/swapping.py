"""Objects that change their class, and functions of others that call ours.

A swapped object is of a subclass of its class, with the same name, made here: `isinstance`, state_dict,
deepcopy and pickle go on as before, and `torch.compile` sees an ordinary class.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import nn


class Swap(NamedTuple):
    """How a class came about: `make(base, backend)` gave the members that it has beside those of `base`."""

    base: type
    make: Callable[[type, str], dict]
    backend: str


@cache
def subclass(swap: Swap) -> type:
    base = swap.base
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_fastldm_swap": swap,
    }
    if issubclass(base, nn.Module):
        members["__prepare_scriptable__"] = _original
    made = swap.make(*swap[::2])
    for name, member in made.items():
        if isinstance(member, types.FunctionType):  # by which Python's errors call it
            member.__qualname__ = f"{base.__qualname__}.{name}"
    return type(base.__name__, (base,), {**members, **made})


def swap_of(thing: object) -> Swap | None:
    return vars(type(thing)).get("_fastldm_swap")


def original_class(thing: object) -> type:
    """The class of `thing` as it was before any swap."""
    swap = swap_of(thing)
    return type(thing) if swap is None else swap.base


def _reduce(self, protocol):
    """As the base class reduces, with the base class for the made one, which pickle does not find by name."""
    swap = swap_of(self)
    if swap is None:  # of a class derived since, which has to see to itself
        return self._fastldm_swap.base.__reduce_ex__(self, protocol)
    function, args, *rest = swap.base.__reduce_ex__(self, protocol)
    args = tuple(swap.base if arg is type(self) else arg for arg in args)
    return (_restore, (swap, function, args), *rest)


def _restore(swap: Swap, function: Callable, args: tuple) -> object:
    thing = function(*args)
    thing.__class__ = subclass(swap)
    return thing


def _original(self):
    """For torch.jit.script, which compiles what PyTorch's own classes say: shares all that `self` holds."""
    plain = copy.copy(self)
    plain.__class__ = unswapped(type(self))
    return plain


def unswapped(cls: type, before: type | None = None) -> type:
    """The class as it was before any swap, or with `before` for the swapped one."""
    made = next((base for base in cls.__mro__ if "_fastldm_swap" in vars(base)), None)
    return cls if made is None else rebased(cls, made, before or made._fastldm_swap.base)


def rebased(cls: type, old: type, new: type) -> type:
    """`new` for `old`; for a class derived from `old`, as parametrizations do, the same one from `new`."""
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    bases = tuple(rebased(base, old, new) for base in cls.__bases__)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)


def kept_forwards(module: nn.Module) -> list[tuple[dict, str]]:
    """Where the forward of the module's class is kept, bound: hooks of accelerate put it into the module,
    those of diffusers into a registry."""
    registry = getattr(module, "_diffusers_hook", None)
    places = [vars(module), *(vars(kept) for kept in getattr(registry, "_fn_refs", ()))]
    return [
        (place, name)
        for place in places
        for name, value in place.items()
        if isinstance(value, types.MethodType)
        and value.__self__ is module
        and value.__func__ is type(module).forward
    ]


def set_class(module: nn.Module, cls: type) -> None:
    if cls is type(module):
        return
    kept = kept_forwards(module)
    module.__class__ = cls
    for place, name in kept:
        place[name] = types.MethodType(cls.forward, module)


def swapped_copy(thing: object, cls: type) -> object:
    """A shallow copy of `thing` that is a `cls`."""
    plain = copy.copy(thing)
    plain.__class__ = cls
    return plain


def rebound(function: types.FunctionType, names: dict[str, object]) -> types.FunctionType:
    """`function` with other values behind some of its global names.

    Its globals have no `__name__`: by that torch.compile would look them up in the module of the function.
    """
    scope = {**function.__globals__, **names}
    scope.pop("__name__", None)
    new = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = function.__annotations__
    new.__dict__.update(function.__dict__)
    new.__module__, new.__qualname__, new.__doc__ = (
        function.__module__,
        function.__qualname__,
        function.__doc__,
    )
    return new


def like_module(module: types.ModuleType, **names: object) -> types.ModuleType:
    """A module with the contents of `module` but for `names`."""
    new = types.ModuleType(f"{module.__name__} for fastldm")
    new.__dict__.update({key: value for key, value in vars(module).items() if key not in vars(new)})
    new.__dict__.update(names)
    return new
