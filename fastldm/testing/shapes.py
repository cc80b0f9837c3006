"""Named shapes: the layers of diffusion models at their own size (benchmarks) and cut down to test size, with
the sizes at which kernels break (tests)."""

from __future__ import annotations

from typing import NamedTuple


class AttentionShape(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int


class GroupNormShape(NamedTuple):
    shape: tuple[int, ...]
    num_groups: int

    @property
    def channels_per_group(self) -> int:
        return self.shape[1] // self.num_groups


class VQShape(NamedTuple):
    num_codes: int
    dim: int


class VQLayer(NamedTuple):
    """A codebook and how many rows are looked up in it: batch * height * width of the latents."""

    rows: int
    codebook: VQShape


ATTENTION: dict[str, AttentionShape] = {
    "one-query": AttentionShape(1, 1, 1, 3, 8),
    "smallest-head": AttentionShape(2, 3, 33, 17, 8),
    "odd-head-24": AttentionShape(1, 2, 65, 63, 24),
    "sd15-self-40": AttentionShape(1, 2, 144, 144, 40),
    "sd15-text-40": AttentionShape(2, 2, 144, 77, 40),
    "sdxl-self-64": AttentionShape(1, 2, 129, 129, 64),
    "sdxl-text-64": AttentionShape(1, 2, 130, 77, 64),
    "sd15-self-80": AttentionShape(1, 2, 100, 100, 80),
    "head-96": AttentionShape(1, 1, 31, 64, 96),
    "head-128": AttentionShape(1, 2, 64, 128, 128),
    "sd15-self-160": AttentionShape(1, 2, 64, 64, 160),
    "head-256": AttentionShape(1, 1, 40, 50, 256),
    "vae-512": AttentionShape(1, 1, 81, 81, 512),
    "more-keys": AttentionShape(1, 1, 5, 300, 32),
    "more-queries": AttentionShape(1, 1, 300, 5, 32),
}

GROUP_NORM: dict[str, GroupNormShape] = {
    "instance-norm": GroupNormShape((2, 8, 7, 9), 8),
    "cpg-3": GroupNormShape((2, 12, 7, 9), 4),
    "cpg-4": GroupNormShape((1, 128, 16, 16), 32),
    "cpg-10": GroupNormShape((2, 320, 8, 8), 32),
    "cpg-20": GroupNormShape((2, 640, 5, 3), 32),
    "cpg-30": GroupNormShape((1, 960, 4, 4), 32),
    "cpg-40": GroupNormShape((2, 1280, 2, 2), 32),
    "cpg-60": GroupNormShape((1, 1920, 3, 1), 32),
    "cpg-80": GroupNormShape((1, 2560, 2, 3), 32),
    "one-group": GroupNormShape((3, 6, 5, 5), 1),
    "one-pixel": GroupNormShape((2, 320, 1, 1), 32),
    "wide": GroupNormShape((1, 32, 64, 64), 32),
    "vector": GroupNormShape((4, 40), 4),
    "sequence": GroupNormShape((2, 40, 33), 4),
    "video": GroupNormShape((2, 20, 3, 5, 7), 4),
}

VQ: dict[str, VQShape] = {
    "vq-vae": VQShape(512, 64),
    "ldm-f4": VQShape(8192, 3),
    "movq": VQShape(16384, 4),
    "vqgan": VQShape(1024, 256),
    "odd": VQShape(37, 5),
    "one-code": VQShape(1, 4),
    "one-dim": VQShape(100, 1),
}

# Layers at the size they have in a model: model, side of the feature map, kind, head dim or channels. UNets
# take two samples at once (classifier-free guidance); "demo" is the model that ships.
ATTENTION_LAYERS: dict[str, AttentionShape] = {
    "sd15-64px-self-d40": AttentionShape(2, 8, 4096, 4096, 40),
    "sd15-64px-text-d40": AttentionShape(2, 8, 4096, 77, 40),
    "sd15-32px-self-d80": AttentionShape(2, 8, 1024, 1024, 80),
    "sd15-32px-text-d80": AttentionShape(2, 8, 1024, 77, 80),
    "sd15-16px-self-d160": AttentionShape(2, 8, 256, 256, 160),
    "sd15-16px-text-d160": AttentionShape(2, 8, 256, 77, 160),
    "sd15-8px-self-d160": AttentionShape(2, 8, 64, 64, 160),
    "sd15-8px-text-d160": AttentionShape(2, 8, 64, 77, 160),
    "sdxl-64px-self-d64": AttentionShape(2, 10, 4096, 4096, 64),
    "sdxl-64px-text-d64": AttentionShape(2, 10, 4096, 77, 64),
    "vae-64px-self-d512": AttentionShape(1, 1, 4096, 4096, 512),
    "demo-8px-self-d24": AttentionShape(2, 4, 64, 64, 24),
    "demo-8px-text-d24": AttentionShape(2, 4, 64, 24, 24),
    "demo-4px-self-d32": AttentionShape(2, 4, 16, 16, 32),
}

GROUP_NORM_LAYERS: dict[str, GroupNormShape] = {
    "unet-64px-c320": GroupNormShape((1, 320, 64, 64), 32),
    "unet-32px-c640": GroupNormShape((2, 640, 32, 32), 32),
    "unet-16px-c1280": GroupNormShape((2, 1280, 16, 16), 32),
    "unet-8px-c1280": GroupNormShape((2, 1280, 8, 8), 32),
    "vae-128px-c512": GroupNormShape((1, 512, 128, 128), 32),
    "vae-256px-c128": GroupNormShape((4, 128, 256, 256), 32),
    "demo-8px-c96": GroupNormShape((2, 96, 8, 8), 16),
    "demo-4px-c128": GroupNormShape((2, 128, 4, 4), 16),
}

VQ_LAYERS: dict[str, VQLayer] = {
    f"{name}-{rows}": VQLayer(rows, VQ[name])
    for name in ("vq-vae", "ldm-f4", "movq", "vqgan")
    for rows in (256, 4096, 16384, 65536)
}
