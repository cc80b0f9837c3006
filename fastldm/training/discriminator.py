"""Patch discriminator and its losses (Isola et al. 2017; Esser et al. 2021, "Taming Transformers")."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import ConfigError


class NLayerDiscriminator(nn.Module):
    """PatchGAN: one real-or-fake logit per overlapping patch; parameter names as in taming-transformers.

    Args:
        input_nc: channels of the picture.
        ndf: channels of the first layer; doubled per layer up to 8 times.
        n_layers: layers of stride 2; 3 gives patches of 70 x 70 pixels.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for n in range(1, n_layers + 1):
            width = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            # No bias: the normalisation that follows would remove it.
            layers += [
                nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, 1, h, w); positive = real."""
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on its logits (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of the discriminator on its logits (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


def named_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function called `name`: "hinge" or "vanilla"."""
    if name not in DISCRIMINATOR_LOSSES:
        raise ConfigError(f"unknown discriminator loss {name!r}; accepted: {', '.join(DISCRIMINATOR_LOSSES)}")
    return DISCRIMINATOR_LOSSES[name]
