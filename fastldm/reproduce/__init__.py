"""The lecture's claims as experiments that anybody can run again: `fastldm reproduce CLAIM`.

A claim is a module with `NAME`, `STATEMENT`, `run(workspace)`, which gives a `Finding` and a grid of
pictures, and `plot(finding)`. All of them work on the built-in captioned shapes, graded without learned
weights, from fixed seeds; what they share they train once.
"""

from __future__ import annotations

import importlib
import os
from importlib import resources
from numbers import Integral
from pathlib import Path
from types import ModuleType

from fastldm.errors import InputError
from fastldm.reproduce.finding import Finding
from fastldm.reproduce.workspace import Workspace

__all__ = ["CLAIMS", "Finding", "reproduce", "shipped_finding", "shipped_folder", "shipped_repetitions"]

CLAIMS = ("text-vs-class", "noised-clip", "cfg-vs-clip", "latent-vs-pixel")


def reproduce(
    claim: str, folder: str | os.PathLike = "runs/claims", *, seed: int = 0, progress: bool = True
) -> Finding:
    """Run the experiment of a claim.

    Args:
        claim: one of `CLAIMS`.
        folder: gets CLAIM/finding.json, plot.png and pictures.png, and runs/ with what was trained, which a
            later call uses again.
        seed: of all weights, training pictures and noise; another one needs another folder.
        progress: show progress bars.

    Raises:
        InputError: there is no such claim, or `seed` is no whole number from 0.
        ConfigError: `folder` holds runs of other configurations.
        CheckpointError: something cannot be written there.
    """
    module = _module(claim)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed={seed!r}: give a whole number from 0")
    finding, pictures = module.run(Workspace(Path(folder), progress, int(seed)))
    finding.save(Path(folder) / claim, module.plot, pictures)
    return finding


def shipped_finding(claim: str) -> Finding:
    """What the experiment found on our machine, with seed 0; see `fastldm/assets/claims`."""
    return Finding.load(shipped_folder(claim))


def shipped_repetitions(claim: str) -> list[Finding]:
    """What it found with other seeds, each with trainings of its own, in the order of seeds."""
    folders = shipped_folder(claim).glob("seed-*")
    return sorted((Finding.load(folder) for folder in folders), key=lambda finding: finding.seed)


def shipped_folder(claim: str) -> Path:
    """Where its finding.json, plot.png and pictures.png are, and the finding.json of other seeds."""
    _module(claim)
    return Path(str(resources.files("fastldm") / "assets" / "claims" / claim))


def _module(claim: str) -> ModuleType:
    if claim not in CLAIMS:
        raise InputError(f"there is no claim {claim!r}; known are {', '.join(CLAIMS)}")
    return importlib.import_module(f"fastldm.reproduce.{claim.replace('-', '_')}")
