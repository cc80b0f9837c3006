"""How far a result may be from the truth.

With `reference` the result of unfused float32 or float64 maths on the same inputs, and `plain` the result of
the same maths done plainly in the tested dtype,

    max |result - reference| <= 2 max |plain - reference| + atol

That is the rule of FlashAttention's tests, with its atol, 2 max |r + 0.3 - 0.3 - r| for r the reference
rounded to the tested dtype. Kernels sum in float32 (float64 for float64), each in an order of its own, and
where that is the tested dtype two correct results differ by their orders alone. So atol also has sqrt(terms)
* eps * max |reference|, eps that of the summation and terms the number of terms behind one element: how such
errors add up (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Nothing here is tuned to a kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding_atol(reference: Tensor, dtype: torch.dtype) -> float:
    """2 max |r + 0.3 - 0.3 - r| for r = `reference` in `dtype`."""
    rounded = reference.to(dtype)
    error = ((rounded + 0.3) - 0.3 - rounded).double().abs()
    return 2.0 * error[error.isfinite()].max().item() if error.isfinite().any() else 0.0


def assert_same_special_values(result: Tensor, reference: Tensor, name: str = "result") -> None:
    """NaN, +inf and -inf are exactly where the reference has them."""
    for what, found, wanted in (
        ("NaN", result.isnan(), reference.isnan()),
        ("+inf", result.isposinf(), reference.isposinf()),
        ("-inf", result.isneginf(), reference.isneginf()),
    ):
        wrong = found != wanted
        if wrong.any():
            where = _first(wrong)
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are {what} on one side only, "
                f"first at {where}: got {result[where].item()}, reference {reference[where].item()}"
            )


def assert_as_accurate(
    result: Tensor, reference: Tensor, plain: Tensor, name: str = "result", *, terms: int
) -> None:
    """The rule above, after `assert_same_special_values`.

    `result` and `plain` are in the tested dtype, `reference` in float32 or float64; `terms` is the number of
    terms in the longest sum behind one element. Raises AssertionError with the errors and the first bad
    position.
    """
    if result.shape != reference.shape or plain.shape != reference.shape:
        raise AssertionError(
            f"{name}: shapes {tuple(result.shape)}, {tuple(plain.shape)}, {tuple(reference.shape)} differ"
        )
    if reference.numel() == 0:
        return
    assert_same_special_values(result, reference.to(result.dtype), name)
    error, limit, plain_error = errors(result, reference, plain, terms=terms)
    if error.max().item() > limit:
        where = _first(error > limit)
        relative = (error.norm() / reference[reference.isfinite()].double().norm()).item()
        raise AssertionError(
            f"{name}: max error {error.max().item():.3e} over the limit {limit:.3e} "
            f"(plain PyTorch: {plain_error:.3e}), relative L2 error {relative:.3e}, "
            f"{int((error > limit).sum())} of {error.numel()} elements, first at {where}: "
            f"got {result[where].item()}, reference {reference[where].item()}"
        )


def errors(result: Tensor, reference: Tensor, plain: Tensor, *, terms: int) -> tuple[Tensor, float, float]:
    """The absolute error of each element of `result`, the limit of the rule, and the largest of `plain`."""
    # An overflow to infinity where the tested dtype cannot hold the true number is no fault of the kernel.
    finite = reference.to(result.dtype).isfinite()
    truth = reference.double().masked_fill(~finite, 0.0)
    error = (result.double() - truth).abs().masked_fill(~finite, 0.0)
    plain_error = (plain.double() - truth).abs().masked_fill(~finite, 0.0)
    plain_error = plain_error.masked_fill(~plain_error.isfinite(), 0.0).max().item()
    summation = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
    atol = rounding_atol(reference[finite], result.dtype)
    atol += math.sqrt(terms) * summation * truth.abs().max().item()
    return error, 2.0 * plain_error + atol, plain_error


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())
