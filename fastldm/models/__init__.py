"""Networks over `fastldm.nn`; each loads on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "ADMClassifier": "fastldm.models.classifier",
    "ADMSuperRes": "fastldm.models.adm",
    "ADMUNet": "fastldm.models.adm",
    "AutoencoderKL": "fastldm.models.autoencoder_kl",
    "AutoencoderKLOutput": "fastldm.models.autoencoder_kl",
    "CLIPModel": "fastldm.models.clip",
    "CLIPOutput": "fastldm.models.clip",
    "CLIPTextModel": "fastldm.models.clip_towers",
    "CLIPTokenizer": "fastldm.models.clip_tokenizer",
    "CLIPTowerOutput": "fastldm.models.clip_towers",
    "CLIPVisionModel": "fastldm.models.clip_towers",
    "ClassConditioner": "fastldm.models.conditioners",
    "ClassifierOutput": "fastldm.models.classifier",
    "Conditioning": "fastldm.models.conditioners",
    "DecoderOutput": "fastldm.models.autoencoder_blocks",
    "DiagonalGaussianDistribution": "fastldm.models.autoencoder_kl",
    "GlideTextOutput": "fastldm.models.glide",
    "GlideTokenizer": "fastldm.models.glide_tokenizer",
    "GlideUNet": "fastldm.models.glide",
    "LDMBertModel": "fastldm.models.text_transformer",
    "Model": "fastldm.models.base",
    "PixelSpace": "fastldm.models.pixel_space",
    "SpatialConditioner": "fastldm.models.conditioners",
    "TextConditioner": "fastldm.models.conditioners",
    "Tokenizer": "fastldm.models.tokenizer",
    "UNet2DConditionModel": "fastldm.models.unet",
    "UNet2DConditionOutput": "fastldm.models.unet",
    "VQEncoderOutput": "fastldm.models.vq_model",
    "VQModel": "fastldm.models.vq_model",
    "glide_inpainting": "fastldm.models.glide",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
