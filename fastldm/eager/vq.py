"""Nearest code by matrix products, exact: what float32 leaves open is ranked again in float64.

For rows z' = z - c and codes e' = e - c (c the mean code, subtracted in float64, which makes the numbers small and the
bound tight) the score ||e'_k||^2 - 2 z'.e'_k orders the codes as the distance does. Rounded to float32 its error is at most

    bound = g * (E^2 + 2 ||z'|| E) + tiny,   g = n u / (1 - n u),   n = D + 8,   u = 2^-24,   E = max_k ||e'_k||

for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); 8 covers the rounding of
z', e', ||e'||^2 and the final subtraction, `tiny` products that underflow. So only codes within 2 * bound of the best score
can be the nearest. One candidate is the answer; several are compared by their float64 distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation

_SCORES = 1 << 19  # float32 scores held at once: 2 MB
_DOUBLES = 1 << 17  # float64 numbers held at once by the second ranking: 1 MB
_TINY = 2.0**-126


def _roundoff(z: Tensor) -> float:
    """The unit roundoff of the inputs of a float32 matrix product: larger where the user lets PyTorch use TF32 or bfloat16."""
    if torch.get_float32_matmul_precision() == "highest":
        return 2.0**-24
    return 2.0**-8


def vq_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The float64 argmin, without an N x K array. Arguments as `fastldm.ops.vq_nearest`."""
    flat = z.reshape(-1, z.shape[-1])
    centre = codebook.double().mean(dim=0)
    centred = codebook.double() - centre
    norms = centred.square().sum(dim=1)
    largest = norms.max().sqrt()
    transposed, norms = centred.float().t().contiguous(), norms.float()
    n = (z.shape[-1] + 8) * 2.0**-24 + 3 * (_roundoff(z) - 2.0**-24)
    relative = n / (1.0 - n)

    rows = max(1, min(flat.shape[0], _SCORES // codebook.shape[0]))
    scores = transposed.new_empty(rows, codebook.shape[0])
    indices = torch.empty(flat.shape[0], dtype=torch.int64, device=z.device)
    for start in range(0, flat.shape[0], rows):
        chunk = flat[start : start + rows]
        shifted = chunk.double() - centre
        bound = relative * (largest.square() + 2.0 * shifted.norm(dim=1) * largest) + z.shape[-1] * 4 * _TINY
        score = torch.addmm(norms, shifted.float(), transposed, alpha=-2.0, out=scores[: chunk.shape[0]])
        best = score.amin(dim=1)
        # Rounded up, and "not greater" so that NaN counts as open.
        limit = torch.nextafter((best.double() + 2.0 * bound).float(), best.new_tensor(torch.inf))
        open_codes = (score > limit.unsqueeze(1)).logical_not_()
        row, code = open_codes.nonzero(as_tuple=True)
        if row.numel() == chunk.shape[0]:
            indices[start : start + rows] = code
        else:
            indices[start : start + rows] = _rank_again(chunk, codebook, open_codes)
    return indices.reshape(z.shape[:-1])


def _rank_again(chunk: Tensor, codebook: Tensor, open_codes: Tensor) -> Tensor:
    """The candidate of least float64 distance in each row, the lowest of equals."""
    row, code = open_codes.nonzero(as_tuple=True)
    distance = torch.cat(
        [
            (chunk[r].double() - codebook[c].double()).square().sum(dim=1)
            for r, c in zip(*(x.split(max(1, _DOUBLES // chunk.shape[1])) for x in (row, code)))
        ]
    )
    rows = chunk.shape[0]
    least = distance.new_full((rows,), torch.inf).scatter_reduce_(0, row, distance, "amin")
    # A row whose distances are all NaN or infinite keeps every candidate, so it gets index 0.
    winner = ~(distance > least[row])
    return torch.full((rows,), codebook.shape[0] - 1, device=code.device).scatter_reduce_(
        0, row[winner], code[winner], "amin"
    )


def vq_ema_update(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """counts and sums per code. Arguments as `fastldm.ops.vq_ema_update`."""
    flat, index = z.reshape(-1, z.shape[-1]), indices.reshape(-1)
    counts = torch.bincount(index, minlength=num_codes)
    if z.device.type == "cpu":
        sums = torch.zeros(num_codes, z.shape[-1], dtype=torch.float32)
        return counts, sums.index_add_(0, index, flat.float())
    # Atomic adds have no fixed order: sort, then add each code's rows as one segment.
    order = torch.argsort(index, stable=True)
    return counts, torch.segment_reduce(flat[order].float(), "sum", lengths=counts, axis=0, unsafe=True)


NEAREST = Implementation(forward=vq_nearest)
EMA_UPDATE = Implementation(forward=vq_ema_update)
