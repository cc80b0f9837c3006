"""`fastldm reproduce`: the lecture's claims, measured on this machine."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from fastldm.errors import InputError

# Those of fastldm.reproduce, which is not imported for --help.
CLAIMS = ["text-vs-class", "noised-clip", "cfg-vs-clip", "latent-vs-pixel"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "claim", choices=[*CLAIMS, "all"], help="which claim; each takes up to half an hour on two cores"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where findings, plots, pictures and trained models go (default: runs/claims, with the seed "
        "where that is not 0)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of weights, training pictures and noise: another seed is another experiment (default: 0)",
    )
    parser.add_argument(
        "--shipped", action="store_true", help="show what was found on our machine, without training"
    )


def run(arguments: argparse.Namespace) -> None:
    from fastldm.reproduce import reproduce, shipped_finding, shipped_folder, shipped_repetitions
    from fastldm.training.extras import require

    for flag in ("out", "seed"):
        if arguments.shipped and getattr(arguments, flag) is not None:
            raise InputError(f"--{flag} is for a run, and --shipped shows what is there; leave one out")
    seed = arguments.seed or 0
    out = Path(arguments.out or ("runs/claims" if seed == 0 else f"runs/claims-seed-{seed}"))
    claims = CLAIMS if arguments.claim == "all" else [arguments.claim]
    if not arguments.shipped:
        for package in ("yaml", "accelerate", "tensorboard"):
            require(package)
        require("matplotlib", extra="reproduce")
    for claim in claims:
        if arguments.shipped:
            finding = shipped_finding(claim)
        else:
            finding = reproduce(claim, out, seed=seed, progress=sys.stderr.isatty())
        print(f"{claim}: {finding.statement}")
        print(textwrap.fill(finding.verdict, 100))
        for again in shipped_repetitions(claim) if arguments.shipped else ():
            print(textwrap.fill(f"Seed {again.seed}: {again.verdict}", 100))
        print(shipped_folder(claim) if arguments.shipped else (out / claim).resolve())
