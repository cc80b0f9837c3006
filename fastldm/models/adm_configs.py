"""The fields of the networks OpenAI published, by the name of the file: what `from_openai` takes beside it.

    ADMUNet.from_openai("64x64_diffusion.pt", **ADM["64x64_diffusion"])

The files of guided-diffusion and the flags its README gives for them (July 2021), and those of glide-text2im
and its own defaults (December 2021).
"""

from __future__ import annotations

from typing import Any

_LEVELS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def _diffusion(image_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "model_channels": 256,
        "channel_mult": _LEVELS[image_size],
        "attention_resolutions": (32, 16, 8),
        "num_head_channels": 64,
        "resblock_updown": True,
        "learn_sigma": True,
        **fields,
    }


_LSUN = _diffusion(256, dropout=0.1)

ADM: dict[str, dict[str, Any]] = {
    "64x64_diffusion": _diffusion(
        64,
        model_channels=192,
        num_res_blocks=3,
        dropout=0.1,
        num_classes=1000,
        use_new_attention_order=True,
    ),
    "128x128_diffusion": _diffusion(128, num_heads=4, num_head_channels=-1, num_classes=1000),
    "256x256_diffusion": _diffusion(256, num_classes=1000),
    "256x256_diffusion_uncond": _diffusion(256),
    "512x512_diffusion": _diffusion(512, num_classes=1000),
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _diffusion(256),
}
"""For `ADMUNet`."""

ADM_UPSAMPLERS: dict[str, dict[str, Any]] = {
    "64_256_upsampler": _diffusion(
        256, model_channels=192, num_heads=4, num_head_channels=-1, num_classes=1000
    ),
    "128_512_upsampler": _diffusion(
        512,
        model_channels=192,
        channel_mult=_LEVELS[256],
        attention_resolutions=(32, 16),
        num_classes=1000,
    ),
}
"""For `ADMSuperRes`."""

ADM_CLASSIFIERS: dict[str, dict[str, Any]] = {
    f"{size}x{size}_classifier": {
        "image_size": size,
        "channel_mult": levels,
        "num_res_blocks": 4 if size == 64 else 2,
    }
    for size, levels in _LEVELS.items()
}
"""For `ADMClassifier`."""

_UPSAMPLE = {"image_size": 256, "num_res_blocks": 2, "channel_mult": _LEVELS[256], "super_res": True}

GLIDE: dict[str, dict[str, Any]] = {
    "base": {},
    "base_inpaint": {"inpaint": True},
    "upsample": _UPSAMPLE,
    "upsample_inpaint": {**_UPSAMPLE, "inpaint": True},
}
"""For `GlideUNet`."""
