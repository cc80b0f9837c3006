"""Where a claim's experiment runs: its folder, its trained parts, its progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastldm.errors import ConfigError
from fastldm.training.config import TrainingConfig, differing_keys, load_config, to_mapping
from fastldm.training.loop import Task, train

# More than a claim draws.
_SERIES = 100


@dataclass
class Workspace:
    """A folder for the trained parts, which claims share, and what is shown meanwhile.

    Args:
        folder: runs and findings go there.
        progress: show progress bars.
        seed: of all weights, training pictures and noise.
    """

    folder: Path
    progress: bool = True
    seed: int = 0

    def draw_seed(self, series: int) -> int:
        """Of the noise of a series of pictures, numbered from 0; other seeds share none."""
        return _SERIES * self.seed + series

    def trained(
        self,
        kind: type[TrainingConfig],
        task: Callable[[Any], Task],
        config: str,
        overrides: Sequence[str] = (),
    ) -> tuple[Path, float]:
        """The exported model of a run, trained now unless the folder has it; and the seconds it trained.

        A run that was killed goes on where it stopped; the seconds are then those of its last part.

        Raises:
            ConfigError: the folder holds a run of this name with another configuration.
        """
        fixed = [f"output_dir={self.folder / 'runs'}", f"seed={self.seed}"]
        settings = load_config(kind, config, [*fixed, *overrides])
        run = Path(settings.output_dir) / settings.name
        stamp = run / "seconds.txt"
        if stamp.is_file():
            before = load_config(kind, run / "config.yaml")
            if changed := set(differing_keys(to_mapping(before), to_mapping(settings))) - {"output_dir"}:
                raise ConfigError(
                    f"{run} was trained with other values of {', '.join(sorted(changed))}; remove it or "
                    f"give another --out"
                )
            return run / "model", float(stamp.read_text())
        start = time.perf_counter()
        model = train(settings, lambda: task(settings), resume=True, progress=self.progress)
        seconds = round(time.perf_counter() - start, 1)
        stamp.write_text(f"{seconds}\n")
        return model, seconds

    def fresh(self, name: str) -> Path:
        """A folder below this one without what an earlier call left in it."""
        folder = self.folder / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder
