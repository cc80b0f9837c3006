"""`fastldm train vq|ldm|clip|classifier|glide`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=["vq", "ldm", "clip", "classifier", "glide"],
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


def run(arguments: argparse.Namespace) -> None:
    from fastldm.training import config as configs
    from fastldm.training.extras import require

    for package in ("yaml", "accelerate", "tensorboard"):
        require(package)
    classes = {
        "vq": configs.FirstStageConfig,
        "ldm": configs.LatentDiffusionConfig,
        "clip": configs.CLIPTrainingConfig,
        "classifier": configs.ClassifierConfig,
        "glide": configs.GlideConfig,
    }
    config = configs.load_config(classes[arguments.kind], arguments.config, arguments.overrides)
    if arguments.kind == "vq":
        from fastldm.training.first_stage_task import FirstStageTask as Task
    elif arguments.kind == "clip":
        from fastldm.training.clip import CLIPTask as Task
    elif arguments.kind == "classifier":
        from fastldm.training.classifier import ClassifierTask as Task
    elif arguments.kind == "glide":
        from fastldm.training.glide import GlideTask as Task
    else:
        from fastldm.training.latent_diffusion import LatentDiffusionTask as Task
    from fastldm.training.loop import train

    print(train(config, lambda: Task(config), resume=arguments.resume))
