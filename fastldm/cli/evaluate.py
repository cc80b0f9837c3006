"""`fastldm evaluate`: accuracy per attribute on captions of the built-in shapes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastldm.checks import with_article
from fastldm.cli.common import (
    add_model_arguments,
    check_writable,
    finite_scale,
    load_pipeline,
    use_backend,
    write_file,
)
from fastldm.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--guidance-scale",
        type=finite_scale,
        nargs="+",
        metavar="S",
        help="each is measured (default: the model's)",
    )
    parser.add_argument(
        "--num-captions", type=int, default=512, metavar="N", help="of each set (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pictures at once (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default="evaluation.json",
        metavar="FILE",
        help="JSON to write; some samples go beside it as PNG (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    examples = out.with_suffix(".png")
    if examples == out:
        raise InputError(f"--out {out}: give the JSON's name; some samples go beside it as PNG")
    check_writable(out)
    check_writable(examples)

    from fastldm.evaluation.accuracy import evaluate
    from fastldm.systems import LatentDiffusionPipeline

    with use_backend(arguments.backend):
        pipeline = load_pipeline(arguments)
        if not isinstance(pipeline, LatentDiffusionPipeline):
            raise InputError(
                f"--model {arguments.model} is {with_article(type(pipeline).__name__)}; give one of latent "
                "diffusion"
            )
        report = evaluate(
            pipeline,
            num_captions=arguments.num_captions,
            guidance_scales=arguments.guidance_scale,
            num_inference_steps=arguments.num_inference_steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            progress=sys.stderr.isatty(),
        )
    print(report)
    write_file(out, f"{json.dumps(report.to_dict(), indent=2)}\n".encode())
    report.save_examples(examples)
    print(out.resolve())
    print(examples.resolve())
