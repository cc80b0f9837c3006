"""Vector quantisation (van den Oord et al. 2017, "Neural Discrete Representation Learning")."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import InputError, TrainingError


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by its nearest codebook vector; the gradient passes straight through.

    The loss is equation 3 of the paper without its reconstruction term, as means over elements:
    `mean((sg[z] - e)^2) + beta * mean((z - sg[e])^2)`, sg = stop gradient. `legacy=True` puts `beta` on the
    first (codebook) term instead of the second (commitment) term, which is what checkpoints of
    taming-transformers and diffusers were trained with. The value is the same, the gradients are not.

    The codebook is trained by that loss, or, after `enable_ema`, by moving averages of the encoder outputs.
    Distances are computed in float32 or better, whatever the dtype of `z` and under autocast.

    Args:
        n_e: number of codes K.
        vq_embed_dim: length D of a code.
        beta: weight of the commitment term (codebook term if `legacy`).
        remap: path of a .npy file with the R distinct indices in use; `forward` then returns indices in
            0..R-1.
        unknown_index: with `remap`, the index returned for a code that is not in use: "random", "extra" (= R)
            or an int.
        sane_index_shape: return indices as (B, H, W) instead of flat.
        legacy: see above.
    """

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float = 0.25,
        remap: str | os.PathLike | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = False,
    ):
        super().__init__()
        self.n_e = n_e
        self.vq_embed_dim = vq_embed_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, vq_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

        self.remap = remap
        self.re_embed = n_e
        if remap is not None:
            used = torch.from_numpy(np.load(remap, allow_pickle=False)).long()
            if (
                used.dim() != 1
                or used.unique().numel() != used.numel()
                or used.min() < 0
                or used.max() >= n_e
            ):
                raise InputError(
                    f"remap {str(remap)!r} must hold distinct indices in 0..{n_e - 1}, in one dimension"
                )
            self.register_buffer("used", used)
            self.re_embed = used.numel()
            self.unknown_index = unknown_index
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
            elif unknown_index != "random" and not isinstance(unknown_index, int):
                raise InputError(f"unknown_index must be 'random', 'extra' or an int, got {unknown_index!r}")

        self.ema_decay: float | None = None
        self.ema_eps = 1e-5
        self.revive_below = 0.0

    def enable_ema(self, decay: float = 0.99, *, eps: float = 1e-5, revive_below: float = 0.0) -> None:
        """Train the codebook by moving averages, not by its loss (van den Oord et al. 2017, appendix A.1).

        From here on, each forward pass in training mode moves the codes, the codebook term leaves the loss
        and the codebook asks for no gradient: call this before the optimiser and any data-parallel wrapper
        are made. The buffers `ema_count` (K,) and `ema_sum` (K, D) join the state dict, so a training
        checkpoint resumes them; call this before loading one. `VQModel.save_pretrained` leaves them out: they
        are no part of the trained model.

        Args:
            decay: gamma of the paper.
            eps: Laplace smoothing of the counts.
            revive_below: a code whose averaged count per batch falls below this is moved onto a random
                encoder output of the batch, and its averages start anew there. 0 = never.
        """
        if not 0.0 <= decay < 1.0:
            raise InputError(f"the decay of an EMA codebook must be in [0, 1), got {decay}")
        self.ema_decay, self.ema_eps, self.revive_below = decay, eps, revive_below
        self.embedding.requires_grad_(False)
        weight = self.embedding.weight.detach().float()
        # A count of one each makes sum / count the codebook as it stands, so that averaging starts without a
        # jump.
        self.register_buffer("ema_count", torch.ones(self.n_e, device=weight.device))
        self.register_buffer("ema_sum", weight.clone())

    @torch.no_grad()
    def initialize_codebook(self, z: Tensor) -> None:
        """Start every code at an encoder output: z (B, D, H, W), pre-quantised.

        With fewer than K vectors in `z` they are used several times over, with noise of their own spread so
        that no two codes coincide. In a distributed run every process gets the codes of rank 0; all must call
        this.
        """
        rows = self._to_rows(z)
        codes = _draw_rows(rows, self.n_e)
        if len(rows) < self.n_e:
            spread = rows.std(dim=0, correction=0).clamp_min(1e-6)
            codes[len(rows) :] += spread * torch.randn_like(codes[len(rows) :])
        _broadcast(codes)
        self.embedding.weight.copy_(codes)
        if self.ema_decay is not None:
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantise.

        Args:
            z: (B, D, H, W).

        Returns:
            z_q (B, D, H, W), each vector exactly a code; loss, float32 scalar; (perplexity, None, indices)
            with perplexity a float32 scalar, and indices int64: (B*H*W,), or (B*H*W, 1) with `remap`, or (B,
            H, W) with `sane_index_shape`.
        """
        if z.dim() != 4 or z.shape[1] != self.vq_embed_dim:
            raise InputError(
                f"latents to quantise are (batch, {self.vq_embed_dim}, height, width), got {tuple(z.shape)}"
            )
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            rows = self._to_rows(z)
            codebook = self.embedding.weight
            z_q, indices = ops.vq_quantize(rows, codebook.detach().to(rows.dtype))
            loss = self._loss(rows, indices)
            _, perplexity = codebook_statistics(indices, self.n_e)
            if self.ema_decay is not None and self.training:
                self._update_ema(rows.detach(), indices)
        z_q = z_q.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        z_q = z_q.to(torch.promote_types(z.dtype, codebook.dtype))

        if self.remap is not None:
            indices = self.remap_to_used(indices.view(batch, -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(batch, height, width)
        return z_q, loss, (perplexity, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Codes of `indices`: (..., D), or (B, D, H, W) where `shape` = (B, H, W, D) is given.

        With `remap`, indices are those that `forward` returns, and `shape` is required.
        """
        if self.remap is not None:
            if shape is None:
                raise InputError("a quantizer with remap needs shape=(batch, height, width, channels)")
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).permute(0, 3, 1, 2).contiguous()

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Full indices (B, ...) to positions in `used`, unknown ones as `unknown_index` says."""
        position = torch.full((self.n_e,), -1, dtype=torch.long, device=indices.device)
        position[self.used] = torch.arange(len(self.used), device=indices.device)
        new = position[indices]
        if self.unknown_index == "random":
            other = torch.randint_like(new, self.re_embed)
        else:
            other = torch.full_like(new, self.unknown_index)
        return torch.where(new < 0, other, new)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Positions in `used` (B, ...) to full indices; the extra index stands for the first code in use."""
        return self.used[torch.where(indices < len(self.used), indices, 0)]

    def _to_rows(self, z: Tensor) -> Tensor:
        """(B, D, H, W) to (B*H*W, D) in float32, or in float64 if z is."""
        z = z.permute(0, 2, 3, 1).reshape(-1, self.vq_embed_dim)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def _loss(self, z: Tensor, indices: Tensor) -> Tensor:
        codes = self.embedding(indices).to(z.dtype)
        commitment = F.mse_loss(z, codes.detach())
        if self.ema_decay is not None:
            return commitment if self.legacy else self.beta * commitment
        codebook = F.mse_loss(codes, z.detach())
        return commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment

    @torch.no_grad()
    def _update_ema(self, z: Tensor, indices: Tensor) -> None:
        if not self.ema_sum.dtype == self.ema_count.dtype == self.embedding.weight.dtype == torch.float32:
            raise TrainingError(
                f"an EMA codebook is kept in float32, this one is {self.embedding.weight.dtype}; "
                "train float32 weights under autocast instead of casting the model"
            )
        counts, sums = ops.vq_ema_update(z, indices, self.n_e)
        if _distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1.0 - self.ema_decay)
        self.ema_sum.lerp_(sums, 1.0 - self.ema_decay)
        total = self.ema_count.sum()
        smoothed = (self.ema_count + self.ema_eps) / (total + self.n_e * self.ema_eps) * total
        self.embedding.weight.copy_(self.ema_sum / smoothed[:, None])
        if self.revive_below > 0.0:
            self._revive(z, fair_count=(counts.sum() / self.n_e).clamp_min(self.revive_below))

    def _revive(self, z: Tensor, fair_count: Tensor) -> None:
        # One candidate per code, dead or not: no shape depends on the data, so ranks cannot disagree and
        # nothing waits for the device. All ranks take the candidates of rank 0, or their codebooks would
        # drift apart.
        candidates = _draw_rows(z, self.n_e)
        _broadcast(candidates)
        dead = self.ema_count < self.revive_below
        self.embedding.weight.copy_(torch.where(dead[:, None], candidates, self.embedding.weight))
        # Both averages restart at the new place, with the count of an evenly used code: a small one would
        # leave the code about to be declared dead again, an old sum would pull it back to where it died.
        self.ema_count.copy_(torch.where(dead, fair_count, self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], candidates * fair_count, self.ema_sum))

    def extra_repr(self) -> str:
        return f"n_e={self.n_e}, vq_embed_dim={self.vq_embed_dim}, beta={self.beta}, legacy={self.legacy}"


def codebook_statistics(indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How much of a codebook is used by int64 `indices` of any shape.

    Returns:
        usage: fraction of the codes that occur; perplexity: exp of the entropy of their frequencies,
        1..num_codes. Both float32 scalars.
    """
    indices = indices.reshape(-1)
    counts = torch.zeros(num_codes, dtype=torch.long, device=indices.device)
    counts.scatter_add_(0, indices, torch.ones_like(indices))
    frequency = counts.float() / max(indices.numel(), 1)
    return (counts > 0).float().mean(), torch.exp(-torch.xlogy(frequency, frequency).sum())


def _draw_rows(rows: Tensor, count: int) -> Tensor:
    """`count` random rows, none twice before every row was taken once."""
    order = torch.randperm(len(rows), device=rows.device)
    return rows[order[torch.arange(count, device=rows.device) % len(rows)]]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _broadcast(tensor: Tensor) -> None:
    if _distributed():
        dist.broadcast(tensor, src=0)
