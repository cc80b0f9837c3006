"""What the networks return: dataclasses whose fields are attributes, keys and, where not None, positions."""

from __future__ import annotations

import dataclasses
from typing import Any


class Output:
    """Base of the output dataclasses: `out.sample`, `out["sample"]` and `out[0]` are the same."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]
