"""Kernels of attention that are broken on purpose."""

from __future__ import annotations

import pytest
import torch

from fastldm import reference
from fastldm.testing import assert_as_accurate, plain_attention
from fastldm.testing.inputs import attention_inputs, attention_mask
from fastldm.testing.shapes import AttentionShape
from tests.cuda.attention import backward, check_backward, check_forward, gradients, key_mask

# A kernel that is wrong must be seen: file, what the source says, what it says then, which kernel.
BROKEN = {
    "no barrier": ("attention_forward", "      block_sync();\n", "", "long"),
    "no wait for copies": ("attention_forward", "      wait_group<0>();\n", "", "long"),
    "sums not rescaled": ("attention_tile", "total[row] * shrink;", "total[row];", "long"),
    "a step dropped": ("attention_forward", "index < steps;", "index < steps - 1;", "long"),
    "keys past the end": ("attention_mask", "if (key >= problem.keys) return false;", "", "short"),
    "diagonal off by one": ("attention_mask", "+ column + i % 2 <= row", "+ column + i % 2 < row", "long"),
    "the mask of another head": (
        "attention_mask",
        "place.head * problem.mask.head)",
        "0 * problem.mask.head)",
        "short",
    ),
    "the mask of the first query": (
        "attention_mask",
        "KeysAreRows ? how.key : how.query,",
        "KeysAreRows ? how.key : 0,",
        "masked",
    ),
    "a mask added to products": (
        "attention_mask",
        "fused_multiply_add(x, problem.scale, added)",
        "x + added",
        "masked",
    ),
    "rows that see nothing": (
        "attention_mask",
        "added == -kInfinity ? added :",
        "added == -kInfinity ? 0.0f :",
        "masked",
    ),
    "no wait for the next queries": ("attention_short", "wait_group<1>()", "wait_group<2>()", "short"),
    "rows not synchronised": (
        "attention_short",
        "      warp_sync();\n      // A lane",
        "      // A lane",
        "short",
    ),
    "weights before the barrier": (
        "attention_wide",
        "      wait_group<1>();\n      block_sync();\n",
        "      wait_group<1>();\n",
        "wide",
    ),
    "a part of the row unseen": (
        "attention_wide",
        "1; other < parts; ++other) most",
        "2; other < parts; ++other) most",
        "wide",
    ),
    "splits out of step": (
        "attention_wide",
        "fused_multiply_add(weight, part[i]",
        "fused_multiply_add(1.0f, part[i]",
        "split",
    ),
    "no delta": ("attention_backward", "weight * (x - delta[i % 2])", "weight * x", "backward"),
    "dk not scaled": (
        "attention_backward",
        "scale_row(dk, row, params.scale)",
        "scale_row(dk, row, 1.0f)",
        "backward",
    ),
    "queries past the end": ("attention_backward", "inside ? 4 : 0);", "4);", "backward"),
    "first queries dropped": (
        "attention_backward",
        "block_key / step : 0;",
        "block_key / step + 1 : 0;",
        "backward",
    ),
    "chunks not added": (
        "attention_backward",
        "chunk < params.chunks; ++chunk",
        "chunk < 1; ++chunk",
        "backward",
    ),
    "lse trusted where it is huge": (
        "attention_statistics",
        "if (is_large[row]) {",
        "if (false) {",
        "backward",
    ),
    "dS before the weights are there": (
        "attention_wide_backward",
        "      block_sync();\n      if (!is_score) {",
        "      if (!is_score) {",
        "wide backward",
    ),
    "outputs before dS is there": (
        "attention_wide_backward",
        "      block_sync();\n      if constexpr (Stages == 1) {\n        if (index + 1",
        "      if constexpr (Stages == 1) {\n        if (index + 1",
        "wide backward",
    ),
    "scores from the values": (
        "attention_wide_backward",
        "is_score ? other : other_values",
        "!is_score ? other : other_values",
        "wide backward",
    ),
    "dv over dk": (
        "attention_wide_backward",
        "which * params.chunks + chunk",
        "0 * params.chunks + chunk",
        "wide backward",
    ),
    "the diagonal's queries dropped": (
        "attention_wide_backward",
        "begin < block_row / step) begin = block_row / step;",
        "begin < block_row / step + 1) begin = block_row / step + 1;",
        "wide backward",
    ),
    "the last keys dropped": (
        "attention_wide_backward",
        "end = block_row / step + 1;",
        "end = block_row / step;",
        "wide backward",
    ),
    "no delta of a wide head": (
        "attention_wide_backward",
        "weight * (x - its.load(2 * step + query_of(row0, column0, i)))",
        "weight * x",
        "wide backward",
    ),
}  # fmt: skip


def probe(shim, kernel):
    """Calls that together notice every change."""
    dtype = torch.float16
    if kernel == "masked":
        shape = AttentionShape(1, 2, 40, 77, 40)
        for kind in ("bool", "float"):
            mask = attention_mask(shape, kind)
            check_forward(shim, shape, dtype, mask=mask)
            check_backward(shim, shape, dtype, mask=mask)
        return
    if kernel == "wide backward":
        for seed, shape in enumerate((AttentionShape(1, 1, 45, 33, 512), AttentionShape(1, 1, 300, 20, 512))):
            for is_causal in (False, True):
                check_backward(shim, shape, dtype, is_causal=is_causal, capability=90, seed=seed)
        return
    if kernel == "backward":
        for shape in (AttentionShape(1, 2, 300, 77, 40), AttentionShape(1, 2, 70, 150, 40)):
            q, k, v, grad = attention_inputs(shape, dtype)
            for is_causal in (False, True):
                check_backward(shim, shape, dtype, is_causal=is_causal)
                check_backward(shim, shape, dtype, inputs=(q, k, v + 1.0, grad + 1.0), is_causal=is_causal)
            q[:, :, 3], k[:] = 6e4, k.abs() + 0.5 * 6e4
            k[:, :, 5:] = k[:, :, 5:6]
            out, lse = reference.attention(q, k, v)
            dv = backward(shim, grad, q, k, v, out.to(dtype), lse.contiguous())[2]
            exact = gradients(plain_attention, [x.double() for x in (q, k, v, grad)])[3]
            rough = gradients(plain_attention, [x.float() for x in (q, k, v, grad)])[3]
            assert_as_accurate(dv, exact, rough.to(dtype), "dv", terms=300)
        return
    shape = {
        "long": AttentionShape(1, 2, 140, 150, 40),
        "short": AttentionShape(1, 6, 300, 77, 40),
        "wide": AttentionShape(1, 2, 70, 150, 512),
        "split": AttentionShape(1, 1, 33, 1100, 512),
    }[kernel]
    q, k, v, grad = attention_inputs(shape, dtype)
    for seed, (mask, is_causal) in enumerate([("none", False), ("none", True), ("odd", False)]):
        inputs = 3.0 * q, 3.0 * k, v, grad
        mask = key_mask(shape, mask)
        capability = 1 if kernel == "short" else 90  # where a warp walks several tiles
        options = {"mask": mask, "is_causal": is_causal, "seed": seed, "capability": capability}
        check_forward(shim, shape, dtype, inputs=inputs, **options)


@pytest.mark.parametrize("kernel", ["long", "short", "wide", "split", "backward", "wide backward", "masked"])
def test_the_calls_that_notice_changes_pass(shim, kernel):
    probe(shim("attention_few"), kernel)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_seen(broken_shim, name):
    file, old, new, kernel = BROKEN[name]
    broken = broken_shim("attention_few", {f"cuda/{file}.cuh": (old, new)})
    with pytest.raises(AssertionError):
        probe(broken, kernel)
