"""Compiling kernels before they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from tqdm.auto import tqdm

from fastldm import dispatch


def warmup(model: object, sizes: Iterable[tuple[int, int]] = (), **inputs) -> dispatch.Recorder:
    """Runs `model` once without gradients, or once for each size, so that no kernel is compiled later on.

    Args:
        model: a module or a pipeline.
        sizes: (height, width) of pictures, in pixels, handed on as `height=` and `width=`.
        inputs: further arguments of the call. A pipeline gets an empty prompt, one step and no progress bar
            by default, where it takes these.

    Returns:
        The calls that ran, as `fastldm.record()` does.
    """
    call = model.forward if isinstance(model, nn.Module) else model.__call__
    accepted = inspect.signature(call).parameters
    if not isinstance(model, nn.Module):
        for name, value in {"prompt": "", "num_inference_steps": 1}.items():
            if name in accepted:
                inputs.setdefault(name, value)
    runs = [{"height": height, "width": width} for height, width in sizes] or [{}]
    unknown = [name for name in {**inputs, **runs[0]} if name not in accepted]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise TypeError(f"{type(model).__name__} takes no {unknown[0]!r}; it takes: {', '.join(accepted)}")
    with torch.no_grad(), dispatch.record() as calls:
        for run in tqdm(runs, desc="warming up", unit="size"):
            model(**inputs, **run)
    return calls
