"""What `fastldm.apply` did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from fastldm.text import as_table


@dataclass(frozen=True)
class Entry:
    """One place in a model: what computed there (`was`), what does now (`now`), or why not (`skipped`).

    `path` is that of the module, as in `named_modules`, before it the name of the pipeline's component;
    ".processor" at its end stands for the attention processor of the module. `backend` is what the call of
    the operation asks for.
    """

    path: str
    op: str
    was: str
    now: str | None
    backend: str | None
    skipped: str | None = None


@dataclass
class Report:
    """The entries, in the order of the model. Prints as a table."""

    entries: list[Entry] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.skipped is None]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.skipped is not None]

    def to_dict(self) -> dict:
        """`{"entries": [{"path", "op", "was", "now", "backend", "skipped"}, ...]}`."""
        return {"entries": [asdict(entry) for entry in self.entries]}

    def __str__(self) -> str:
        if not self.entries:
            return "nothing to replace: no module is known to fastldm, or all run on its operations already"
        rows = [("path", "op", "was -> now", "backend", "skipped")]
        for entry in self.entries:
            change = entry.was if entry.now is None else f"{entry.was} -> {entry.now}"
            rows.append(
                (entry.path or "(the model)", entry.op, change, entry.backend or "", entry.skipped or "")
            )
        counts = Counter(entry.op for entry in self.replaced)
        total = ", ".join(f"{count} {op}" for op, count in sorted(counts.items())) or "nothing"
        return f"{as_table(rows)}\nreplaced: {total}; skipped: {len(self.skipped)}"
