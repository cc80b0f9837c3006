"""`fastldm train vq|ldm|clip|classifier|glide`."""

from __future__ import annotations

import argparse
import importlib

# What is trained: its configuration in fastldm.training.config, and the module and name of its task.
_KINDS = {
    "vq": ("FirstStageConfig", "first_stage_task", "FirstStageTask"),
    "ldm": ("LatentDiffusionConfig", "latent_diffusion", "LatentDiffusionTask"),
    "clip": ("CLIPTrainingConfig", "clip", "CLIPTask"),
    "classifier": ("ClassifierConfig", "classifier", "ClassifierTask"),
    "glide": ("GlideConfig", "glide", "GlideTask"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=list(_KINDS),
        help="vq: first stage (VQ-VAE or KL); ldm: diffusion on its latents or in pixels; "
        "clip: pictures against captions; classifier: classes of noisy pictures; "
        "glide: GLIDE's base network or upsampler",
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help="a shipped configuration or a YAML file"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration keys, such as optimizer.lr=3e-4"
    )


def config_class(kind: str) -> type:
    """The configuration of a kind of training."""
    from fastldm.training import config

    return getattr(config, _KINDS[kind][0])


def run(arguments: argparse.Namespace) -> None:
    from fastldm.training.config import load_config
    from fastldm.training.extras import require

    for package in ("yaml", "accelerate", "tensorboard"):
        require(package)
    config = load_config(config_class(arguments.kind), arguments.config, arguments.overrides)
    _, module, name = _KINDS[arguments.kind]
    task = getattr(importlib.import_module(f"fastldm.training.{module}"), name)
    from fastldm.training.loop import train

    print(train(config, lambda: task(config), resume=arguments.resume))
