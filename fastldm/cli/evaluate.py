"""`fastldm evaluate`."""

from __future__ import annotations

import argparse

from fastldm.cli.sample import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    raise NotImplementedError
