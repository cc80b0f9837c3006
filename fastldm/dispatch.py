"""Chooses the backend of every call, inside the custom op, and records what ran and why.

`BACKENDS` is the one table of backends, `AUTO` the order of preference. A backend is a function from the name
of an operation to its Implementation; where it has none it raises UnsupportedError with a one-line reason. To
add one, add it to the table.

The choice is made when the op runs, not when it is traced, so changing the policy never recompiles a model.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from fastldm.checks import shown
from fastldm.errors import ConfigError, InputError, InputTypeError, UnsupportedError
from fastldm.implementation import Implementation
from fastldm.text import as_table

BACKENDS: dict[str, str] = {
    "reference": "fastldm.reference:implementation",
    "torch": "fastldm.eager:implementation",
    "cpu": "fastldm.native:cpu",
    "triton": "fastldm.native.triton:implementation",
    "cuda": "fastldm.native.cuda:implementation",
}

AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch", "reference"),
    "cuda": ("cuda", "triton", "torch", "reference"),
}
AUTO_ELSEWHERE = ("torch", "reference")

OPS = ("attention", "group_norm", "vq_nearest", "vq_ema_update")

logger = logging.getLogger("fastldm")


@dataclass(frozen=True)
class Call:
    """One call of one operation, as it ran."""

    op: str
    direction: str
    backend: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    fallback: str | None = None


@dataclass
class Recorder:
    """The calls made inside `with record() as rec`, and the backward calls of what was computed there."""

    calls: list[Call] = field(default_factory=list)

    def backends(self) -> dict[str, list[str]]:
        """Which backends each operation ran on: {op: sorted names}."""
        found: dict[str, set[str]] = {}
        for call in self.calls:
            found.setdefault(call.op, set()).add(call.backend)
        return {op: sorted(names) for op, names in sorted(found.items())}

    def summary(self) -> str:
        """A table of the calls, equal ones counted together; fallbacks with their reason."""
        if not self.calls:
            return "no fastldm operation ran"
        rows = [("calls", "op", "direction", "backend", "device", "dtype", "shapes", "fallback")]
        for call, count in Counter(self.calls).items():
            shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in call.shapes)
            dtype = str(call.dtype).removeprefix("torch.")
            rows.append(
                (
                    str(count),
                    call.op,
                    call.direction,
                    call.backend,
                    call.device,
                    dtype,
                    shapes,
                    call.fallback or "",
                )
            )
        return as_table(rows)


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would take, and why each other one would not."""

    op: str
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can do this call'}"]
        lines += [f"  {name:<10} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class State(NamedTuple):
    """What is in force in one context: the policy that "auto" stands for, and who is recording."""

    policy: str
    recorders: tuple[Recorder, ...]


_state: ContextVar[State | None] = ContextVar("fastldm_state", default=None)
_warned: set[tuple[str, str, str]] = set()


@cache
def _default_state() -> State:
    policy = os.environ.get("FASTLDM_BACKEND", "auto")
    if policy != "auto" and policy not in BACKENDS:
        raise ConfigError(
            f"FASTLDM_BACKEND={policy!r} is not a backend; use one of: auto, {', '.join(BACKENDS)}"
        )
    return State(policy, ())


def current_state() -> State:
    return _state.get() or _default_state()


def check_name(name: str) -> None:
    """Raises InputError unless `name` is "auto" or a backend, InputTypeError where it is no name at all."""
    if not isinstance(name, str):
        accepted = f"auto, {', '.join(BACKENDS)}"
        raise InputTypeError(f"backend must be a name, got {shown(name)}; use one of: {accepted}")
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; use one of: auto, {', '.join(BACKENDS)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets what `backend="auto"` means in this context (thread or task).

    A backend's name is a requirement: a call that it cannot do raises UnsupportedError. "auto" gives the
    choice back to fastldm. A `backend=` argument at the call wins. Backward passes run under the policy of
    their forward.
    """
    check_name(name)
    token = _state.set(current_state()._replace(policy=name))
    try:
        yield
    finally:
        _state.reset(token)


@contextmanager
def record() -> Iterator[Recorder]:
    """Collects the calls made in this context; see `Recorder`."""
    recorder = Recorder()
    state = current_state()
    token = _state.set(state._replace(recorders=(*state.recorders, recorder)))
    try:
        yield recorder
    finally:
        _state.reset(token)


def remember(tensor: torch.Tensor) -> None:
    """Ties the state in force to the memory of `tensor`, which the forward saves for the backward.

    The backward may run in another thread, after the context has ended, or from a compiled graph, which
    passes nothing but tensors.
    """
    state = _state.get()
    if state is not None:
        tensor.untyped_storage()._fastldm_state = state


def remembered(tensor: torch.Tensor) -> State:
    """The state tied to the memory of `tensor`, else the one in force."""
    return getattr(tensor.untyped_storage(), "_fastldm_state", None) or current_state()


def keeping_state(function: Callable) -> Callable:
    """`function`, to be called later or in another thread, under the state in force now."""
    state = _state.get()
    if state is None:
        return function

    def kept(*args):
        token = _state.set(state)
        try:
            return function(*args)
        finally:
            _state.reset(token)

    return kept


@cache
def find(backend: str, op: str) -> Implementation | str:
    """The implementation of `op` on `backend`, or in one line why there is none. Imports the backend."""
    module, function = BACKENDS[backend].split(":")
    try:
        return getattr(importlib.import_module(module), function)(op)
    except UnsupportedError as error:
        return str(error)


@cache
def _auto_chain(op: str, device_type: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The backends that "auto" tries, in order, and why those before the first of them are not there."""
    order = AUTO.get(device_type, AUTO_ELSEWHERE)
    live = tuple(name for name in order if isinstance(find(name, op), Implementation))
    absent = order[: order.index(live[0])] if live else order
    return live, tuple(f"{name}: {find(name, op)}" for name in absent)


def _reject(name: str, op: str, direction: str, args: tuple) -> str | None:
    implementation = find(name, op)
    if isinstance(implementation, str):
        return implementation
    if direction == "forward":
        return implementation.supports(*args)
    if implementation.backward is None:
        return f"the {name} backend has no backward for {op}"
    return implementation.supports_backward(*args)


def _pass_by(name: str, op: str, direction: str, args: tuple) -> str | None:
    """Why "auto" leaves a backend that could do the call to the next one."""
    implementation = find(name, op)
    return (implementation.slower if direction == "forward" else implementation.slower_backward)(*args)


def run(op: str, direction: str, backend: str, args: tuple, state: State):
    """Runs `op` on the backend that `backend` (else the policy) names, or on the first of "auto" that can.

    Raises UnsupportedError where a named backend cannot.
    """
    policy = backend if backend != "auto" else state.policy
    reasons: tuple[str, ...] = ()
    if policy == "auto":
        live, reasons = _auto_chain(op, args[0].device.type)
        for name in live:
            reason = _reject(name, op, direction, args)
            if reason is None:
                reason = _pass_by(name, op, direction, args)
                if reason is None:
                    break
            else:
                _warn_once(op, name, reason)
            reasons = (*reasons, f"{name}: {reason}")
        else:
            raise UnsupportedError(f"{op} {direction}: no backend can do this call ({'; '.join(reasons)})")
    else:
        check_name(policy)
        name = policy
        reason = _reject(name, op, direction, args)
        if reason is not None:
            raise UnsupportedError(
                f"backend {name!r} cannot run {op} {direction}: {reason}; use backend='auto'"
            )
    if state.recorders:
        _record(op, direction, name, args, state, "; ".join(reasons) or None)
    return getattr(find(name, op), direction)(*args)


def run_composite(op: str, backend: str, args: tuple) -> torch.Tensor | None:
    """Runs the forward of `op` in operations that PyTorch differentiates itself, if "auto" has the choice and
    the tensors are so small that this is fastest; else returns None."""
    state = current_state()
    if backend != "auto" or state.policy != "auto" or args[0].device.type != "cpu":
        return None
    result = find("torch", op).composite(*args)
    if result is not None and state.recorders:
        reason = "a gradient is wanted of tensors so small that PyTorch's own autograd is fastest"
        tensors = tuple(a.detach() for a in args if isinstance(a, torch.Tensor))
        _record(op, "forward", "torch", tensors, state, reason)
        result.register_hook(lambda grad: _record(op, "backward", "torch", (grad, *tensors), state, reason))
    return result


def leave_to_torch(op: str, backend: str, reason: str, tensors: tuple[torch.Tensor, ...]) -> None:
    """Records that a model's own code does a call that `op` does not take; raises UnsupportedError where
    `backend` or the policy names a backend. Inside a compiled graph the policy is not looked at."""
    compiling = torch.compiler.is_compiling()
    state = State("auto", ()) if compiling else current_state()
    policy = backend if backend != "auto" else state.policy
    if policy not in ("auto", "torch"):
        raise UnsupportedError(f"backend {policy!r} cannot run {op} here: {reason}; use backend='auto'")
    if not compiling:
        _warn_once(op, policy, reason)
        if state.recorders and isinstance(tensors[0], torch.Tensor):
            _record(op, "forward", "torch", tensors, state, reason)


def _record(op: str, direction: str, name: str, args: tuple, state: State, fallback: str | None) -> None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    shapes = tuple(() if t.is_nested else tuple(t.shape) for t in tensors)
    dtype, device = tensors[0].dtype, str(tensors[0].device)
    for recorder in state.recorders:
        recorder.calls.append(Call(op, direction, name, shapes, dtype, device, fallback))


def _warn_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _warned:
        _warned.add((op, backend, reason))
        if backend in BACKENDS:
            logger.warning("%s does not run on the %s backend: %s", op, backend, reason)
        else:
            logger.warning("%s is left to PyTorch: %s", op, reason)


def why(op: str, backend: str, args: tuple) -> Explanation:
    """What `run` would choose for the forward of `op`, with every other backend's reason."""
    policy = backend if backend != "auto" else current_state().policy
    check_name(policy)
    order = AUTO.get(args[0].device.type, AUTO_ELSEWHERE)
    names = (*order, *(name for name in BACKENDS if name not in order))
    chosen, reasons = None, {}
    for name in names:
        reason = _reject(name, op, "forward", args)
        if policy not in ("auto", name):
            reason = reason or f"not asked for: the policy is {policy!r}"
        elif policy == "auto" and name not in order:
            reason = reason or f"runs only when named, not chosen by 'auto' on {args[0].device.type}"
        elif reason is None and policy == "auto" and (slower := _pass_by(name, op, "forward", args)):
            reason = slower
        elif reason is None and chosen is None:
            chosen = name
            reason = "chosen" if policy == "auto" else "chosen: required by name"
        elif reason is None:
            reason = f"could run, but {chosen} comes first on {args[0].device.type}"
        reasons[name] = reason
    return Explanation(op, chosen, reasons)
