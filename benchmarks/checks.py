"""Results against `fastldm.reference`, by the error rule of the tests, on a slice if they are large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.registry import Function, Judge, Problem, Verdict
from fastldm.testing import assert_as_accurate


def runnable(function: Function, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """Calls `function` in the direction of the case; gives the result, the gradients, or both.

    To be called with gradients enabled for every direction but "forward".
    """
    inputs, direction = problem.inputs, problem.case.direction
    if direction == "forward":

        def forward() -> tuple[Tensor, ...]:
            result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        return forward

    leaves = tuple(x.detach().requires_grad_() for x in inputs[: problem.wanted])
    arguments = (*leaves, *inputs[problem.wanted :])
    if direction == "backward":
        out = function(*arguments)
        return lambda: torch.autograd.grad(out, leaves, problem.grad, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        out = function(*arguments)
        return (out.detach(), *torch.autograd.grad(out, leaves, problem.grad))

    return both


def judge_by_rule(
    problem: Problem,
    cut: Callable[[str, Tensor], Tensor],
    truth: Function,
    plain: Function,
    terms: int,
    compared: Sequence[str] | None = None,
) -> Judge:
    """Judges the result ("out") and the gradients by `fastldm.testing.assert_as_accurate`.

    Args:
        cut: the part of the tensor of that name that is compared; a gradient goes by the name of its input.
            The operation on parts must give the part of the operation.
        truth, plain: the operation in float64, and as PyTorch does it in the tested dtype.
        terms: of the longest sum behind one element.
        compared: names of the results to compare, by default all of them.
    """
    grad = None if problem.grad is None else cut("out", problem.grad).cpu()
    inputs = tuple(cut(name, x.detach()).cpu() for name, x in zip(problem.names, problem.inputs))
    part = replace(problem, inputs=inputs, grad=grad)
    doubles = replace(
        problem,
        inputs=tuple(x.double() for x in inputs),
        grad=None if grad is None else grad.double(),
    )
    exact, rough = runnable(truth, doubles)(), runnable(plain, part)()
    names = ("out",) if problem.case.direction != "backward" else ()
    if problem.case.direction != "forward":
        names += problem.names[: problem.wanted]
    likes = {"out": problem.inputs[0], **dict(zip(problem.names, problem.inputs))}

    def judge(results: Sequence[Tensor]) -> Verdict:
        if len(results) != len(names):
            return Verdict(None, f"{len(results)} results where {len(names)} are due")
        verdict = Verdict(0.0)
        for name, result, one, two in zip(names, results, exact, rough):
            like = likes[name]
            if result.shape != like.shape or result.dtype != like.dtype:
                got = f"{tuple(result.shape)} {result.dtype}"
                return Verdict(None, f"{name}: {got} where {tuple(like.shape)} {like.dtype} is due")
            if compared is not None and name not in compared:
                continue
            label = name if name == "out" else f"d{name}"
            verdict = _worse(verdict, _compare(label, result, cut(name, result).cpu(), one, two, terms))
        return verdict

    return judge


def _compare(name: str, whole: Tensor, part: Tensor, exact: Tensor, rough: Tensor, terms: int) -> Verdict:
    error = (part.double() - exact).abs().max().item()
    error = error if math.isfinite(error) else None
    if not whole.isfinite().all():
        return Verdict(error, f"{name}: {int((~whole.isfinite()).sum())} elements are NaN or infinite")
    try:
        assert_as_accurate(part, exact, rough, name, terms=terms)
    except AssertionError as fault:
        return Verdict(error, str(fault))
    return Verdict(error)


def both(first: Judge, second: Judge) -> Judge:
    """The worse of two verdicts."""
    return lambda results: _worse(first(results), second(results))


def _worse(first: Verdict, second: Verdict) -> Verdict:
    """Both in one: the larger error, the first fault."""
    error = None if None in (first.error, second.error) else max(first.error, second.error)
    return Verdict(error, first.fault or second.fault)


def spread(count: int, most: int) -> list[int]:
    """At most `most`, at least one, evenly spaced positions in 0 .. count - 1, the last one among them."""
    most = max(1, min(count, most))
    return [count - 1 - (count - 1) * i // max(1, most - 1) for i in range(most)][::-1]
