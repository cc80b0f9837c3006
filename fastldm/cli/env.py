"""`fastldm env`: what bug reports need."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    from fastldm.env import report

    found = report()
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
