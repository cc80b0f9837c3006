"""Launches to compile ahead of time, from tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import product

import torch

from ..common import tables
from ..common.launch import Launch
from ..common.target import Target
from . import configs
from .plans import plan_backward, plan_forward
from .problem import pieces, problem_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Head dims with pieces of their own, beside those of layers.
OTHER_HEAD_DIMS = (8, 72, 104, 208)


def plan(
    shape: tuple[int, int, int, int, int],
    dtype: str,
    target: Target,
    *,
    mask: str = "none",
    is_causal: bool = False,
    scale: float | None = None,
    need_lse: bool = True,
    aligned: bool = True,
) -> list[Launch]:
    """Forward and backward of (B, H, Sq, Sk, D). Masks: "none", "keys", "full", "bias" or "bias-keys"."""
    batch, heads, queries, keys, head_dim = shape

    def tensor(length: int) -> torch.Tensor:
        size = head_dim if aligned else head_dim + 1
        x = torch.empty(batch, heads, length, size, dtype=DTYPES[dtype], device="meta")
        return x[..., :head_dim]

    q, k = tensor(queries), tensor(keys)
    masks = {
        "none": None,
        "keys": torch.empty(batch, 1, 1, keys, dtype=torch.bool, device="meta"),
        "full": torch.empty(batch, heads, queries, keys, dtype=torch.bool, device="meta"),
        "bias": torch.empty(batch, heads, queries, keys, device="meta"),
        "bias-keys": torch.empty(batch, 1, 1, keys, device="meta"),
    }
    problem = problem_of(q, k, masks[mask], is_causal, scale)
    launches, out, _ = plan_forward(q, k, k, problem, need_lse, target)
    if need_lse:
        lse = torch.empty(batch, heads, queries, device="meta")
        launches = launches + plan_backward(q, q, k, k, out, lse, problem, target)[0]
    return launches


def _calls(target: Target, layers: Mapping[str, tuple], thorough: bool) -> Iterator[tuple[str, list[Launch]]]:
    """The layers in bfloat16 and a few more; if thorough other dtypes, all sets of pieces and all options."""
    seen_head_dims = set()
    for name, shape in layers.items():
        shape = tuple(shape)
        yield name, plan(shape, "bfloat16", target)
        head_dim_and_keys = shape[4], shape[3] <= 128
        if thorough and head_dim_and_keys not in seen_head_dims:
            seen_head_dims.add(head_dim_and_keys)
            yield f"{name} float16", plan(shape, "float16", target)
            yield f"{name} float32", plan(shape, "float32", target)
    shape = (2, 8, 1024, 1024, 40)
    yield "split", plan((1, 1, 64, 8192, 64), "bfloat16", target)
    yield "d40 causal keys", plan(shape, "bfloat16", target, mask="keys", is_causal=True)
    if not thorough:
        return
    for head_dim, keys in product(OTHER_HEAD_DIMS, (1024, 77)):
        yield f"d{head_dim} k{keys}", plan((2, 8, 1024, keys, head_dim), "bfloat16", target)
    yield "128 keys", plan((2, 8, 1024, 128, 40), "bfloat16", target)
    for keys in (1024, 77):
        shape = (2, 8, 1024, keys, 40)
        for mask in ("keys", "full", "bias", "bias-keys"):
            yield f"d40 k{keys} {mask}", plan(shape, "bfloat16", target, mask=mask)
        for mask in ("keys", "bias"):
            yield f"d40 k{keys} {mask} causal", plan(shape, "bfloat16", target, mask=mask, is_causal=True)
        for options in ({"is_causal": True}, {"scale": -1.0}, {"need_lse": False}, {"aligned": False}):
            yield f"d40 k{keys} {options}", plan(shape, "bfloat16", target, **options)
    yield "d512 bias causal", plan((1, 1, 1024, 1024, 512), "bfloat16", target, mask="bias", is_causal=True)
    yield "d512 in parts", plan((1, 1, 16384, 16384, 512), "bfloat16", target)


def _tabled(target: Target) -> Iterator[tuple[str, list[Launch]]]:
    """Every entry of the tables of this target, in a call that takes it."""
    for (kernel, frozen), config in tables.entries(configs.OP, target.capability).items():
        key = dict(frozen)
        shape = (2, 8, 1024, key.get("keys", 1024), key["head_dim"])
        forced = tables.forcing(configs.OP, kernel, configs.KERNELS[kernel](**config))
        with forced if kernel in configs.KERNELS else nullcontext():
            yield f"table {kernel} {key}", plan(shape, key["dtype"], target)


def _identity(launch: Launch) -> tuple:
    """What the compiled code depends on."""

    def kind(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype)
        return type(value).__name__ if isinstance(value, float) else value

    constants = {
        name: kind(value) for name, value in launch.arguments.items() if name.isupper() or name[-1].isdigit()
    }
    pointers = {name: kind(v) for name, v in launch.arguments.items() if name.endswith("_ptr")}
    return (
        launch.kernel.fn.__name__,
        tuple(sorted(constants.items())),
        tuple(sorted(pointers.items(), key=str)),
        launch.num_warps,
        launch.num_stages,
    )


def aot_launches(
    target: Target, layers: Mapping[str, Iterable[int]], *, thorough: bool
) -> Iterator[tuple[str, Launch]]:
    """(name, launch), none twice. `layers`: name -> (B, H, Sq, Sk, D)."""
    seen = set()
    for source in (_calls(target, layers, thorough), _tabled(target)):
        for name, launches in source:
            for launch in launches:
                identity = _identity(launch)
                if identity not in seen:
                    seen.add(identity)
                    yield f"{name}: {launch.kernel.fn.__name__}", launch


def may_spill(launch: Launch, target: Target) -> bool:
    """Where no claim is made.

    float32; causal; mma.sync at head dims of 88 to 112 and over 160; and, of few keys
    in float16, the dq of a head dim over 128, which takes dS in twice the precision.
    """
    width = sum(pieces(launch.arguments["HEAD_DIM"]))
    for name in ("q_ptr", "v_ptr", "x_ptr"):
        x = launch.arguments.get(name)
        if x is not None and x.dtype == torch.float32:
            return True
    if launch.arguments.get("CAUSAL", False):
        return True
    if launch.arguments.get("RESTS", False) and "partial_ptr" in launch.arguments and width > 128:
        return True
    return configs.registers_hold_operands(target) and (width in (96, 112) or width > 160)
