"""Attention in Triton. Contract: fastldm/ops/attention.py; maths: kernels/README.md."""

from __future__ import annotations

from ..common.layout import laid_out_as
from ..common.support import refuse
from ..common.target import target_of
from .plans import plan_backward, plan_forward
from .problem import dense_last, problem_of

__all__ = ["backward", "forward", "supports", "supports_backward"]


def supports(q, k, v, attn_mask, is_causal, scale, need_lse) -> str | None:
    return refuse(q)


def supports_backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale) -> str | None:
    return refuse(q)


def forward(q, k, v, attn_mask, is_causal, scale, need_lse):
    problem = problem_of(q, k, attn_mask, is_causal, scale)
    launches, out, lse = plan_forward(
        dense_last(q), dense_last(k), dense_last(v), problem, need_lse, target_of(q.device)
    )
    for launch in launches:
        launch.run()
    return laid_out_as(out, q), lse


def backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
    problem = problem_of(q, k, attn_mask, is_causal, scale)
    tensors = (dense_last(x) for x in (grad_out, q, k, v, out))
    launches, grads = plan_backward(*tensors, lse.contiguous(), problem, target_of(q.device))
    for launch in launches:
        launch.run()
    return tuple(laid_out_as(grad, x) for grad, x in zip(grads, (q, k, v)))
