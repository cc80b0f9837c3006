"""Checkpoints of a training run: `checkpoints/step-000500/` holds everything that the next step depends on.

    model.safetensors   trained weights and buffers, as trained (float32)
    ema.safetensors     their moving average (absent without EMA)
    optimizer.pt        optimiser state, and the loss scaler's with fp16
    state.json          step, EMA updates, number of processes, what the task keeps (latent scaling, the hash
                        of its first stage), the fingerprint of a folder of pictures, the configuration

A checkpoint is written to a temporary folder, flushed and renamed, so a folder named `step-*` is always
complete. No random state is stored: every random number of the loop is a function of (seed, step, micro-step,
process).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastldm import io
from fastldm.errors import CheckpointError

_NAME = re.compile(r"step-\d+")


@dataclass
class Checkpoint:
    """What is restored: see the module's file list."""

    step: int
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    ema_updates: int
    processes: int
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    task: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any] | None = None
    """Fingerprint of the data set; None for one that follows from the configuration."""


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a folder of `list_checkpoints` was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a run killed while it wrote a checkpoint left behind."""
    for path in Path(folder).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: it could not be written (full disk, no permission); the older ones are untouched.
    """
    folder = Path(folder)
    target = folder / f"step-{checkpoint.step:06d}"
    older = list_checkpoints(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with io.atomic_folder(target) as temporary:
            save_file(_contiguous(checkpoint.model), temporary / "model.safetensors")
            if checkpoint.ema is not None:
                save_file(_contiguous(checkpoint.ema), temporary / "ema.safetensors")
            optimizer = {"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler}
            torch.save(optimizer, temporary / "optimizer.pt")
            state = {
                "step": checkpoint.step,
                "ema_updates": checkpoint.ema_updates,
                "processes": checkpoint.processes,
                "task": checkpoint.task,
                "config": checkpoint.config,
                "data": checkpoint.data,
            }
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError, safetensors as SafetensorError.
        last = f"the last checkpoint is {older[-1]}" if older else "there is no older checkpoint"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"cannot write the checkpoint {target}: {reason}; {last}") from error
    older = [path for path in older if path != target]
    for path in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint folder onto the CPU.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    path = Path(path)
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        ema = path / "ema.safetensors"
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        return Checkpoint(
            step=state["step"],
            model=load_file(path / "model.safetensors"),
            ema=load_file(ema) if ema.exists() else None,
            ema_updates=state["ema_updates"],
            processes=state["processes"],
            optimizer=optimizer["optimizer"],
            scaler=optimizer["scaler"],
            task=state["task"],
            config=state["config"],
            data=state.get("data"),  # absent before fingerprints were kept
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {reason}; remove that folder to resume from an older one"
        ) from error


def load_weights(module: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Put the checkpoint's weights into `module`.

    Raises:
        CheckpointError: the checkpoint belongs to another architecture; names the keys that differ.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - checkpoint.model.keys())
    unexpected = sorted(checkpoint.model.keys() - own.keys())
    shapes = [
        f"{k} {tuple(checkpoint.model[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(own.keys() & checkpoint.model.keys())
        if checkpoint.model[k].shape != own[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint {path} is of another architecture: keys {'; '.join(problems)}")
    module.load_state_dict(checkpoint.model)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
