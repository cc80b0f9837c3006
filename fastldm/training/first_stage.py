"""Training a first stage: VQ-VAE (van den Oord et al. 2017) or KL autoencoder, as in Rombach et al. 2022,
appendix G.

One step of a training loop, for both kinds of model:

    output = first_stage_forward(model, images)
    loss, logs = first_stage_step(model, criterion, images, step=step, output=output)
    ...                                   # backward, step of the optimiser over model.parameters()
    if criterion.adversarial(step):
        loss, logs = criterion.discriminator_loss(output, images)
        ...                               # backward, step of the optimiser over
        criterion.discriminator.parameters()

Without a discriminator the second line alone does; it calls the model itself when `output` is left out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.autoencoder_blocks import DecoderOutput
from fastldm.models.autoencoder_kl import AutoencoderKL, DiagonalGaussianDistribution
from fastldm.nn.vector_quantizer import codebook_statistics
from fastldm.training.discriminator import NLayerDiscriminator, named_loss
from fastldm.training.lpips import LPIPS


class FirstStageLoss(nn.Module):
    """Reconstruction + codebook or KL term, with an optional perceptual and an optional adversarial term.

    `nll + codebook_weight * L_vq + kl_weight * KL / pixels + disc_weight * lambda * L_adv`, where
    `nll = l1_weight * mean|x - y| + l2_weight * mean (x - y)^2 + perceptual_weight * LPIPS(x, y)`. KL is
    summed over a picture's latent and divided by the number of values in the picture, so `kl_weight` means
    what it does in the published configurations, which sum both terms over the picture. All terms are
    float32, also under autocast.

    lambda is the adaptive weight of Esser et al. 2021, eq. 7: `|grad nll| / (|grad L_adv| + 1e-4)`, at most
    1e4, with gradients at the decoder's last convolution.

    Args:
        l1_weight, l2_weight: weights of the reconstruction error.
        codebook_weight: weight of VQModel's `commit_loss` (codebook and commitment terms).
        kl_weight: weight of AutoencoderKL's KL term.
        perceptual_weight: weight of LPIPS; needs `lpips_weights`, without which it warns and trains without.
        lpips_weights: file or files for `LPIPS.from_files`.
        disc_weight: weight of the adversarial term; 0 = no discriminator.
        disc_start: first step with the discriminator.
        disc_loss: "hinge" or "vanilla".
        disc_in_channels, disc_channels, disc_layers: `NLayerDiscriminator`'s.
    """

    def __init__(
        self,
        *,
        l1_weight: float = 1.0,
        l2_weight: float = 0.0,
        codebook_weight: float = 1.0,
        kl_weight: float = 1e-6,
        perceptual_weight: float = 0.0,
        lpips_weights: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        disc_weight: float = 0.0,
        disc_start: int = 0,
        disc_loss: str = "hinge",
        disc_in_channels: int = 3,
        disc_channels: int = 64,
        disc_layers: int = 3,
    ):
        super().__init__()
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.codebook_weight = codebook_weight
        self.kl_weight = kl_weight
        self.perceptual_weight = perceptual_weight
        self.disc_weight = disc_weight
        self.disc_start = disc_start
        self.lpips = None
        if perceptual_weight > 0.0 and lpips_weights is None:
            warnings.warn(
                f"perceptual_weight is {perceptual_weight} but no lpips_weights file is given: "
                "training without the perceptual (LPIPS) term",
                stacklevel=2,
            )
        elif perceptual_weight > 0.0:
            self.lpips = LPIPS.from_files(lpips_weights)
        self.disc_loss = named_loss(disc_loss)
        self.discriminator = None
        if disc_weight > 0.0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_channels, disc_layers)

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.discriminator is not None and step >= self.disc_start

    def generator_loss(
        self, output: DecoderOutput, images: Tensor, *, step: int, last_layer: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the autoencoder.

        Args:
            output: of `first_stage_forward`.
            images: (B, C, H, W) in [-1, 1].
            last_layer: weight of the decoder's last convolution; only a step with the discriminator needs it.

        Returns:
            float32 scalar to minimise; its parts as detached float32 scalars.
        """
        sample = output.sample
        with torch.autocast(sample.device.type, enabled=False):
            reconstruction, target = sample.float(), images.float()
            l1 = F.l1_loss(reconstruction, target)
            l2 = F.mse_loss(reconstruction, target)
            nll = self.l1_weight * l1 + self.l2_weight * l2
            logs = {"l1": l1, "l2": l2, "psnr": psnr(reconstruction, target)}
            if self.lpips is not None:
                logs["lpips"] = self.lpips(reconstruction, target).mean()
                nll = nll + self.perceptual_weight * logs["lpips"]
            loss = nll
            if output.commit_loss is not None:
                logs["codebook_loss"] = output.commit_loss.float()
                loss = loss + self.codebook_weight * logs["codebook_loss"]
            if output.latent_dist is not None:
                posterior = DiagonalGaussianDistribution(output.latent_dist.parameters.float())
                logs["kl"] = posterior.kl().mean()
                loss = loss + self.kl_weight * logs["kl"] / images[0].numel()
        if self.adversarial(step):
            # Without DistributedDataParallel, whose bookkeeping expects every forward pass to train the
            # parameters.
            with _frozen(unwrap(self.discriminator)) as discriminator:
                logs["generator_loss"] = -discriminator(sample.to(images.dtype)).float().mean()
            if loss.requires_grad:
                logs["disc_weight"] = (
                    adaptive_weight(nll, logs["generator_loss"], last_layer) * self.disc_weight
                )
                loss = loss + logs["disc_weight"] * logs["generator_loss"]
        logs["loss"] = loss
        return loss, {name: value.detach() for name, value in logs.items()}

    def discriminator_loss(self, output: DecoderOutput, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminator on real pictures and the same step's reconstructions, as
        `generator_loss`."""
        real = self.discriminator(images).float()
        fake = self.discriminator(output.sample.detach().to(images.dtype)).float()
        loss = self.disc_loss(real, fake)
        logs = {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}


def first_stage_forward(model: nn.Module, images: Tensor) -> DecoderOutput:
    """Encode, quantise or draw from the posterior, decode: through `model` as it is wrapped (data parallel,
    compiled)."""
    if isinstance(unwrap(model), AutoencoderKL):
        return model(images, sample_posterior=True)
    return model(images)


def first_stage_step(
    model: nn.Module, loss: FirstStageLoss, images: Tensor, *, step: int, output: DecoderOutput | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one step of a VQModel or AutoencoderKL, bare or wrapped.

    Args:
        images: (B, C, H, W) in [-1, 1].
        step: number of the optimiser step, for `disc_start`.
        output: of `first_stage_forward(model, images)`, where the caller already has it.

    Returns:
        float32 scalar to minimise; detached float32 scalars for the log: loss, l1, l2, psnr (dB), for VQ
        codebook_loss, codebook_usage (fraction of codes used by the batch), perplexity, for KL kl (nats per
        picture).
    """
    output = first_stage_forward(model, images) if output is None else output
    network = unwrap(model)
    total, logs = loss.generator_loss(output, images, step=step, last_layer=network.decoder.conv_out.weight)
    if output.indices is not None:
        logs["codebook_usage"], logs["perplexity"] = codebook_statistics(output.indices, network.quantize.n_e)
    return total, logs


@torch.no_grad()
def initialize_codebook(model: nn.Module, images: Tensor) -> None:
    """Start the codes of a VQModel at its encoder outputs for `images`, so that none starts out of reach."""
    network = unwrap(model)
    network.quantize.initialize_codebook(network.encode(images).latents)


def adaptive_weight(nll: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the gradient norms of two losses at `last_layer` (Esser et al. 2021, eq. 7), in [0, 1e4],
    detached."""
    nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].float()
    generator_grad = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)[0].float()
    return (nll_grad.norm() / (generator_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1] (values outside are clipped); at most 100."""
    error = F.mse_loss(images.detach().clamp(-1, 1), target)
    return 10.0 * torch.log10(4.0 / error.clamp_min(4e-10))


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Gradients pass through `module` to its input without reaching its parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield module
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
