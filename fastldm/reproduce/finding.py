"""What a claim's experiment found: numbers with intervals, a verdict, and their files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fastldm._version import __version__
from fastldm.errors import CheckpointError
from fastldm.evaluation.statistics import Score
from fastldm.io import atomic_write, write_json
from fastldm.pictures import png_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINDING, PLOT, PICTURES = "finding.json", "plot.png", "pictures.png"


@dataclass(frozen=True)
class Measurement:
    """One number: `quantity` under `setting`, its 95% interval, and from how many samples (pictures, runs).

    `value` is None where nothing is known, and the interval then holds all that is possible.
    """

    quantity: str
    setting: Mapping[str, str | float]
    value: float | None
    interval: tuple[float, float]
    count: int

    @classmethod
    def of_score(cls, quantity: str, score: Score, **setting: str | float) -> Measurement:
        return cls(quantity, setting, score.accuracy, score.interval, score.total)

    def __str__(self) -> str:
        value = "unknown" if self.value is None else f"{self.value:.3g}"
        return f"{value} ({self.interval[0]:.3g} to {self.interval[1]:.3g})"


@dataclass
class Finding:
    """The outcome of one claim.

    `holds` is True or False where the interval of what the claim compares leaves no doubt, else None.
    `settings` is what somebody needs to know to judge the numbers: sizes, steps, seconds. `seed` is that of
    everything random, trainings included.
    """

    claim: str
    statement: str
    holds: bool | None
    verdict: str
    measurements: list[Measurement]
    settings: dict[str, Any]
    seed: int = 0
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    def select(self, quantity: str, **setting: str | float) -> list[Measurement]:
        """The measurements of a quantity whose setting has these entries, in the order in which they came."""
        return [
            m
            for m in self.measurements
            if m.quantity == quantity and all(m.setting.get(key) == value for key, value in setting.items())
        ]

    def save(
        self, folder: str | os.PathLike, plot: Callable[[Finding], Figure], pictures: Image.Image
    ) -> None:
        """Write finding.json, plot.png and pictures.png into `folder`, made if needed."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / PICTURES, png_bytes(pictures))
            write_json(folder / FINDING, asdict(self))
            self.save_plot(folder / PLOT, plot)
        except OSError as error:
            raise CheckpointError(f"cannot write the finding to {folder}: {error}") from error

    def save_plot(self, path: str | os.PathLike, plot: Callable[[Finding], Figure]) -> None:
        import io

        buffer = io.BytesIO()
        # Without the writer's version in it, the same finding gives the same bytes.
        plot(self).savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Finding:
        """Read what `save` wrote."""
        path = Path(folder) / FINDING
        try:
            values = json.loads(path.read_text("utf-8"))
            measurements = [
                Measurement(**{**m, "interval": tuple(m["interval"])}) for m in values.pop("measurements")
            ]
            return cls(measurements=measurements, **values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"cannot read a finding from {path}: {error}") from error


def judge(interval: tuple[float, float], margin: float = 0.0) -> bool | None:
    """Whether a difference is above `margin`: True or False where its interval says so, else None."""
    low, high = interval
    return True if low > margin else False if high <= margin else None


def together(parts: Sequence[bool | None]) -> bool | None:
    """Whether all parts of a claim hold: False where one does not, else None where one is undecided."""
    return False if False in parts else None if None in parts else True


def band(axes: Axes, x: Sequence[float], rows: Sequence[Measurement], label: str) -> None:
    """A line of percentages over `x`, in the band of their intervals."""
    axes.plot(x, [100 * row.value for row in rows], marker="o", label=label)
    low, high = ([100 * row.interval[i] for row in rows] for i in (0, 1))
    axes.fill_between(x, low, high, alpha=0.2)


def says(holds: bool | None) -> str:
    """The beginning of a verdict."""
    return {True: "The claim holds here", False: "The claim does not hold here", None: "Undecided here"}[
        holds
    ]


def _versions() -> dict[str, str]:
    return {
        "fastldm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
