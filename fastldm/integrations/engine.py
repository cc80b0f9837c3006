"""`apply`, `revert` and `applied`: find what fastldm knows in a model, swap it, undo that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputError, InputTypeError, UnsupportedError
from fastldm.integrations.report import Entry, Report
from fastldm.integrations.rules import Match, is_own, rules
from fastldm.integrations.sdpa import calls_sdpa, redirected_forward
from fastldm.integrations.swapping import (
    Swap,
    kept_forwards,
    original_class,
    set_class,
    subclass,
    swap_of,
    swapped_copy,
    unswapped,
)
from fastldm.nn.roots import roots

OPS = ("attention", "group_norm", "vq_nearest")


class _Site(NamedTuple):
    path: str
    module: nn.Module
    match: Match
    covered: bool = False

    @property
    def thing(self) -> object:
        return self.module if self.match.attribute is None else getattr(self.module, self.match.attribute)

    @property
    def shown_path(self) -> str:
        return ".".join(part for part in (self.path, self.match.attribute) if part)


def apply(
    model: object,
    ops: Iterable[str] = OPS,
    *,
    backend: str = "auto",
    filter: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    attention_classes: Iterable[type[nn.Module]] = (),
) -> Report:
    """Lets fastldm's operations compute in `model`, in place.

    Known are, of torch.nn: GroupNorm, GroupNorm followed by SiLU in a Sequential, MultiheadAttention called
    with need_weights=False, TransformerEncoderLayer; of diffusers: ResnetBlock2D, all attention processors
    that call `scaled_dot_product_attention` or diffusers' attention dispatcher, VectorQuantizer. Parameters,
    buffers, state_dict, class names, `isinstance`, deepcopy and pickle stay as they are; nothing outside
    `model` changes. Linear layers, convolutions, and processors with weights (IP-Adapter) are never touched.
    May be called before or after LoRA is loaded, hooks are added, and `torch.compile`; again, it changes what
    it did to the new arguments. A backend chosen in diffusers (`set_attention_backend`) stays chosen; what
    puts other attention processors in takes fastldm's out; `set_default_attn_processor` asks for `revert`
    first.

    PyTorch computes what torch.func or forward mode differentiates, what torch.jit.script compiles, and what
    torch.fx traces through. Second derivatives raise where no small tensors are left to PyTorch: `revert` for
    those.

    Args:
        model: a module, or a pipeline (anything with `components`), of which all modules are looked at.
        ops: of "attention", "group_norm", "vq_nearest".
        backend: "auto", a preference: each call takes the best backend that can do it, PyTorch's own kernels
            at worst, and `fastldm.record()` tells. The name of a backend is a requirement: a call that it
            cannot do raises UnsupportedError.
        filter: (path, module) -> whether to touch that module; paths as in the report.
        strict: raise if something known has to be left as it is.
        attention_classes: classes of yours whose `forward` calls `F.scaled_dot_product_attention` by a global
            name (`F`, `nn`, `torch`, the function itself), to be redirected as diffusers' are. Others that do
            are listed as skipped. Other global
            names mean in them what they did when `apply` was called.

    Returns:
        What was replaced and what was skipped and why. Print it, or read `.entries` or `.to_dict()`.

    Raises:
        InputTypeError: `model` is neither a module nor a pipeline with one; an argument of a wrong kind.
        InputError: an unknown operation or backend; a class that does not call attention so.
        UnsupportedError: a named backend that is not there; with `strict`, what was skipped. Nothing has
            changed then.
    """
    wanted = _checked_ops(ops)
    dispatch.check_name(backend)
    if filter is not None and not callable(filter):
        raise InputTypeError(f"filter must be a function of (path, module), got {shown(filter)}")
    classes = _checked_classes(attention_classes)
    report, swaps = Report(), []
    for site in _sites(model, wanted, filter, classes):
        match, was = site.match, _class_name(site.thing)
        if match.skipped is not None:
            report.entries.append(Entry(site.shown_path, match.op, was, None, None, match.skipped))
            continue
        if not site.covered:
            report.entries.append(Entry(site.shown_path, match.op, was, match.now, backend))
        swaps.append((site, subclass(Swap(original_class(site.thing), match.make, backend))))

    _check_backend(backend, {entry.op for entry in report.replaced})
    if strict and report.skipped:
        first = report.skipped[0]
        raise UnsupportedError(
            f"strict: {len(report.skipped)} of {len(report.entries)} places cannot be replaced, the first is "
            f"{first.path!r} ({first.was}): {first.skipped}"
        )
    copies: dict[int, object] = {}
    for site, cls in swaps:
        report._undo.append(_swap(site, cls, copies))
    return report


def revert(model: object) -> None:
    """Undoes every `apply` to `model`; what was never applied, or is reverted, stays as it is."""
    copies: dict[int, object] = {}
    for _, module in _modules(model):
        processor = vars(module).get("processor")
        if swap_of(processor) is not None:
            _swap(
                _Site("", module, Match("attention", attribute="processor")),
                original_class(processor),
                copies,
            )
        set_class(module, unswapped(type(module)))


def named_places(model: object) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, name of the original class) of what `apply` has replaced in `model`."""
    known, covered = rules(), set()
    for path, module in _modules(model):
        processor = vars(module).get("processor")
        if swap_of(processor) is not None:
            yield f"{path}.processor".lstrip("."), module, original_class(processor).__name__
        if swap_of(module) is not None and id(module) not in covered:
            yield path, module, original_class(module).__name__
            for match in _matches(module, known, ()):
                covered.update(_covered_by(match, module))


@contextmanager
def applied(model: object, *args, **kwargs) -> Iterator[Report]:
    """`apply` for the time of a `with` block; then everything is as it was, after exceptions too."""
    report = apply(model, *args, **kwargs)
    try:
        yield report
    finally:
        for undo in reversed(report._undo):
            undo()


def _swap(site: _Site, cls: type, copies: dict[int, object]) -> Callable[[], None]:
    """Makes the thing at `site` a `cls` and returns what undoes that.

    A module changes its class. An object in an attribute may be shared with a model that is not meant, so a
    copy of it takes its place, one for all its places.
    """
    module, attribute = site.module, site.match.attribute
    if attribute is None:
        before = type(module)
        set_class(module, cls)
        return lambda: set_class(module, unswapped(type(module), before))
    thing = site.thing
    if id(thing) not in copies:
        copies[id(thing)] = swapped_copy(thing, cls), thing  # kept alive, so that no id comes twice
    setattr(module, attribute, copies[id(thing)][0])

    def undo():
        if swap_of(getattr(module, attribute, None)) is not None:
            setattr(module, attribute, thing)

    return undo


def _checked_ops(ops: Iterable[str]) -> set[str]:
    given = ops
    ops = (ops,) if isinstance(ops, str) else tuple(ops) if isinstance(ops, Iterable) else ops
    if not isinstance(ops, tuple) or not all(isinstance(op, str) for op in ops):
        raise InputTypeError(f"ops must be some of {', '.join(OPS)}, got {shown(given)}")
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        hint = f"; did you mean backend={unknown[0]!r}?" if unknown[0] in dispatch.BACKENDS else ""
        raise InputError(f"unknown operation {unknown[0]!r}; use some of: {', '.join(OPS)}{hint}")
    if not ops:
        raise InputError(f"ops is empty; use some of: {', '.join(OPS)}")
    return set(ops)


def _checked_classes(classes: Iterable[type[nn.Module]]) -> tuple[type, ...]:
    classes = (classes,) if isinstance(classes, type) else classes
    if not isinstance(classes, Iterable) or isinstance(classes, str):
        raise InputTypeError(f"attention_classes must be classes of modules, got {shown(classes)}")
    classes = tuple(classes)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise InputTypeError(f"attention_classes must be classes of modules, got {shown(cls)} among them")
        if not calls_sdpa(cls.forward):
            raise InputError(
                f"attention_classes: the forward of {cls.__name__} calls no scaled_dot_product_attention "
                "by a global name; only a call in forward itself can be redirected"
            )
    return classes


def _check_backend(backend: str, ops: set[str]) -> None:
    for op in sorted(ops) if backend != "auto" else ():
        reason = dispatch.find(backend, op)
        if isinstance(reason, str):
            raise UnsupportedError(f"backend {backend!r} cannot run {op}: {reason}; use backend='auto'")


def _class_name(thing: object) -> str:
    """Of the original class, before any swap and before torch.jit."""
    scripted = isinstance(thing, torch.jit.ScriptModule)
    return thing.original_name if scripted else original_class(thing).__name__


def _why_not(module: nn.Module, match: Match) -> str | None:
    if match.attribute is None and "forward" in vars(module) and not kept_forwards(module):
        return "its forward was replaced on the instance; apply before that"
    return None


def _covered_by(match: Match, module: nn.Module) -> set[int]:
    return {id(getattr(module, name)) for name in match.covers}


def _sites(
    model: object, wanted: set[str], filter: Callable | None, attention_classes: tuple[type, ...]
) -> Iterator[_Site]:
    """What `apply` looks at. Covered modules are swapped too, for the calls that go to them after all (where
    they have hooks), and are not told of."""
    known, covered = rules(), set()
    for path, module in _modules(model):
        if filter is not None and not filter(path, module):
            continue
        for match in _matches(module, known, attention_classes):
            if match.op not in wanted:
                continue
            match = match._replace(skipped=match.skipped or _why_not(module, match))
            if match.skipped is None:
                covered |= _covered_by(match, module)
            yield _Site(path, module, match, match.attribute is None and id(module) in covered)


def _matches(module: nn.Module, known: list, attention_classes: tuple[type, ...]) -> list[Match]:
    if isinstance(module, torch.jit.ScriptModule):
        return _scripted(module)
    found = [match for match in (rule(module) for rule in known) if match is not None]
    kind = original_class(module)
    if not found and not is_own(kind) and calls_sdpa(kind.forward):
        reason = None if kind in attention_classes else "its class is unknown; name it in attention_classes"
        found.append(Match("attention", "fused attention", redirected_forward, skipped=reason))
    return found


# What PyTorch's own operation is called in the graph of torch.jit.
_IN_GRAPHS = {"attention": "aten::scaled_dot_product_attention", "group_norm": "aten::group_norm"}


def _scripted(module: torch.jit.ScriptModule) -> list[Match]:
    """One match for each operation that its graph calls, all to be skipped."""
    graph = getattr(getattr(module, "forward", None), "inlined_graph", None)
    reason = "torch.jit has compiled it, and its code cannot be changed"
    return [
        Match(op, skipped=reason)
        for op, node in _IN_GRAPHS.items()
        if graph is not None and graph.findNode(node) is not None
    ]


def _modules(model: object) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all, none twice; under what torch.compile wrapped, by the path of the original.
    Without those within a module of torch.jit, which are part of its code."""
    seen: set[nn.Module] = set()
    for name, root in roots(model).items():
        for path, module in root.named_modules(memo=seen, prefix=name):
            if not isinstance(module, torch._dynamo.OptimizedModule):
                yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module
            if isinstance(module, torch.jit.ScriptModule):
                seen.update(module.modules())
