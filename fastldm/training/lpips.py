"""LPIPS, the perceptual distance of Zhang et al. 2018, on VGG16 features."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError

# VGG16 up to relu5_3: a number is a 3x3 convolution with a ReLU, "M" a 2x2 max-pool.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_STAGE_WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """Distance between two pictures in the feature space of VGG16; frozen, always in eval mode.

    The five stages' activations are scaled to unit length over channels, squared differences are weighted per
    channel by `lin0`..`lin4`, averaged over space and summed over stages.

    The weights come from files: `LPIPS.from_files`. Parameter names of VGG are torchvision's
    (`features.<i>`).
    """

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _VGG16:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        for stage, width in enumerate(_STAGE_WIDTHS):
            self.add_module(f"lin{stage}", nn.Conv2d(width, 1, 1, bias=False))
        # ImageNet mean and standard deviation, moved from [0, 1] to pictures in [-1, 1].
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_files(cls, paths: str | os.PathLike | Sequence[str | os.PathLike]) -> LPIPS:
        """Read the weights from one file or from several that complete each other.

        Accepted (.safetensors, .pt, .pth): the state dict of this class; of `lpips.LPIPS(net="vgg")` or of
        the copy in taming-transformers; torchvision's `vgg16` together with the `lin` weights that lpips and
        torchmetrics ship.

        Raises:
            CheckpointError: a file cannot be read, or together they do not hold every weight.
        """
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        weights = {}
        for path in paths:
            weights.update(_renamed(_read(Path(path))))
        model = cls()
        expected = model.state_dict()
        wrong = [
            name
            for name, value in expected.items()
            if name not in weights or weights[name].shape != value.shape
        ]
        if wrong:
            files = ", ".join(map(str, paths))
            raise CheckpointError(
                f"LPIPS weights in {files} lack {len(wrong)} of {len(expected)} tensors or differ in shape "
                f"(first: {wrong[0]}); needed: VGG16 features and lin0..lin4"
            )
        model.load_state_dict({name: weights[name] for name in expected})
        return model

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode: a metric does not train."""
        return super().train(False)

    def forward(self, images: Tensor, other: Tensor) -> Tensor:
        """Distance per picture: two (B, 3, H, W) in [-1, 1] to (B,)."""
        pairs = zip(self._stages(images), self._stages(other))
        return sum(
            getattr(self, f"lin{stage}")((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3))
            for stage, (a, b) in enumerate(pairs)
        )

    def _stages(self, images: Tensor) -> list[Tensor]:
        hidden = (images - self.shift) / self.scale
        stages = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(hidden)
            hidden = layer(hidden)
        return [*stages, hidden]


def _unit(features: Tensor) -> Tensor:
    # The published weights were trained with the 1e-10 outside the root.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot read LPIPS weights {str(path)!r}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"LPIPS weights {str(path)!r} hold a {type(weights).__name__}, not a state dict"
        )
    return weights


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of lpips and taming-transformers to ours; entries that are not needed fall away."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"^net\.slice\d\.(\d+)\.", r"features.\1.", name)
        name = re.sub(r"^lin(\d)\.model\.1\.", r"lin\1.", name)
        if re.match(r"^(features\.\d+|lin\d)\.(weight|bias)$", name):
            renamed[name] = value.float()
    return renamed
