"""The named systems: each a composition of models and diffusion."""

from fastldm.systems.classifier import ClassifierGuide
from fastldm.systems.clip import CLIPScorer
from fastldm.systems.glide import GlidePipeline
from fastldm.systems.glide_stage import GlideStage
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline

__all__ = ["CLIPScorer", "ClassifierGuide", "GlidePipeline", "GlideStage", "LatentDiffusionPipeline"]
