"""The launches that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..common import tables
from ..common.launch import Launch
from ..common.rows import rows_of
from ..common.target import Target
from . import configs
from .ema_update import plan_sums
from .nearest import plan_nearest

_CONFIGS = {
    "search_few": configs.FewConfig,
    "search_many": configs.ManyConfig,
    "finish": configs.FinishConfig,
    "ema_update": configs.EmaConfig,
}


def aot_launches(
    target: Target, layers: Mapping[str, tuple[int, int, int]], *, thorough: bool
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) for `layers` {name: (rows, codes, dim)} and for every entry of the table of `target`.

    `thorough`: every layer in float32, and all dtypes and the dimensions at which the kernels change; else
    one layer for each codebook, in bfloat16. A launch that compiles to the same code as one before is left
    out.
    """
    seen: set[tuple] = set()
    for name, launch in _all(target, layers, thorough):
        identity = _identity(launch)
        if identity not in seen:
            seen.add(identity)
            yield f"{name}/{launch.kernel.fn.__name__}", launch


def _all(
    target: Target, layers: Mapping[str, tuple[int, int, int]], thorough: bool
) -> Iterable[tuple[str, Launch]]:
    if thorough:
        problems = {name: (*shape, torch.float32, torch.float32) for name, shape in layers.items()}
        for dim in (3, 256):
            for z, codebook in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
                problems[f"{dim}-{z}"] = (65536, 1024, dim, z, codebook)
        for dim in (1, 16, 300):
            problems[f"dim-{dim}"] = (4096, 1024, dim, torch.float32, torch.float32)
    else:
        largest = {
            shape[1:]: (name, shape) for name, shape in sorted(layers.items(), key=lambda item: item[1])
        }
        problems = {name: (*shape, torch.bfloat16, torch.bfloat16) for name, shape in largest.values()}
    for name, problem in problems.items():
        yield from _launches(name, problem, target)
    for (kernel, frozen), config in tables.entries(configs.OP, target.capability).items():
        key = dict(frozen)
        problem = (key["rows"], key.get("codes", 1024), key["dim"], torch.float32, torch.float32)
        with tables.forcing(configs.OP, kernel, _CONFIGS[kernel](**config)):
            yield from _launches(f"table-{key}", problem, target)


def _launches(name: str, problem: tuple, target: Target) -> Iterator[tuple[str, Launch]]:
    num_rows, num_codes, dim, z_dtype, codebook_dtype = problem
    z = torch.empty(num_rows, dim, dtype=z_dtype, device="meta")
    codebook = torch.empty(num_codes, dim, dtype=codebook_dtype, device="meta")
    for launch in plan_nearest(z, codebook, target)[0]:
        yield name, launch
    order = torch.empty(num_rows, dtype=torch.int64, device="meta")
    starts = torch.empty(num_codes + 1, dtype=torch.int64, device="meta")
    for launch in plan_sums(rows_of(z), order.int(), order, starts, target)[0]:
        yield name, launch


def _identity(launch: Launch) -> tuple:
    """Equal for launches that Triton compiles once: it tells numbers apart by 1, multiples of 16, and 32
    bits."""
    parts = []
    plain = launch.kernel.do_not_specialize
    for name, value in sorted(launch.arguments.items()):
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif name in plain:
            value = value < 1 << 31
        elif not name.isupper():
            value = (value == 1, value % 16 == 0, value < 1 << 31)
        parts.append((name, value))
    return launch.kernel.fn.__name__, tuple(parts), tuple(launch.options.items())


def may_spill(launch: Launch, target: Target) -> bool:
    """Where no claim is made: what is not the search itself, and 256 dimensions at once on sm_90."""
    return not launch.kernel.fn.__name__.startswith("search") or launch.arguments.get("BLOCK_D", 0) >= 256
