"""Outputs and all gradients of group norm by the error rule, whichever kernel gave them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastldm.testing.oracles import plain_group_norm
from fastldm.testing.tolerances import assert_as_accurate


def assert_group_norm(
    results: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    num_groups: int,
    activation: str | None,
    *,
    exact: bool = False,
) -> None:
    """Against float64 autograd, dtypes and the layout of x included.

    Args:
        results: "y", and under each input's name its gradient.
        inputs: "x", "grad" (of y), and parameters under the names of `fastldm.ops.group_norm`.
        exact: with no more error than rounding; else as accurate as PyTorch in the inputs' dtype.
    """
    contiguous = {name: value.contiguous() for name, value in inputs.items()}
    doubles = {name: value.double() for name, value in contiguous.items()}
    truth = plain_gradients(doubles, num_groups, activation)
    if exact:
        plain = {name: value.to(inputs["x"].dtype) for name, value in truth.items()}
    else:
        plain = plain_gradients(contiguous, num_groups, activation)
    x = inputs["x"]
    terms = max(x[0].numel() // num_groups, x.numel() // x.shape[1])
    for name, result in results.items():
        assert result.dtype == inputs["x" if name == "y" else name].dtype
        assert_as_accurate(result, truth[name], plain[name], name, terms=terms)
    for result in (results["y"], results["x"]):
        assert result.stride() == torch.empty_like(x).stride()


def plain_gradients(
    inputs: Mapping[str, Tensor], num_groups: int, activation: str | None
) -> dict[str, Tensor]:
    """What `assert_group_norm` takes as results, by PyTorch's autograd in the inputs' dtype."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "grad"}
    x, *parameters = leaves.values()
    named = dict(zip(list(leaves)[1:], parameters))
    out = plain_group_norm(x, num_groups, **named, activation=activation)
    return {"y": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), inputs["grad"])))}
