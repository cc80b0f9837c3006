"""vq_nearest: plans and runs the launches. Contract: fastldm/ops/vq.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launch import Launch, ceil_div
from ..common.rows import Rows, rows_of
from ..common.support import refuse
from ..common.target import Target, target_of
from . import configs
from .bound import relative_error_few, relative_error_many
from .finish import finish
from .search_few import pack_few, search_few
from .search_many import pack_many, search_many

_SAMPLE = 64  # codes whose mean is the centre
_PACKED = 128  # codes that a program packs
_PROGRAMS = 4  # of the search, per multiprocessor; where the tiles of rows are fewer, some share the codes


def supports(z: Tensor, codebook: Tensor) -> str | None:
    if z.shape[-1] > 4096:
        return f"takes up to 4096 dimensions, not {z.shape[-1]}"
    if codebook.shape[0] > 1 << 28:
        return f"takes up to 2^28 codes, not {codebook.shape[0]}"
    return refuse(z, codebook)


def forward(z: Tensor, codebook: Tensor) -> Tensor:
    launches, index = plan_nearest(z, codebook, target_of(z.device))
    for launch in launches:
        launch.run()
    return index


def plan_nearest(z: Tensor, codebook: Tensor, target: Target) -> tuple[list[Launch], Tensor]:
    """The launches for z (..., D), not empty, and the tensor that they write.

    Beside the result they need the packed codebook (4 bytes for each number in it and each code), and 12
    bytes for each row and split of the codebook. There are splits only where the tiles of rows are few, so
    that these are 16 bytes a row or about half a megabyte in all.
    """
    index = torch.empty(z.shape[:-1], dtype=torch.int64, device=z.device)
    rows = rows_of(z)
    plan = _plan_few if rows.dim <= configs.FEW else _plan_many
    return plan(rows, codebook, index, target), index


def _plan_few(rows: Rows, codebook: Tensor, index: Tensor, target: Target) -> list[Launch]:
    num_codes, dim = codebook.shape
    config = configs.few(dim, num_codes, rows.count, target)
    block = config.lanes * config.depth
    blocks = ceil_div(num_codes, block)
    pack_programs = ceil_div(blocks * block, _PACKED)
    codes = _codes(codebook, (dim, pack_programs * _PACKED), torch.float32)
    largest = codebook.new_empty(pack_programs, dtype=torch.float32)
    pack = Launch(
        pack_few,
        (pack_programs,),
        {
            **codes,
            "largest_ptr": largest,
            "DIM": dim,
            "LANES": config.lanes,
            "DEPTH": config.depth,
            "BLOCK": _PACKED,
            "SAMPLE": _SAMPLE,
        },
        num_warps=4,
        fuse_multiply_add=False,
    )
    tiles = ceil_div(rows.count, config.rows)
    per_split, splits = _splits(tiles, blocks, target)
    found = _found(splits, rows)
    search = Launch(
        search_few,
        (tiles, splits),
        {
            **rows.arguments(),
            **{name: codes[name] for name in ("packed_ptr", "norms_ptr", "padded", "centre_ptr")},
            **found,
            "largest_ptr": largest,
            "largest_count": pack_programs,
            "blocks": blocks,
            "blocks_per_split": per_split,
            "DIM": dim,
            "ROWS": config.rows,
            "LANES": config.lanes,
            "DEPTH": config.depth,
            "UNROLL": config.unroll,
            "RELATIVE": relative_error_few(dim),
        },
        num_warps=config.num_warps,
        fuse_multiply_add=False,
    )
    order = {
        "LANES": config.lanes,
        "DEPTH": config.depth,
        "SCALED": 0,
        "LOW": 0,
        "scales_ptr": codes["norms_ptr"],
    }
    return [pack, search, _finish(rows, codes, found, splits, index, order, target)]


def _plan_many(rows: Rows, codebook: Tensor, index: Tensor, target: Target) -> list[Launch]:
    num_codes, dim = codebook.shape
    config = configs.many(dim, num_codes, rows.count, target)
    chunks = ceil_div(dim, config.block_d)
    padded_dim = chunks * config.block_d
    tiles_of_codes = ceil_div(num_codes, config.codes)
    codes = _codes(codebook, (2 * padded_dim, tiles_of_codes * config.codes), torch.float16)
    scales, largest = (codebook.new_empty(tiles_of_codes, dtype=torch.float32) for _ in range(2))
    pack = Launch(
        pack_many,
        (tiles_of_codes,),
        {
            **codes,
            "scales_ptr": scales,
            "largest_ptr": largest,
            "DIM": dim,
            "PADDED_DIM": padded_dim,
            "CODES": config.codes,
            "BLOCK_D": min(32, config.block_d),
            "SAMPLE": _SAMPLE,
        },
        num_warps=4,
        fuse_multiply_add=False,
    )
    tiles = ceil_div(rows.count, config.rows)
    per_split, splits = _splits(tiles, tiles_of_codes, target)
    found = _found(splits, rows)
    search = Launch(
        search_many,
        (tiles, splits),
        {
            **rows.arguments(),
            **{name: codes[name] for name in ("packed_ptr", "norms_ptr", "padded", "centre_ptr")},
            **found,
            "scales_ptr": scales,
            "largest_ptr": largest,
            "largest_count": tiles_of_codes,
            "tiles": tiles_of_codes,
            "tiles_per_split": per_split,
            "DIM": dim,
            "BLOCK_D": config.block_d,
            "CHUNKS": chunks,
            "ROWS": config.rows,
            "CODES": config.codes,
            "RELATIVE": relative_error_many(padded_dim if chunks == 1 else 3 * padded_dim),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        fuse_multiply_add=False,
    )
    order = {"LANES": 1, "DEPTH": 1, "SCALED": config.codes, "LOW": padded_dim, "scales_ptr": scales}
    return [pack, search, _finish(rows, codes, found, splits, index, order, target)]


def _codes(codebook: Tensor, packed_shape: tuple[int, int], dtype: torch.dtype) -> dict[str, int | Tensor]:
    """The codebook and what packing it fills, as the kernels name them."""
    return {
        "codebook_ptr": codebook,
        "stride_k": codebook.stride(0),
        "stride_cd": codebook.stride(1),
        "num_codes": codebook.shape[0],
        "packed_ptr": codebook.new_empty(packed_shape, dtype=dtype),
        "norms_ptr": codebook.new_empty(packed_shape[1], dtype=torch.float32),
        "padded": packed_shape[1],
        "centre_ptr": codebook.new_empty(codebook.shape[1], dtype=torch.float32),
    }


def _splits(tiles: int, blocks: int, target: Target) -> tuple[int, int]:
    """Blocks for one program, and how many programs share the codes."""
    wanted = min(blocks, _PROGRAMS * target.multiprocessors // tiles)
    per_split = ceil_div(blocks, max(1, wanted))
    return per_split, ceil_div(blocks, per_split)


def _found(splits: int, rows: Rows) -> dict[str, Tensor]:
    """What the search writes, as the kernels name it."""
    least, others, slack = (
        rows.tensor.new_empty(shape, dtype=torch.float32)
        for shape in ((splits, rows.count), (splits, rows.count), (rows.count,))
    )
    place = least.new_empty(least.shape, dtype=torch.int32)
    return {"least_ptr": least, "others_ptr": others, "place_ptr": place, "slack_ptr": slack}


def _finish(
    rows: Rows,
    codes: dict[str, int | Tensor],
    found: dict[str, Tensor],
    splits: int,
    index: Tensor,
    order: dict[str, int | Tensor],
    target: Target,
) -> Launch:
    config = configs.finish(rows.dim, rows.count, target)
    return Launch(
        finish,
        (ceil_div(rows.count, config.rows),),
        {
            **rows.arguments(),
            **codes,
            **order,
            **found,
            "splits": splits,
            "index_ptr": index,
            "DIM": rows.dim,
            "UNROLL": _unroll(rows.dim),
            "ROWS": config.rows,
            "RANKED": config.ranked,
            "TOGETHER": config.together,
            "TOGETHER_RANKED": config.together_ranked,
        },
        num_warps=config.num_warps,
        fuse_multiply_add=False,
    )


def _unroll(dim: int) -> int:
    """How many dimensions a loop over them takes at a time: it has no remainder."""
    return dim if dim <= 4 else next(step for step in (4, 3, 2, 1) if dim % step == 0)
