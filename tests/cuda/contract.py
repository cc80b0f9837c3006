"""What the kernels of csrc/cuda refuse by contract, for the tests that run over every backend."""

from __future__ import annotations

import re

# Each operation's reasons, as `supports` and `supports_backward` in fastldm/native/cuda/ say them.
REFUSALS = {
    "attention": (
        r"takes float16 and bfloat16; float32 would lose bits",
        r"takes head dims up to \d+ on a GPU whose blocks have \d+ KiB",
    ),
    "group_norm": (
        r"takes up to 2048 channels per group",
        r"takes less than 2\^27 groups",
        r"takes up to 2\^30 channels",
        r"takes up to 2\^30 pixels",
        r"takes less than 2\^32 elements per group",
    ),
    "vq_nearest": (r"takes up to 4096 dimensions", r"takes up to 2\^28 codes"),
    "vq_ema_update": (r"takes up to 2\^28 codes",),
}
_EVERYWHERE = r"takes float32, bfloat16 and float16, not"
_MESSAGE = re.compile(r"backend 'cuda' cannot run (\w+) (?:forward|backward): (.*); use backend='auto'")


def refused_by_contract(message: str) -> str | None:
    """The reason in the message of an UnsupportedError, where the contract of the `cuda` backend has it."""
    found = _MESSAGE.fullmatch(message)
    if found is None:
        return None
    op, reason = found.groups()
    listed = (_EVERYWHERE, *REFUSALS.get(op, ()))
    return reason if any(re.match(pattern, reason) for pattern in listed) else None
