"""Configurations as YAML with what their keys mean: the docstrings of the fields become comments."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from fastldm.training.config import to_mapping
from fastldm.training.extras import require

_WIDTH = 110


def annotated_yaml(config: Any) -> str:
    """YAML that `load_config` reads back as `config`, each key below the docstring that its field has."""
    return "\n".join(_lines(config)) + "\n"


def _lines(config: Any) -> list[str]:
    yaml = require("yaml")
    meanings, lines = _meanings(type(config)), []
    for key, value in to_mapping(config).items():
        nested = getattr(config, key)
        lines += textwrap.wrap(
            meanings.get(key, ""), _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False
        )
        if dataclasses.is_dataclass(nested):
            lines += [f"{key}:", *(f"  {line}" for line in _lines(nested))]
        else:
            lines += yaml.safe_dump({key: value}, sort_keys=False).splitlines()
    return lines


def _meanings(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, its own or inherited, in one line: the string below it."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in zip(definition.body, definition.body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                meanings[field.target.id] = " ".join(below.value.value.split())
    return meanings
