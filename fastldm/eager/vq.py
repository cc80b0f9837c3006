"""Nearest code by matrix products, exact: what float32 leaves open is ranked again in float64.

With z' = z - c and e' = e - c (c near the mean code, subtracted in float64: small numbers, small errors) the
score ||e'_k||^2 - 2 z'.e'_k orders the codes as the distance does. In float32, for any order of summation, it
is off by at most

    bound = g (E^2 + 2 ||z'|| E) + tiny,   g = n u / (1 - n u),   n = D + 8,   u = 2^-24,   E = max_k ||e'_k||

(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); the 8 pays for rounding z', e' and
||e'||^2 to float32 and for the last addition, `tiny` for what underflows. The float64 distance that decides
is itself off by up to (D + 4) 2^-53 (||z'|| + E)^2, which is added to the bound: codes that vanish beside z
tie. So the best code is the nearest if the next one's score is more than 2 bound away. Otherwise the codes
within 2 bound of the best are compared by their float64 distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation
from fastldm.reference.vq import squared_distance
from fastldm.reference.vq import vq_nearest as _nearest_directly

_SCORES = 1 << 19  # float32 scores held at once: 2 MB
_DOUBLES = 1 << 17  # float64 numbers held at once beside them: 1 MB
_SAFE = 1e38  # past this a float32 score can overflow on the way


def _input_roundoff() -> float:
    """Unit roundoff of the inputs of a float32 matrix product; larger where the user allows TF32 or
    bfloat16."""
    try:
        precise = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # PyTorch refuses to answer once a backend has a setting of its own, such as
        # torch.backends.cuda.matmul.fp32_precision = "tf32".
        precise = False
    return 2.0**-24 if precise else 2.0**-8


class _Codes:
    """The codebook, made ready for `scores`."""

    def __init__(self, codebook: Tensor):
        self.codebook = codebook
        doubles = codebook.double()
        self.centre = doubles.mean(dim=0)
        centred = doubles - self.centre
        norms = centred.square().sum(dim=1)
        self.largest = norms.max().sqrt()
        # One row more: the product with (-2 z', 1) is the score.
        self.matrix = torch.cat([centred.t(), norms.unsqueeze(0)]).float()
        inputs = _input_roundoff()
        error = (codebook.shape[1] + 8) * 2.0**-24 + 3 * (inputs - 2.0**-24)
        self.relative_error = error / (1.0 - error)

    def rows(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(-2 z', 1) in float32, and the bound in float64, for the rows of z (R, D)."""
        shifted = z.double() - self.centre
        length = shifted.square().sum(dim=1).sqrt()
        size = self.largest + 2.0 * length
        tiny = z.shape[1] * 2.0**-124 * (1.0 + size)
        size = size * self.largest
        truth = (z.shape[1] + 4) * 2.0**-53 * (length + self.largest).square()
        bound = (self.relative_error * size + truth + tiny).masked_fill_(~(size < _SAFE), torch.inf)
        return torch.cat([shifted.mul_(-2.0), shifted.new_ones(z.shape[0], 1)], dim=1).float(), bound


def vq_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The float64 argmin, without an N x K array. Arguments as `fastldm.ops.vq_nearest`."""
    if z.numel() * codebook.shape[0] <= _DOUBLES // 4:
        return _nearest_directly(z, codebook)
    codes = _Codes(codebook)
    flat = z.reshape(-1, z.shape[-1])
    indices = torch.empty(flat.shape[0], dtype=torch.int64, device=z.device)
    step = max(1, _DOUBLES // (z.shape[-1] + 1))
    for block, found in zip(flat.split(step), indices.split(step)):
        rows, bound = codes.rows(block)
        gap = _best_and_gap(rows, codes.matrix, found)
        # "Not greater", so that NaN counts as open.
        still_open = (~(gap > 2.0 * bound)).nonzero().squeeze(1)
        if still_open.numel():
            found[still_open] = _rank_again(block[still_open], rows[still_open], bound[still_open], codes)
    return indices.reshape(z.shape[:-1])


def _best_and_gap(rows: Tensor, matrix: Tensor, found: Tensor) -> Tensor:
    """Writes the code of the best score of each row to `found`; how far the next score is, float64."""
    step = min(rows.shape[0], max(1, _SCORES // matrix.shape[1]))
    scores = rows.new_empty(step, matrix.shape[1])
    best, following = rows.new_empty(2, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        score = torch.mm(rows[part], matrix, out=scores[: rows[part].shape[0]])
        torch.min(score, dim=1, out=(best[part], found[part]))
        score.scatter_(1, found[part].unsqueeze(1), torch.inf)
        torch.amin(score, dim=1, out=following[part])
    return following.double() - best


def _rank_again(block: Tensor, rows: Tensor, bound: Tensor, codes: _Codes) -> Tensor:
    """For each row the candidate of least float64 distance, the lowest of equals."""
    count = codes.matrix.shape[1]
    step = max(1, _DOUBLES // count)
    found = []
    for z, row, slack in zip(block.split(step), rows.split(step), bound.split(step)):
        score = row @ codes.matrix
        limit = (score.amin(dim=1).double() + 2.0 * slack).float()
        limit = torch.nextafter(limit, torch.full_like(limit, torch.inf))
        owner, code = (~(score > limit.unsqueeze(1))).nonzero(as_tuple=True)
        distance = torch.cat(
            [
                squared_distance(z[o].double(), codes.codebook[c].double())
                for o, c in zip(*(x.split(max(1, _DOUBLES // z.shape[1])) for x in (owner, code)))
            ]
        )
        least = distance.new_full((z.shape[0],), torch.inf).scatter_reduce_(0, owner, distance, "amin")
        # In a row of NaN or infinity no distance is greater, so every code stays and 0 wins.
        winner = ~(distance > least[owner])
        lowest = code.new_full((z.shape[0],), count)
        found.append(lowest.scatter_reduce_(0, owner[winner], code[winner], "amin"))
    return torch.cat(found)


def vq_ema_update(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """counts and sums per code. Arguments as `fastldm.ops.vq_ema_update`."""
    flat, index = z.reshape(-1, z.shape[-1]), indices.reshape(-1)
    counts = torch.bincount(index, minlength=num_codes)
    if z.device.type == "cpu":
        sums = torch.zeros(num_codes, z.shape[-1], dtype=torch.float32)
        return counts, sums.index_add_(0, index, flat.float())
    return counts, sum_by_segment(flat, index, counts)


def sum_by_segment(z: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Sorts the rows by code and adds them segment by segment; atomic adds would have no fixed order."""
    order = torch.argsort(index, stable=True)
    return torch.segment_reduce(z[order].float(), "sum", lengths=counts, axis=0, unsafe=True)


NEAREST = Implementation(forward=vq_nearest)
EMA_UPDATE = Implementation(forward=vq_ema_update)
