"""The CUDA kernels of attention for head dim 512 under the shim."""

from __future__ import annotations

import pytest
import torch

from fastldm.testing.inputs import attention_inputs
from fastldm.testing.shapes import AttentionShape
from tests.cuda.attention import BACKWARD, FORWARD, HALVES, check_backward, check_forward, key_mask


@pytest.mark.parametrize("masked", [False, True])
def test_split_keys_of_a_wide_head(shim, masked):
    """Two parts; masked, the first has no open key, and causal, the second none that is seen."""
    shape = AttentionShape(1, 1, 33, 1100, 512)
    mask = (torch.arange(1100) >= 600)[None, None, None] if masked else None
    check_forward(shim(FORWARD), shape, torch.float16, mask=mask, capability=90)
    check_forward(shim(FORWARD), shape, torch.bfloat16, is_causal=not masked, capability=80)
    dead = torch.zeros(1, 1, 1, 1100, dtype=torch.bool)
    out, lse = check_forward(shim(FORWARD), shape, torch.float16, mask=dead, capability=90)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# Of one step and several; one row past a tile; walked along in chunks, after statistics of no whole vectors.
LENGTHS = [(5, 9), (33, 64), (64, 33), (301, 20), (21, 300)]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backward_lengths(shim, lengths, capability):
    """With one stage and with two."""
    for dtype, is_causal in zip(HALVES, (True, False)):
        shape = AttentionShape(1, 1, *lengths, 512)
        check_backward(shim(BACKWARD), shape, dtype, is_causal=is_causal, capability=capability)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["padding", "odd"])
def test_backward_masks(shim, kind, is_causal):
    """In chunks of which some have no open key, on the plan of sm_90."""
    for shape in (AttentionShape(2, 1, 40, 260, 512), AttentionShape(2, 1, 260, 20, 512)):
        mask = key_mask(shape, kind)
        results = check_backward(
            shim(BACKWARD), shape, torch.float16, mask=mask, is_causal=is_causal, capability=90, seed=1
        )
        if kind == "padding":
            assert all((x[0] == 0).all() for x in results)


def test_chunks_are_added_in_order(shim):
    """The same bits whatever the order of blocks, in heads that lie apart."""
    shape = AttentionShape(1, 2, 20, 270, 512)
    inputs = attention_inputs(shape, torch.bfloat16, layout="packed")
    results = [
        check_backward(shim(BACKWARD), shape, torch.bfloat16, inputs=inputs, capability=90, seed=seed)
        for seed in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))
