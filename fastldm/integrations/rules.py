"""What a rule is, and which there are.

A rule looks at a module and says what would compute there instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Match(NamedTuple):
    """A module, or the object in one of its attributes, that fastldm knows.

    Args:
        op: the operation that takes over.
        now: what will compute there, in words.
        make: (base class, backend) -> the members of the subclass that does so.
        attribute: of the module, which holds the object that changes its class; None: the module itself.
        covers: attributes of the module whose own matches are part of this one.
        skipped: why it is left as it is; `now` and `make` are then without meaning.
    """

    op: str
    now: str = ""
    make: Callable[[type, str], dict] | None = None
    attribute: str | None = None
    covers: tuple[str, ...] = ()
    skipped: str | None = None


def is_own(cls: type) -> bool:
    """Whether a class is fastldm's, and runs on its operations by itself."""
    return cls.__module__.partition(".")[0] == "fastldm"


Rule = Callable[[nn.Module], Match | None]


def rules() -> list[Rule]:
    """Those of torch.nn, before them those of the libraries that are imported."""
    from fastldm.integrations import torch_nn

    found = list(torch_nn.RULES)
    if sys.modules.get("diffusers") is not None:
        from fastldm.integrations import diffusers

        found = [*diffusers.RULES, *found]
    return found
