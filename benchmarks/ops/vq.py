"""Nearest-codebook lookup and the sums of a codebook update, at the codebooks of latent diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.checks import spread
from benchmarks.providers import compiled, installed, ours, too_large
from benchmarks.registry import Case, Function, Judge, Op, Problem, Provider, Verdict, Work
from fastldm import reference
from fastldm.testing import assert_as_accurate
from fastldm.testing.inputs import vq_inputs
from fastldm.testing.shapes import VQ, VQ_LAYERS, VQLayer

SHAPES = {**VQ_LAYERS, **{name: VQLayer(60, codebook) for name, codebook in VQ.items()}}
_CHECKED_PRODUCTS = 1 << 27
_CHUNKS = (64, 128, 256, 512, 1024, 2048)
_TRIED_ROWS, _TRIED_ROUNDS = 16384, 5


def _codebook_problem(case: Case) -> Problem:
    rows, codebook = SHAPES[case.shape]
    z, codes = vq_inputs(rows, codebook, case.torch_dtype)
    return Problem(case, ("z", "codebook"), (z.to(case.device), codes.to(case.device)))


def _judge_nearest(problem: Problem) -> Judge:
    """On some rows: the index must be the float64 argmin."""
    z, codebook = (x.cpu() for x in problem.inputs)
    rows = torch.tensor(spread(len(z), max(256, _CHECKED_PRODUCTS // codebook.numel())))
    exact = reference.vq_nearest(z[rows], codebook)

    def judge(results: Sequence[Tensor]) -> Verdict:
        found = results[0].cpu()
        if found.shape != z.shape[:-1] or found.dtype != torch.int64:
            return Verdict(None, f"indices: {tuple(found.shape)} {found.dtype} where {len(z)} int64 are due")
        if not ((found >= 0) & (found < len(codebook))).all():
            return Verdict(None, f"indices outside 0 .. {len(codebook) - 1}")
        wrong = (found[rows] != exact).nonzero().flatten()
        if not len(wrong):
            return Verdict(0.0)
        first = int(wrong[0])
        return Verdict(
            float(len(wrong)),
            f"{len(wrong)} of {len(rows)} rows differ from the float64 argmin, first row {int(rows[first])}: "
            f"got {int(found[rows[first]])}, reference {int(exact[first])}",
        )

    return judge


def _nearest_work(problem: Problem) -> Work:
    z, codebook = problem.inputs
    return Work("matmul", 2.0 * len(z) * codebook.numel())


def _faiss(problem: Problem) -> Function:
    """Its index holds the codebook already."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    codebook = problem.inputs[1]
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())

    def function(z: Tensor, codebook: Tensor) -> Tensor:
        return torch.from_numpy(index.search(z.numpy(), 1)[1][:, 0])

    return function


def _faiss_refuses(case: Case) -> str | None:
    if case.device != "cpu" or case.dtype != "float32":
        return "takes float32 on the CPU only"
    return installed("faiss")(case)


def _chunked(problem: Problem) -> Function:
    """The matrix product and argmin in blocks of rows with buffers kept, the best of some block sizes."""
    z, codebook = problem.inputs
    functions = {rows: _chunked_by(rows, z, codebook) for rows in _CHUNKS if rows <= len(z)} or {
        len(z): _chunked_by(len(z), z, codebook)
    }
    some = z[:_TRIED_ROWS]
    samples = {
        rows: (timing.sampler(partial(function, some, codebook), problem.case.device), 1)
        for rows, function in functions.items()
    }
    seconds = timing.interleave(samples, _TRIED_ROUNDS)
    return functions[min(functions, key=lambda rows: timing.statistics_of(seconds[rows]).median)]


def _chunked_by(rows: int, z: Tensor, codebook: Tensor) -> Function:
    scores = z.new_empty(rows, len(codebook))

    def function(z: Tensor, codebook: Tensor) -> Tensor:
        found = torch.empty(len(z), dtype=torch.int64, device=z.device)
        norms, codes = codebook.square().sum(dim=1), codebook.t()
        for part, index in zip(z.split(rows), found.split(rows)):
            score = torch.addmm(norms, part, codes, alpha=-2.0, out=scores[: len(part)])
            torch.argmin(score, dim=1, out=index)
        return found

    return function


def _cdist(problem: Problem) -> Function:
    def function(z: Tensor, codebook: Tensor) -> Tensor:
        return torch.cdist(z, codebook).argmin(dim=1)

    return function


def _compiled(problem: Problem) -> Function:
    def function(z: Tensor, codebook: Tensor) -> Tensor:
        return torch.addmm(codebook.square().sum(dim=1), z, codebook.t(), alpha=-2.0).argmin(dim=1)

    return compiled(function)


def _distances_too_large(case: Case) -> str | None:
    rows, codebook = SHAPES[case.shape]
    return too_large(2 * rows * codebook.num_codes * case.torch_dtype.itemsize, case.device)


def _nearest_providers() -> list[Provider]:
    return [
        *ours("vq_nearest", lambda problem, function: function),
        Provider("chunked", _chunked),
        Provider("faiss", _faiss, refuse=_faiss_refuses),
        Provider("cdist", _cdist, refuse=_distances_too_large),
        Provider("compile", _compiled, refuse=_distances_too_large),
    ]


def _rows_problem(case: Case) -> Problem:
    rows, codebook = SHAPES[case.shape]
    z, _ = vq_inputs(rows, codebook, case.torch_dtype)
    indices = torch.randint(codebook.num_codes, (rows,), generator=torch.Generator().manual_seed(0))
    return Problem(case, ("z", "indices"), (z.to(case.device), indices.to(case.device)))


def _judge_update(problem: Problem) -> Judge:
    """Whole: counts are equal, sums follow the error rule."""
    z, indices = (x.cpu() for x in problem.inputs)
    num_codes = SHAPES[problem.case.shape].codebook.num_codes
    counts, sums = reference.vq_ema_update(z, indices, num_codes)
    plain = torch.zeros(sums.shape).index_add_(0, indices, z.float())

    def judge(results: Sequence[Tensor]) -> Verdict:
        found_counts, found_sums = (x.cpu() for x in results)
        if found_sums.shape != sums.shape or found_sums.dtype != torch.float32:
            return Verdict(None, f"sums: {tuple(found_sums.shape)} {found_sums.dtype}, float32 (K, D) is due")
        error = (found_sums.double() - sums).abs().max().item()
        error = error if math.isfinite(error) else None
        if not torch.equal(found_counts, counts):
            return Verdict(error, "counts differ from the reference")
        try:
            assert_as_accurate(found_sums, sums, plain, "sums", terms=max(1, int(counts.max())))
        except AssertionError as fault:
            return Verdict(error, str(fault))
        return Verdict(error)

    return judge


def _update_work(problem: Problem) -> Work:
    z, indices = problem.inputs
    copied = z.numel() * z.element_size()
    return Work("copy", copied + indices.numel() * indices.element_size(), copied)


def _our_update(problem: Problem, vq_ema_update: Function) -> Function:
    num_codes = SHAPES[problem.case.shape].codebook.num_codes
    return lambda z, indices: vq_ema_update(z, indices, num_codes)


def _index_add(problem: Problem) -> Function:
    num_codes = SHAPES[problem.case.shape].codebook.num_codes

    def function(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(num_codes, z.shape[1], device=z.device)
        return torch.bincount(indices, minlength=num_codes), sums.index_add_(0, indices, z.float())

    return function


def _one_hot(problem: Problem) -> Function:
    """As VQ-VAE code has it."""
    num_codes = SHAPES[problem.case.shape].codebook.num_codes

    def function(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.one_hot(indices, num_codes).float()
        return codes.sum(dim=0).long(), codes.t() @ z.float()

    return function


def _one_hot_too_large(case: Case) -> str | None:
    rows, codebook = SHAPES[case.shape]
    return too_large(12 * rows * codebook.num_codes, case.device)


def _update_providers() -> list[Provider]:
    return [
        *ours("vq_ema_update", _our_update),
        Provider("index-add", _index_add),
        Provider("one-hot", _one_hot, refuse=_one_hot_too_large),
    ]


OPS = (
    Op(
        "vq_nearest",
        shapes=SHAPES,
        full=tuple(VQ_LAYERS),
        dtypes=("float32",),
        problem=_codebook_problem,
        judge=_judge_nearest,
        work=_nearest_work,
        providers=_nearest_providers,
        torch="chunked",
    ),
    Op(
        "vq_ema_update",
        shapes=SHAPES,
        full=tuple(VQ_LAYERS),
        dtypes=("float32",),
        problem=_rows_problem,
        judge=_judge_update,
        work=_update_work,
        providers=_update_providers,
        torch="index-add",
    ),
)
