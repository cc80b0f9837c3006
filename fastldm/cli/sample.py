"""`fastldm sample "a large red circle at the top left"`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fastldm.cli.files import check_writable, write_file
from fastldm.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", metavar="CAPTION", help="captions, each in quotes")
    add_model_arguments(parser)
    parser.add_argument(
        "--out", default="sample.png", metavar="FILE", help="PNG to write (default: %(default)s)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures per caption")
    parser.add_argument("--negative-prompt", metavar="CAPTION", help="what guidance moves away from")
    parser.add_argument(
        "--eta", type=float, default=0.0, help="DDIM: 0 = deterministic, 1 = as noisy as DDPM"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sample` and `evaluate` share. None stands for the model's own default."""
    parser.add_argument(
        "--model", default="shapes", metavar="NAME|FOLDER", help="default: the shipped model, %(default)s"
    )
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="denoising steps (default: the model's)"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S", help="1 = no guidance (default: the model's)"
    )
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: %(default)s)")
    parser.add_argument(
        "--backend", default="auto", help="auto, or the one backend to use for every operation"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def run(arguments: argparse.Namespace) -> None:
    captions = _captions(arguments.prompt)
    if arguments.num_images < 1:
        raise InputError(f"--num-images {arguments.num_images}: give 1 or more")
    out = Path(arguments.out)
    check_writable(out)

    started = time.perf_counter()
    import fastldm
    from fastldm.pictures import grid, png_bytes

    with backend(arguments.backend):
        pipeline = load_pipeline(arguments)
        loaded = time.perf_counter()
        with fastldm.record() as calls:
            images = pipeline(
                captions,
                num_images_per_prompt=arguments.num_images,
                negative_prompt=arguments.negative_prompt,
                eta=arguments.eta,
                generator=generator(arguments),
                **sampling_arguments(arguments),
            ).images
        sampled = time.perf_counter()
    if len(images) == 1:
        picture = images[0]
    else:
        picture = grid(images, [caption for caption in captions for _ in range(arguments.num_images)])
    write_file(out, png_bytes(picture))
    print(out.resolve())
    for op, names in calls.backends().items():
        print(f"  {op:<14} {', '.join(names)}")
    print(f"  {'load':<14} {loaded - started:.2f} s")
    print(f"  {'sample':<14} {sampled - loaded:.2f} s on {pipeline.device}")


def backend(name: str):
    """The context in which every operation runs on backend `name`."""
    import fastldm

    try:
        return fastldm.use_backend(name)
    except ValueError as error:
        raise InputError(f"--backend {name}: {error}") from error


def load_pipeline(arguments: argparse.Namespace):
    """The pipeline that --model names, on --device."""
    import torch

    from fastldm.systems.latent_diffusion import LatentDiffusionPipeline

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = LatentDiffusionPipeline.from_pretrained(arguments.model)
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {device}: {reason}; use cpu, or a device that `fastldm env` lists"
        ) from error


def sampling_arguments(arguments: argparse.Namespace) -> dict:
    """The sampling flags that were given; the rest is left to the model's defaults."""
    names = ("num_inference_steps", "guidance_scale", "sampler")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def generator(arguments: argparse.Namespace):
    import torch

    return torch.Generator().manual_seed(arguments.seed)


def _captions(words: list[str]) -> list[str]:
    """Captions as typed; several single words are one caption whose quotes were forgotten."""
    if len(words) > 1 and not any(" " in word.strip() for word in words):
        return [" ".join(words)]
    return words
