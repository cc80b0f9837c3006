"""`fastldm train vq|ldm|clip|classifier|glide`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastldm.errors import ConfigError

if TYPE_CHECKING:
    from fastldm.training.config import TrainingConfig


class _Kind(NamedTuple):
    """What can be trained: its configuration in fastldm.training.config, the module and name of its task, and
    the shipped configurations for it."""

    config: str
    module: str
    task: str
    shipped: tuple[str, ...]


_KINDS = {
    "vq": _Kind("FirstStageConfig", "first_stage_task", "FirstStageTask", ("shapes-kl", "shapes-vq")),
    "ldm": _Kind(
        "LatentDiffusionConfig", "latent_diffusion", "LatentDiffusionTask", ("shapes-ldm", "pairs-text")
    ),
    "clip": _Kind("CLIPTrainingConfig", "clip", "CLIPTask", ("shapes-clip", "pairs-clip")),
    "classifier": _Kind("ClassifierConfig", "classifier", "ClassifierTask", ("shapes-classifier",)),
    "glide": _Kind("GlideConfig", "glide", "GlideTask", ("shapes-glide", "shapes-glide-upsampler")),
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
        "--show",
        action="store_true",
        help="print the whole configuration as YAML, with what its keys mean, and train nothing",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration keys, such as optimizer.lr=3e-4"
    )


def config_class(kind: str) -> type:
    """The configuration of a kind of training."""
    from fastldm.training import config

    return getattr(config, _KINDS[kind].config)


def run(arguments: argparse.Namespace) -> None:
    from fastldm.training.config import load_config
    from fastldm.training.extras import require

    _check_shipped(arguments.kind, arguments.config)
    config = load_config(config_class(arguments.kind), arguments.config, arguments.overrides)
    if arguments.show:
        from fastldm.training.annotated import annotated_yaml

        print(annotated_yaml(config), end="")
        return
    for package in ("accelerate", "tensorboard"):
        require(package)
    kind = _KINDS[arguments.kind]
    task = getattr(importlib.import_module(f"fastldm.training.{kind.module}"), kind.task)
    from fastldm.training.loop import train

    if arguments.resume:
        _say_where_it_goes_on(config)
    print(train(config, lambda: task(config), resume=arguments.resume))


def _check_shipped(kind: str, name: str) -> None:
    """Raise ConfigError for a shipped configuration of another kind, whose keys would only look misspelt."""
    for other, about in _KINDS.items():
        if other != kind and name in about.shipped:
            raise ConfigError(
                f"{name} is a configuration of `fastldm train {other}`; for `train {kind}` give "
                f"{' or '.join(_KINDS[kind].shipped)}, or a YAML file"
            )


def _say_where_it_goes_on(config: TrainingConfig) -> None:
    """What --resume finds, where that is not a run to go on with."""
    from fastldm.training.checkpoint import list_checkpoints, step_of

    folder = Path(config.output_dir) / config.name
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        what = f"no checkpoint in {folder / 'checkpoints'}; starting at step 0"
    elif step_of(found[-1]) >= config.max_steps:
        what = (
            f"{folder} is already at step {step_of(found[-1])} of max_steps={config.max_steps}, and is only "
            "exported again; to train further raise max_steps"
        )
    else:
        return
    print(f"fastldm: {what}", file=sys.stderr)
