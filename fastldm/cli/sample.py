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

# Pictures that go through the networks at once, and that one PNG shows.
_BATCH, _MOST = 64, 4096


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
    if not 1 <= arguments.num_images <= _MOST // len(captions):
        raise InputError(
            f"--num-images {arguments.num_images} for {len(captions)} captions: give 1 or more, and up to "
            f"{_MOST} pictures in all; another --seed draws others"
        )
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
        clip = None
        if arguments.clip is not None:
            clip = CLIPScorer.from_pretrained(arguments.clip).to(pipeline.device)
        loaded = time.perf_counter()
        generator = torch.Generator().manual_seed(arguments.seed)
        wanted = [caption for caption in captions for _ in range(arguments.num_images)]
        images = []
        with fastldm.record() as calls:
            for start in range(0, len(wanted), _BATCH):
                some = wanted[start : start + _BATCH]
                images += pipeline(
                    some,
                    num_inference_steps=arguments.num_inference_steps,
                    guidance_scale=arguments.guidance_scale,
                    negative_prompt=arguments.negative_prompt,
                    eta=arguments.eta,
                    karras=arguments.karras,
                    generator=generator,
                    progress=sys.stderr.isatty(),
                    gradient=None if clip is None else clip.gradient(some),
                    gradient_scale=arguments.clip_scale,
                    **of_upsampler,
                ).images
        sampled = time.perf_counter()
    picture = images[0] if len(images) == 1 else grid(images, wanted)
    write_file(out, png_bytes(picture))
    if arguments.model == "shapes":
        _note_other_captions(captions)
    print(out.resolve())
    for op, names in calls.backends().items():
        print(f"  {op:<14} {', '.join(names)}")
    print(f"  {'load':<14} {loaded - started:.2f} s")
    print(f"  {'sample':<14} {sampled - loaded:.2f} s on {pipeline.device}")


def _note_other_captions(captions: list[str]) -> None:
    """Says which captions are made of known words, but not as those that the shipped model has learned."""
    from fastldm.training.datasets.shapes import parse_caption

    for caption in captions:
        try:
            parse_caption(caption)
        except InputError:
            print(
                f"fastldm: {caption!r} is no caption of the kind that this model has learned; see the README",
                file=sys.stderr,
            )


def _steps(text: str) -> int | str:
    """A number of steps, or the name of a published choice of them, which the pipeline knows."""
    return int(text) if text.lstrip("-").isdigit() else text


def _captions(words: list[str]) -> list[str]:
    """Captions as typed; several single words are one caption whose quotes were forgotten."""
    if len(words) > 1 and not any(" " in word.strip() for word in words):
        caption = " ".join(words)
        print(f"fastldm: reading the words as one caption, {caption!r}", file=sys.stderr)
        return [caption]
    return words
