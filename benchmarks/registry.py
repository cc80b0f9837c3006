"""What can be measured: operations and networks with their named shapes, and cases picked by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.errors import InputError

# Each module has a tuple OPS.
_MODULES = {
    "ops": ("benchmarks.ops.attention", "benchmarks.ops.group_norm", "benchmarks.ops.vq"),
    "models": ("benchmarks.models", "benchmarks.pipelines"),
}
GROUPS = tuple(_MODULES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One operation at one named shape, dtype, layout and direction, on one device."""

    op: str
    shape: str
    dtype: str
    layout: str
    direction: str
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return " ".join((self.op, self.shape, self.dtype, self.layout, self.direction, self.device))


@dataclass(frozen=True)
class Problem:
    """A case with its tensors.

    `inputs` are the arguments of a provider's function, named by `names`; the first `wanted` of them get a
    gradient, for the gradient `grad` of the result. `networks` is for the cases of whole networks.
    """

    case: Case
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    wanted: int = 0
    grad: Tensor | None = None
    networks: Any = None


class Work(NamedTuple):
    """The least that a case must do, and the floor it is held against.

    `floor` is "matmul", with `amount` in floating-point operations, or "copy" of one tensor of `copied`
    bytes, with `amount` in bytes read and written.
    """

    floor: str
    amount: float
    copied: int = 0


class Verdict(NamedTuple):
    """How far a result is from the reference, and in one line why that is too far (None: it is not).

    `error` is the largest absolute difference, or for indices how many differ; None where it is not finite.
    """

    error: float | None = None
    fault: str | None = None


Function = Callable[..., Tensor | tuple[Tensor, ...]]
Judge = Callable[[Sequence[Tensor]], Verdict]


def _never(case: Case) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to do an operation.

    `build` gives the function for a problem: its arguments are `problem.inputs`. `refuse` says in one line
    why the provider does not do a case (None: it does).
    """

    name: str
    build: Callable[[Problem], Function]
    ours: bool = False
    refuse: Callable[[Case], str | None] = _never


@dataclass(frozen=True)
class Op:
    """An operation, or a network, and everything that measuring it takes.

    `full`, `dtypes`, `default_layouts` and `default_directions` are measured unless others are asked for;
    `shapes`, `DTYPES`, `layouts` and `directions` can be. `torch` names the rival that PyTorch itself runs,
    which "auto" must not fall behind.
    """

    name: str
    shapes: Mapping[str, Any]
    full: tuple[str, ...]
    dtypes: tuple[str, ...]
    problem: Callable[[Case], Problem]
    judge: Callable[[Problem], Judge]
    work: Callable[[Problem], Work]
    providers: Callable[[], Sequence[Provider]]
    torch: str
    layouts: tuple[str, ...] = ("contiguous",)
    default_layouts: tuple[str, ...] = ("contiguous",)
    directions: tuple[str, ...] = ("forward",)
    default_directions: tuple[str, ...] = ("forward",)


@cache
def operations(group: str) -> dict[str, Op]:
    """{name: Op} of "ops" or "models"."""
    found = (op for module in _MODULES[group] for op in importlib.import_module(module).OPS)
    return {op.name: op for op in found}


def find(op: str) -> Op:
    """The Op of that name in any group."""
    return next(operations(group)[op] for group in GROUPS if op in operations(group))


@dataclass(frozen=True)
class Selection:
    """Names from the command line; an empty tuple stands for the default of each operation."""

    op: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    direction: tuple[str, ...] = ()
    provider: tuple[str, ...] = ()
    device: str = field(default="cpu")


def cases(group: str, selection: Selection) -> list[Case]:
    """The cases that a selection names, every operation's own defaults where it names none.

    Raises InputError, listing what exists, for a name that is known to none of the operations chosen, and
    where nothing is left. A name that only some of them know leaves out the others.
    """
    chosen = operations(group)
    _check("operation", selection.op, chosen)
    ops = [chosen[name] for name in selection.op or chosen]
    _check("shape", selection.shapes, _union(op.shapes for op in ops))
    _check("dtype", selection.dtype, DTYPES)
    _check("layout", selection.layout, _union(op.layouts for op in ops))
    _check("direction", selection.direction, _union(op.directions for op in ops))
    _check("provider", selection.provider, _union((p.name for p in op.providers()) for op in ops))
    found = [
        Case(op.name, shape, dtype, layout, direction, selection.device)
        for op in ops
        if providers(op, selection.provider)
        for shape in _pick(selection.shapes, op.full, op.shapes)
        for dtype in _pick(selection.dtype, op.dtypes, DTYPES)
        for layout in _pick(selection.layout, op.default_layouts, op.layouts)
        for direction in _pick(selection.direction, op.default_directions, op.directions)
    ]
    if not found:
        raise InputError(
            f"no case of {', '.join(op.name for op in ops)} has all of these names; ask for fewer"
        )
    return found


def providers(op: Op, names: Iterable[str] = ()) -> list[Provider]:
    """The providers of `op`, or those of them that are named."""
    wanted = set(names)
    return [provider for provider in op.providers() if not wanted or provider.name in wanted]


def _union(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"unknown {kind} {name!r}; use one of: {', '.join(known)}")


def _pick(names: Sequence[str], default: Sequence[str], known: Iterable[str]) -> Sequence[str]:
    return [name for name in names if name in known] if names else default
