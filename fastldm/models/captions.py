"""Captions as users give them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastldm.errors import InputError


class CutCaptionWarning(UserWarning):
    """A caption has more tokens than the text window; its end is not read."""


def warn_of_cut(caption: str, tokens: int, room: int, first_cut: int) -> None:
    """Say what of a caption is cut off: it has `tokens` for a window of `room`, and its letters from
    `first_cut` on are not read. For a tokenizer's own `_encode`, to point at whoever called the tokenizer."""
    cut = caption[first_cut:].strip()
    warnings.warn(
        f"the caption has {tokens} tokens, the text window {room}: {cut!r} is cut off",
        CutCaptionWarning,
        stacklevel=5,
    )


@contextmanager
def cutting_quietly() -> Iterator[None]:
    """Where captions are read again and again, after what is cut has been said once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutCaptionWarning)
        yield


def as_captions(
    name: str, given: str | Sequence[str], *, noun: str = "caption", at_least: int = 1
) -> list[str]:
    """A caption or a sequence of captions as a list.

    Args:
        name, noun: what the argument and one of them are called in messages.
        at_least: how many there must be.

    Raises:
        InputError: for something that is not text, or too few.
    """
    captions: Any = [given] if isinstance(given, str) else given
    if not isinstance(captions, Sequence):
        raise InputError(f"{name} must be a {noun} or a list of {noun}s, not {type(given).__name__}")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InputError(
                f"{name} must be a {noun} or a list of {noun}s, but its item {i} is {caption!r:.40}, not text"
            )
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise InputError(f"{name}, item {i}, {caption!a:.40}, is no text in Unicode; write it in UTF-8")
    if len(captions) < at_least:
        raise InputError(f"there is no {name.removesuffix('s')}; give at least one")
    return list(captions)
