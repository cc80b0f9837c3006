"""What several commands share: the flags that choose model and sampler, and output files."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fastldm.checks import with_article
from fastldm.errors import InputError

if TYPE_CHECKING:
    from fastldm.systems.glide import GlidePipeline
    from fastldm.systems.latent_diffusion import LatentDiffusionPipeline

# Those of fastldm.diffusion.samplers, which is not imported for --help.
SAMPLERS = ["ddim", "ddpm", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="shapes",
        type=folder_name,
        metavar="NAME|FOLDER",
        help="a shipped model or the folder of a saved one (default: %(default)s)",
    )
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="denoising steps (default: the model's)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: %(default)s)")
    parser.add_argument(
        "--backend",
        default=os.environ.get("FASTLDM_BACKEND", "auto"),
        help="auto, or the one backend that every operation must use (default: FASTLDM_BACKEND, else auto)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def use_backend(name: str) -> AbstractContextManager[None]:
    """The context in which every operation runs on backend `name`."""
    from fastldm import dispatch

    if name != "auto" and name not in dispatch.BACKENDS:
        raise InputError(f"backend {name} is not known; use one of: auto, {', '.join(dispatch.BACKENDS)}")
    return dispatch.use_backend(name)


def load_pipeline(arguments: argparse.Namespace) -> LatentDiffusionPipeline | GlidePipeline:
    """The pipeline that --model names, of its own class, on --device, with --sampler; for a command that has
    --upsampler, joined with that."""
    import torch

    import fastldm
    from fastldm.systems import GlidePipeline, LatentDiffusionPipeline, folders

    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed {arguments.seed}: give 0 or more, below 2^63")
    index = folders.read_index(folders.find_pipeline(arguments.model))
    glide = index.get("_class_name") == GlidePipeline.__name__
    upsampler = getattr(arguments, "upsampler", None)
    if upsampler is not None and not glide:
        raise InputError(
            f"--upsampler is for a base of `fastldm train glide`, but --model {arguments.model} is "
            f"{with_article(str(index.get('_class_name')))}"
        )
    if upsampler is not None:
        pipeline = GlidePipeline.from_parts(arguments.model, upsampler)
    else:
        pipeline = (GlidePipeline if glide else LatentDiffusionPipeline).from_pretrained(arguments.model)
    if arguments.sampler not in (None, pipeline.sampler):
        pipeline.sampler, pipeline.karras = arguments.sampler, False
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":
        raise InputError("--device meta computes nothing; `fastldm env` lists the devices")
    try:
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {reason}; `fastldm env` lists the devices") from error
    if pipeline.device.type == "cpu":
        fastldm.keep_freed_memory()
        for network in pipeline.networks if glide else (pipeline.unet, pipeline.first_stage):
            fastldm.pack_weights(network)
    return pipeline


def check_writable(path: Path) -> None:
    """Raise InputError where the file cannot be written, so that no work is lost on a typing error."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"cannot write {path}: permission denied; give another path")


def check_png(path: Path) -> None:
    """Raise InputError for a picture's file name with the ending of another format."""
    if path.suffix.lower() not in ("", ".png"):
        raise InputError(f"--out {path}: pictures are written as PNG; end the name in .png")


def folder_name(text: str) -> str:
    """The value of a flag that names a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a folder")
    return text


def finite_scale(text: str) -> float:
    """The value of --guidance-scale."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a guidance scale; give 0 or more, such as 2.0")
    return scale


def write_file(path: Path, data: bytes) -> None:
    from fastldm.io import atomic_write

    try:
        atomic_write(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
