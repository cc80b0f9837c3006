"""Byte-level byte-pair encoding: what the tokenizers of CLIP and GLIDE share."""

from __future__ import annotations

import gzip
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastldm.errors import CheckpointError
from fastldm.models.weights import read_json, read_tokenizer_config

Merge = tuple[str, str]


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, those that are printable themselves in front."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    letters = [chr(byte) for byte in printable]
    return letters + [chr(256 + i) for i in range(256 - len(letters))]


def numbered(first: Sequence[str], merges: Sequence[Merge], last: Sequence[str]) -> dict[str, int]:
    """The vocabulary of `first`, what `merges` make, and the special tokens `last`, in this order."""
    tokens = dict.fromkeys([*first, *("".join(pair) for pair in merges), *last])
    return {token: i for i, token in enumerate(tokens)}


def learn_merges(words: Mapping[tuple[str, ...], int], most: int) -> list[Merge]:
    """Merge the commonest pair of neighbours, again and again (Sennrich et al. 2016, algorithm 1).

    Of equally common pairs the first in alphabetical order is merged, so that the same words always give the
    same merges: the trainer of `tokenizers` goes by the order of a hash table.

    Args:
        words: how often each word, as its symbols, occurs.
        most: of the merges; there are fewer where every word is one symbol before.
    """
    spelt = [(list(word), words[word]) for word in sorted(words)]
    counts: Counter[Merge] = Counter()
    places: dict[Merge, set[int]] = defaultdict(set)

    def count(i: int, sign: int) -> None:
        symbols, times = spelt[i]
        for pair in pairwise(symbols):
            counts[pair] += sign * times
            places[pair].add(i)

    for i in range(len(spelt)):
        count(i, 1)
    merges = []
    while len(merges) < most:
        commonest = max(counts.values(), default=0)
        if commonest == 0:
            break
        best = min(pair for pair, times in counts.items() if times == commonest)
        merges.append(best)
        for i in places.pop(best):
            count(i, -1)
            spelt[i] = (_merged(spelt[i][0], best), spelt[i][1])
            count(i, 1)
        del counts[best]
    return merges


def _merged(symbols: list[str], pair: Merge) -> list[str]:
    """`symbols` with every `pair` of neighbours joined, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        found = tuple(symbols[i : i + 2]) == pair
        joined.append("".join(pair) if found else symbols[i])
        i += 2 if found else 1
    return joined


def read_openai_merges(path: str | os.PathLike, most: int | None = None) -> list[Merge]:
    """The first `most` merges of one of OpenAI's files, packed by gzip or not: a heading, then one a line.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"cannot read the merges in {path}: {error}") from error
    heading, *lines = text.split("\n")
    if "#version" not in heading:
        begin = heading[:40]
        raise CheckpointError(f"{path} holds no merges: its first line is {begin!r}, not #version: ...")
    return _parse_merges(lines if most is None else lines[:most], path)


def read_folder(folder: Path, end_of_word: str | None) -> tuple[dict[str, int], list[Merge], dict[str, Any]]:
    """Vocabulary, merges and `tokenizer_config.json` of a tokenizer of transformers.

    Reads `vocab.json` and `merges.txt`, or the model in `tokenizer.json`, which must mark the ends of words
    by `end_of_word` (None = not at all).

    Raises:
        CheckpointError: the folder holds no such tokenizer.
    """
    vocab_file, merges_file, whole = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab_file.is_file() and merges_file.is_file():
        vocab = read_json(vocab_file)
        try:
            lines = merges_file.read_text("utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {merges_file}: {error}") from error
        # The heading is a line of its own; "#" is also a symbol that merges.
        merges = _parse_merges(lines[1:] if lines[0].startswith("#version") else lines, merges_file)
    elif whole.is_file():
        model = read_json(whole).get("model", {})
        if model.get("type") != "BPE" or (model.get("end_of_word_suffix") or None) != end_of_word:
            raise CheckpointError(
                f"{whole} holds no byte-pair encoding with end_of_word_suffix {end_of_word!r}"
            )
        vocab = model["vocab"]
        # Older files write a pair as one text.
        merges = [tuple(p.split(" ")) if isinstance(p, str) else tuple(p) for p in model["merges"]]
    else:
        raise CheckpointError(f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json")
    return vocab, merges, read_tokenizer_config(folder)


def _parse_merges(lines: Iterable[str], source: str | os.PathLike) -> list[Merge]:
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    for pair in pairs:
        if len(pair) != 2:
            raise CheckpointError(f"{source}: a merge is two symbols, not {' '.join(pair)!r}")
    return pairs


def merges_text(merges: Iterable[Merge]) -> str:
    """The content of `merges.txt`."""
    return "#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in merges)
