"""Whether what `fastldm.apply` put into a model computes what stood there before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastldm.integrations.engine import named_places, revert
from fastldm.testing.tolerances import errors
from fastldm.text import as_table


@dataclass
class Checked:
    """The largest errors of one module over its calls, against its original in float32 (float64 for float32).

    `error` is that of the module as it is, `eager` that of the original in the same dtype, `limit` what the
    rule of `fastldm.testing.tolerances` allows. `compared` is False where some result had no finite element
    to compare, and then `ok` is too.
    """

    path: str
    was: str
    calls: int = 0
    error: float = 0.0
    eager: float = 0.0
    limit: float = 0.0
    compared: bool = True
    ok: bool = True


@dataclass
class Verification:
    """What `verify` found. True if something ran that is replaced, and is as accurate as the rule asks."""

    modules: list[Checked] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return any(module.calls for module in self.modules) and all(module.ok for module in self.modules)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if not self.modules:
            return "nothing in this model is replaced; call fastldm.apply first"
        rows = [("path", "was", "calls", "error", "of eager", "limit", "")]
        for one in self.modules:
            numbers = (f"{value:.2e}" if one.calls else "" for value in (one.error, one.eager, one.limit))
            rows.append((one.path or "(the model)", one.was, str(one.calls), *numbers, _verdict(one)))
        return as_table(rows)


def _verdict(checked: Checked) -> str:
    if not checked.calls:
        return "not called"
    if checked.ok:
        return "ok"
    return "WRONG" if checked.compared else "not compared: no finite number in the result"


def verify(model: object, *args, **kwargs) -> Verification:
    """Runs `model(*args, **kwargs)` once and compares every module that `apply` replaced with its original.

    The original gets the inputs that the module got, in their dtype and in a wider one. Takes a copy of one
    module at a time, and the time of several runs. In training mode, results differ by chance where there is
    dropout, and batch norms count these runs.
    """
    result = Verification()
    busy = False

    def watch(checked: Checked) -> Callable:
        def hook(module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                _compare(checked, module, inputs, named, output)
            finally:
                busy = False

        return hook

    handles = []
    try:
        for path, module, was in named_places(model):
            checked = Checked(path, was)
            result.modules.append(checked)
            handles.append(module.register_forward_hook(watch(checked), with_kwargs=True))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return result


def _compare(checked: Checked, module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
    original = copy.deepcopy(module)
    revert(original)
    eager = original.forward(*inputs, **named)
    checked.calls += 1
    found = next(_floating(output), None)
    if found is None:
        checked.compared = checked.ok = False
        return
    wide = torch.float64 if found.dtype == torch.float32 else torch.float32
    original.to(wide)
    inputs, named = tree_map(lambda x: x.to(wide) if _is_floating(x) else x, (inputs, named))
    terms = max(math.prod(x.shape[1:]) for x in _floating((inputs, named)))
    with torch.autocast(found.device.type, enabled=False):
        truth = original.forward(*inputs, **named)
    for x, reference, plain in zip(_floating(output), _floating(truth), _floating(eager)):
        error, limit, plain_error = errors(x, reference, plain.to(x.dtype), terms=terms)
        worst = error.max().item()
        finite = reference.to(x.dtype).isfinite()
        checked.compared = checked.compared and bool(finite.any())
        checked.ok = checked.ok and checked.compared and worst <= limit and torch.equal(x.isfinite(), finite)
        if worst >= checked.error:
            checked.error, checked.eager, checked.limit = worst, plain_error, limit


def _is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _floating(tree: object) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if _is_floating(x) and x.numel())
