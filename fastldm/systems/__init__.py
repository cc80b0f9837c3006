"""The named systems: each a composition of models and diffusion."""

from fastldm.systems.latent_diffusion import LatentDiffusionPipeline

__all__ = ["LatentDiffusionPipeline"]
