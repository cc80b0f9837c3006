"""Attention at the layers of diffusion models."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.checks import both, judge_by_rule, spread
from benchmarks.providers import ours, too_large
from benchmarks.registry import DIRECTIONS, Case, Function, Judge, Op, Problem, Provider, Work
from fastldm import reference
from fastldm.testing import plain_attention
from fastldm.testing.inputs import ATTENTION_LAYOUTS, attention_inputs
from fastldm.testing.shapes import ATTENTION, ATTENTION_LAYERS

SHAPES = {**ATTENTION_LAYERS, **ATTENTION}
_CHECKED_SCORES = 1 << 24
# In units of the forward's two matrix products; the backward has five.
_PRODUCTS = {"forward": 2, "backward": 5, "forward+backward": 7}


def _problem(case: Case) -> Problem:
    made = attention_inputs(SHAPES[case.shape], case.torch_dtype, layout=case.layout)
    *inputs, grad = (x.to(case.device) for x in made)
    return Problem(case, ("q", "k", "v"), tuple(inputs), wanted=3, grad=grad)


def _judge(problem: Problem) -> Judge:
    """On some heads whole, and what belongs to single queries on some queries of every head."""
    batch, heads, queries, keys, head_dim = SHAPES[problem.case.shape]
    picked = spread(batch * heads, _CHECKED_SCORES // (queries * keys))
    rows = spread(queries, _CHECKED_SCORES // (4 * batch * heads * keys))

    def cut_heads(name: str, x: Tensor) -> Tensor:
        return torch.stack([x[i // heads, i % heads] for i in picked]).unsqueeze(0)

    def cut_rows(name: str, x: Tensor) -> Tensor:
        return x if name in ("k", "v") else x[:, :, rows]

    def truth(*inputs: Tensor) -> Tensor:
        return reference.attention(*inputs)[0]

    terms = max(queries, keys) + head_dim
    whole = judge_by_rule(problem, cut_heads, truth, plain_attention, terms)
    if len(picked) == batch * heads:
        return whole
    return both(whole, judge_by_rule(problem, cut_rows, truth, plain_attention, terms, ("out", "q")))


def _work(problem: Problem) -> Work:
    batch, heads, queries, keys, head_dim = SHAPES[problem.case.shape]
    product = 2.0 * batch * heads * queries * keys * head_dim
    return Work("matmul", _PRODUCTS[problem.case.direction] * product)


def _sdpa(problem: Problem) -> Function:
    return F.scaled_dot_product_attention


def _sdpa_by(backend: SDPBackend, problem: Problem) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return function


def _on_cuda_only(case: Case) -> str | None:
    return None if case.device.startswith("cuda") else "chosen among SDPA's kernels on CUDA only"


def _naive(problem: Problem) -> Function:
    scale = 1.0 / math.sqrt(problem.inputs[0].shape[-1])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1) @ v

    return function


def _scores_too_large(case: Case) -> str | None:
    batch, heads, queries, keys, _ = SHAPES[case.shape]
    held = 2 if case.direction == "forward" else 4
    return too_large(held * batch * heads * queries * keys * case.torch_dtype.itemsize, case.device)


_SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _providers() -> list[Provider]:
    return [
        *ours("attention", lambda problem, function: function),
        Provider("sdpa", _sdpa),
        *(
            Provider(f"sdpa-{name}", partial(_sdpa_by, backend), refuse=_on_cuda_only)
            for name, backend in _SDPA_BACKENDS.items()
        ),
        Provider("naive", _naive, refuse=_scores_too_large),
    ]


OPS = (
    Op(
        "attention",
        shapes=SHAPES,
        full=tuple(ATTENTION_LAYERS),
        dtypes=("float32", "bfloat16"),
        problem=_problem,
        judge=_judge,
        work=_work,
        providers=_providers,
        torch="sdpa",
        layouts=ATTENTION_LAYOUTS,
        directions=DIRECTIONS,
        default_directions=("forward", "forward+backward"),
    ),
)
