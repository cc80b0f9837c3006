"""Compiling kernels before they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from tqdm.auto import tqdm

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputError, InputTypeError


def warmup(model: object, *args, sizes: Iterable[tuple[int, int]] = (), **inputs) -> dispatch.Recorder:
    """Runs `model` once without gradients, or once for each size, so that its kernels are compiled by then.

    Args:
        model: a module or a pipeline.
        args, inputs: what the call takes. A pipeline gets an empty prompt (unless one, or its embedding, is
            given) and one step by default, where it takes these.
        sizes: (height, width) of pictures, in pixels, handed on as `height=` and `width=`.

    Returns:
        The calls that ran, as `fastldm.record()` does. In training mode batch norms count these runs.

    Raises:
        InputTypeError: `model` cannot be called, or does not take an argument.
        InputError: sizes that are no pairs.
    """
    if not callable(model) or isinstance(model, type):
        raise InputTypeError(f"model must be a module or a pipeline, an instance, got {shown(model)}")
    sizes = list(sizes)
    if not all(isinstance(size, tuple | list) and len(size) == 2 for size in sizes):
        raise InputError(f"sizes must be pairs (height, width), got {shown(sizes)}")
    call = model.forward if isinstance(model, nn.Module) else model.__call__
    accepted = inspect.signature(call).parameters
    if not isinstance(model, nn.Module):
        prompted = args or any(name.startswith("prompt") for name in inputs)
        for name, value in {"prompt": "", "num_inference_steps": 1}.items():
            if name in accepted and not (name == "prompt" and prompted):
                inputs.setdefault(name, value)
    if sizes and "height" not in accepted:
        raise InputTypeError(
            f"sizes: {type(model).__name__} takes no height and width; pass its inputs instead"
        )
    unknown = [name for name in inputs if name not in accepted]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise InputTypeError(
            f"{type(model).__name__} takes no {unknown[0]!r}; it takes: {', '.join(accepted)}"
        )
    runs = [{"height": height, "width": width} for height, width in sizes] or [{}]
    with torch.no_grad(), dispatch.record() as calls:
        for run in tqdm(runs, desc="warming up", unit="size", disable=len(runs) == 1):
            model(*args, **inputs, **run)
    return calls
