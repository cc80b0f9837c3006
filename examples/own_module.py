"""fastldm in a module of your own: what is found by itself, what you name, what is checked."""

import torch
import torch.nn.functional as F
from torch import nn

import fastldm


class SelfAttention(nn.Module):
    """Calls PyTorch's attention by `F`, which fastldm redirects in classes that you name."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    def __init__(self, channels: int = 64):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(4, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.norm = nn.GroupNorm(8, channels)
        self.attention = SelfAttention(channels, heads=4)
        self.out = nn.Conv2d(channels, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return self.out(x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:]))


def main() -> None:
    torch.manual_seed(0)
    model, x = Denoiser().eval(), torch.randn(2, 4, 16, 16)

    print(fastldm.apply(model), end="\n\n")
    print(fastldm.apply(model, attention_classes=[SelfAttention]), end="\n\n")
    print(fastldm.verify(model, x), end="\n\n")

    with torch.no_grad():
        after = model(x)
        fastldm.revert(model)
        before = model(x)
        with fastldm.applied(model, ops=["group_norm"], backend="reference"):
            reference = model(x)
    print(f"largest difference: {(after - before).abs().max():.1e}")
    print(f"largest difference with reference group norms: {(reference - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
