"""`fastldm sample "a large red circle at the top left"`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fastldm.cli.common import (
    add_model_arguments,
    check_png,
    check_writable,
    finite_scale,
    folder_name,
    load_pipeline,
    use_backend,
    write_file,
)
from fastldm.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", metavar="CAPTION", help="captions, each in quotes")
    add_model_arguments(parser)
    parser.add_argument(
        "--guidance-scale", type=finite_scale, metavar="S", help="1 = no guidance (default: the model's)"
    )
    parser.add_argument("--negative-prompt", metavar="CAPTION", help="what guidance moves away from")
    parser.add_argument(
        "--eta", type=float, default=0.0, help="DDIM: 0 = deterministic, 1 = as noisy as DDPM"
    )
    parser.add_argument(
        "--karras",
        action="store_true",
        default=None,
        help="Karras spacing of noise levels (euler, heun, dpmpp_2m, unipc, ...; default: the model's)",
    )
    parser.add_argument(
        "--upsampler",
        type=folder_name,
        metavar="FOLDER",
        help="GLIDE: an upsampler for the pictures of --model, a base (`fastldm train glide`)",
    )
    parser.add_argument(
        "--upsampler-steps",
        type=_steps,
        metavar="N",
        help="GLIDE: denoising steps of the upsampler, or fast27 (default: the model's)",
    )
    parser.add_argument(
        "--clip",
        type=folder_name,
        metavar="FOLDER",
        help="a CLIP whose gradient guides to the captions (`fastldm train clip`)",
    )
    parser.add_argument(
        "--clip-scale", type=finite_scale, metavar="S", help="multiplies the gradient of --clip (default: 1)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures per caption")
    parser.add_argument(
        "--out", default="sample.png", metavar="FILE", help="PNG to write (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    captions = _captions(arguments.prompt)
    if arguments.clip_scale is not None and arguments.clip is None:
        raise InputError("--clip-scale is for --clip FOLDER; add the folder of a CLIP")
    out = Path(arguments.out)
    check_png(out)
    check_writable(out)

    started = time.perf_counter()
    import torch

    import fastldm
    from fastldm.pictures import grid, png_bytes
    from fastldm.systems.clip import CLIPScorer

    with use_backend(arguments.backend):
        pipeline = load_pipeline(arguments)
        of_upsampler = {}
        if arguments.upsampler_steps is not None:
            if getattr(pipeline, "upsampler", None) is None:
                raise InputError("--upsampler-steps is for GLIDE with an upsampler; add --upsampler FOLDER")
            of_upsampler["upsampler_steps"] = arguments.upsampler_steps
        guide = None
        if arguments.clip is not None:
            guide = CLIPScorer.from_pretrained(arguments.clip).to(pipeline.device).gradient(captions)
        loaded = time.perf_counter()
        with fastldm.record() as calls:
            images = pipeline(
                captions,
                num_inference_steps=arguments.num_inference_steps,
                guidance_scale=arguments.guidance_scale,
                negative_prompt=arguments.negative_prompt,
                num_images_per_prompt=arguments.num_images,
                eta=arguments.eta,
                karras=arguments.karras,
                generator=torch.Generator().manual_seed(arguments.seed),
                progress=sys.stderr.isatty(),
                gradient=guide,
                gradient_scale=arguments.clip_scale,
                **of_upsampler,
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


def _steps(text: str) -> int | str:
    """A number of steps, or the name of a published choice of them, which the pipeline knows."""
    return int(text) if text.lstrip("-").isdigit() else text


def _captions(words: list[str]) -> list[str]:
    """Captions as typed; several single words are one caption whose quotes were forgotten."""
    if len(words) > 1 and not any(" " in word.strip() for word in words):
        return [" ".join(words)]
    return words
