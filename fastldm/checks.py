"""What is asked of the values that users give, and how messages speak of them."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

# Letters whose names begin with a vowel, as the first of an abbreviation: an LDM, an SDE.
_SPELT_WITH_AN = "AEFHILMNORSX"


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_fraction(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def plain_number(value: Any) -> Any:
    """The number in a tensor or an array of one; anything else as it is."""
    return value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value


def described(value: Any) -> str:
    """What a value is: "float32 (2, 3, 64, 64)" of a tensor or an array, else the name of its type."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        return type(value).__name__
    kind = "" if type(value).__name__ == "Tensor" else f"{type(value).__name__} of "
    return f"{kind}{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def shown(value: Any) -> str:
    """A wrong value in a message: a tensor or an array described, else its repr, cut to one short line."""
    plain = value is None or isinstance(value, str | Real | type)
    listed = isinstance(value, list | tuple | dict) and not any(hasattr(v, "shape") for v in value)
    return f"{value!r:.60}" if plain or listed else described(value)


def with_article(name: str) -> str:
    """A class's name after "a" or "an", as it is said: an ADMClassifier, a UNet2DConditionModel."""
    abbreviation = re.match(r"[A-Z](?=[A-Z\d])", name) is not None
    vowel = name[:1] in _SPELT_WITH_AN if abbreviation else name[:1] in "AEIOaeio"
    return f"{'an' if vowel else 'a'} {name}"


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """A question that names up to three of `known` that are close to `word`; `otherwise` if none is."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is of an annotated type: text, numbers, truth values, lists and
    mappings of them. None and types that files do not hold are left to whoever takes them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(is_of_type(value, option) for option in arguments if option is not type(None))
    if origin is Literal:
        return value in arguments
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if (origin or hint) in (Sequence, list, tuple):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(is_of_type(item, arguments[0]) for item in value if arguments)
    if (origin or hint) in (Mapping, dict):
        return isinstance(value, Mapping)
    return True


def type_in_words(hint: Any) -> str:
    """An annotated type as messages name it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_in_words(a) for a in arguments)
    if hint is type(None):
        return "null"
    if origin is not None:
        name = {Sequence: "list", Mapping: "dict"}.get(origin, origin.__name__)
        return f"a {name} of {', '.join(type_in_words(a) for a in arguments)}"
    return getattr(hint, "__name__", str(hint))
