"""Trains a run up to a step in a process of its own, and says how long that took and how much memory.

A process of its own, because the most memory that a process ever held cannot be set back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastldm.errors import TrainingError


@dataclass(frozen=True)
class Timed:
    """`seconds` of the training, start and export included; `rate` in images a second of its steps alone;
    bytes held at most, and before it began."""

    model: str
    seconds: float
    rate: float
    peak_bytes: int
    idle_bytes: int


def train_to(step: int, config: str, overrides: Sequence[str]) -> Timed:
    """Train the latent diffusion run `config` with `overrides` on to `step`, by two steps at least.

    Raises:
        TrainingError: the process failed; what it wrote last is the message.
    """
    command = [sys.executable, "-m", "fastldm.reproduce.timed", config, *overrides, f"max_steps={step}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise TrainingError(f"training {config} in a process of its own failed: {lines[-1]}")
    return Timed(**json.loads(answer.stdout.splitlines()[-1]))


def memory(key: str) -> int:
    """Bytes of this process: "VmHWM" its most so far, "VmRSS" now; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def main(config: str, *overrides: str) -> None:
    from fastldm.training.config import LatentDiffusionConfig, load_config
    from fastldm.training.latent_diffusion import LatentDiffusionTask
    from fastldm.training.loop import train

    class Watched(LatentDiffusionTask):
        """Notes when each step begins."""

        def prepare(self, batch: dict, generator: torch.Generator) -> dict:
            begun.append(time.perf_counter())
            return super().prepare(batch, generator)

    begun: list[float] = []
    settings = load_config(LatentDiffusionConfig, config, overrides)
    idle, start = memory("VmRSS"), time.perf_counter()
    model = train(settings, lambda: Watched(settings), resume=True, progress=False)
    seconds = time.perf_counter() - start
    rate = settings.batch_size * (len(begun) - 1) / (begun[-1] - begun[0])
    timed = Timed(str(model), seconds, rate, memory("VmHWM"), idle)
    print(json.dumps(timed.__dict__))


if __name__ == "__main__":
    main(*sys.argv[1:])
