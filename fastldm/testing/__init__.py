"""What tests and benchmarks share: named shapes, seeded inputs, plain PyTorch oracles and the rules for
errors."""

from __future__ import annotations

from fastldm import dispatch
from fastldm.implementation import Implementation
from fastldm.testing.oracles import plain_attention, plain_group_norm
from fastldm.testing.poison import poisoned_memory
from fastldm.testing.tolerances import assert_as_accurate, assert_same_special_values, rounding_atol

__all__ = [
    "assert_as_accurate",
    "assert_same_special_values",
    "live_backends",
    "plain_attention",
    "plain_group_norm",
    "poisoned_memory",
    "rounding_atol",
]


def live_backends(op: str) -> list[str]:
    """The backends that have an implementation of `op` here."""
    return [name for name in dispatch.BACKENDS if isinstance(dispatch.find(name, op), Implementation)]
