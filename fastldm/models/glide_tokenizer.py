"""GLIDE's captions to token ids and their mask: GPT-2's byte-level byte-pair encoding, in lower case.

Words carry the space before them, nothing marks where a text starts, and what follows its end is
<|endoftext|>, outside the mask.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import CheckpointError, InputError
from fastldm.io import atomic_write, write_json
from fastldm.models import bpe
from fastldm.models.captions import as_captions, warn_of_cut

EOS = "<|endoftext|>"


class GlideTokenizer:
    """GPT-2's byte-pair encoding with GLIDE's fixed text window.

    Every text can be spelt, so no word is unknown. A caption that spells "<|endoftext|>" means those letters.

    Args:
        vocab: id of each token; holds a letter for each byte (`fastldm.models.bpe.byte_letters`) and
            <|endoftext|>.
        merges: pairs of symbols, those merged first in front.
        text_ctx: tokens per caption, the network's `text_ctx`.

    Raises:
        CheckpointError: a vocabulary that lacks these, or merges of symbols it lacks.
        InputError: a window without room for words.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], text_ctx: int = 128
    ) -> None:
        missing = [token for token in (*bpe.byte_letters(), EOS) if token not in vocab]
        if missing:
            raise CheckpointError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes and {EOS} ({' '.join(missing[:5])}); "
                "give one like GPT-2's"
            )
        if text_ctx < 1:
            raise InputError(f"text_ctx={text_ctx} leaves no room for words; use 1 or more")
        self.vocab = dict(vocab)
        self.merges = [tuple(pair) for pair in merges]
        self.text_ctx = text_ctx
        self.backend = _backend(self.vocab, self.merges)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], text_ctx: int = 128, *, merges: int = 1024
    ) -> GlideTokenizer:
        """A tokenizer that learns at most so many `merges` from `captions`, with GPT-2's order of ids: the
        bytes, the merged tokens, the end of text. The same captions give the same tokenizer."""
        letters = bpe.byte_letters()
        splitter = _backend(bpe.numbered(letters, [], [EOS]), []).pre_tokenizer
        words = Counter(
            tuple(piece) for caption in captions for piece, _ in splitter.pre_tokenize_str(caption.lower())
        )
        learned = bpe.learn_merges(words, merges)
        return cls(bpe.numbered(letters, learned, [EOS]), learned, text_ctx)

    @classmethod
    def from_openai(cls, path: str | os.PathLike, text_ctx: int = 128) -> GlideTokenizer:
        """Read glide-text2im's `vocab.bpe.gz` or GPT-2's `vocab.bpe`: a heading, then a merge a line.

        `encoder.json` beside it is not needed: the ids in it are in the order of bytes and merges.

        Raises:
            CheckpointError: the file cannot be read or holds something else.
        """
        merges = bpe.read_openai_merges(path)
        return cls(bpe.numbered(bpe.byte_letters(), merges, [EOS]), merges, text_ctx)

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this, the network's `n_vocab`."""
        return max(self.vocab.values()) + 1

    @property
    def eos_token_id(self) -> int:
        return self.vocab[EOS]

    def __call__(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 (B, text_ctx), and their mask, bool (B, text_ctx), True for the caption's own.

        On the CPU. Nothing of an empty caption is in the mask. Warns where a caption is longer, naming what
        is cut off.

        Raises:
            InputError: for something that is not text.
        """
        rows = [self._encode(caption) for caption in as_captions("captions", captions, at_least=0)]
        tokens = torch.full((len(rows), self.text_ctx), self.eos_token_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        return tokens, mask

    def _encode(self, caption: str) -> list[int]:
        # Python's lower case is GLIDE's: that of `tokenizers` knows no final sigma.
        caption = caption.lower()
        encoding = self.backend.encode(caption)
        if len(encoding.ids) > self.text_ctx:
            first_cut, _ = encoding.offsets[self.text_ctx]
            warn_of_cut(caption, len(encoding.ids), self.text_ctx, first_cut)
        return encoding.ids[: self.text_ctx]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids up to its end, in lower case."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        return self.backend.decode(ids)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `vocab.json`, `merges.txt`, `tokenizer.json` and `tokenizer_config.json`.

        transformers' GPT2Tokenizer reads them, and gives the same ids for text in lower case.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": self.text_ctx,
            "add_prefix_space": False,
            "bos_token": EOS,
            "eos_token": EOS,
            "unk_token": EOS,
            "pad_token": EOS,
        }
        whole = _backend(self.vocab, self.merges)
        whole.add_special_tokens([EOS])
        vocab = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        atomic_write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
        atomic_write(folder / "merges.txt", bpe.merges_text(self.merges))
        atomic_write(folder / "tokenizer.json", whole.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, subfolder: str | None = None, text_ctx: int | None = None
    ) -> GlideTokenizer:
        """Read `vocab.json` and `merges.txt`, or the model in `tokenizer.json`, such as GPT-2's.

        Args:
            text_ctx: the network's; None = what the folder states, or 128 where that is nothing or more than
                GLIDE's networks take (GPT-2 states 1024).

        Raises:
            CheckpointError: if the folder holds no such tokenizer.
        """
        vocab, merges, config = bpe.read_folder(Path(folder) / (subfolder or ""), None)
        if text_ctx is None:
            stated = config.get("model_max_length")
            text_ctx = 128 if stated is None else int(min(stated, 128))
        return cls(vocab, merges, text_ctx)


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """A `tokenizers.Tokenizer` without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE(dict(vocab), list(merges))
    except Exception as error:  # tokenizers raises bare Exception for merges that do not fit
        raise CheckpointError(f"the merges do not fit the vocabulary: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
