"""Captions to token ids, over the `tokenizers` library and its `tokenizer.json`."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import CheckpointError, InputError
from fastldm.io import atomic_write, write_json
from fastldm.models.captions import as_captions, warn_of_cut
from fastldm.models.weights import read_tokenizer_config

PAD, CLS, SEP, UNK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")

# Known words a message lists at most.
_LISTED_WORDS = 40


class Tokenizer:
    """A `tokenizers.Tokenizer` with a fixed text window.

    Words the vocabulary lacks are an error, not an unknown token: a picture of another caption helps nobody.
    The empty string is the null caption.

    Args:
        backend: a `tokenizers.Tokenizer`.
        max_length: tokens per caption, special tokens included; shorter captions are padded on the right.
    """

    def __init__(self, backend: Any, max_length: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        # A caption that spells "[PAD]" means those letters.
        backend.encode_special_tokens = True
        self.backend = backend
        self.max_length = max_length
        self._special_count = backend.num_special_tokens_to_add(is_pair=False)
        self._unk_id = backend.token_to_id(UNK)
        self._pad_id = backend.token_to_id(PAD)
        if self._pad_id is None:
            raise CheckpointError(f"the tokenizer has no {PAD} token; fastldm reads BERT-style tokenizers")
        if max_length <= self._special_count:
            raise InputError(
                f"max_length={max_length} leaves no room for words; use {self._special_count + 1} or more"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Copying and pickling the backend forget this switch.
        self.backend.encode_special_tokens = True

    @classmethod
    def from_captions(cls, captions: Iterable[str], max_length: int) -> Tokenizer:
        """A word-level tokenizer that knows the words of `captions`, the most frequent first.

        Letters are lower-cased, apostrophes dropped, other punctuation and hyphens become spaces.
        """
        from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"['\u2019]"), ""),
                normalizers.Replace(Regex(r"\p{P}"), " "),
            ]
        )
        counts = Counter(word for caption in captions for word in normalizer.normalize_str(caption).split())
        words = sorted(counts, key=lambda word: (-counts[word], word))
        backend = Backend(
            models.WordLevel({w: i for i, w in enumerate((*SPECIAL_TOKENS, *words))}, unk_token=UNK)
        )
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(list(SPECIAL_TOKENS))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", special_tokens=[(CLS, 1), (SEP, 2)]
        )
        return cls(backend, max_length)

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""
        return self.backend.get_vocab_size()

    @property
    def words(self) -> list[str]:
        """The vocabulary without special tokens, in the order of ids."""
        vocabulary = self.backend.get_vocab()
        return [word for word in sorted(vocabulary, key=vocabulary.get) if not re.fullmatch(r"\[.*\]", word)]

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids, int64 (B, max_length), on the CPU.

        Warns where a caption is longer than the window, naming what is cut off.

        Raises:
            InputError: for something that is not text, for unknown words, for a caption of punctuation only.
        """
        rows = [self._encode(caption) for caption in as_captions("captions", captions, at_least=0)]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def _encode(self, caption: str) -> list[int]:
        encoding = self.backend.encode(caption, add_special_tokens=False)
        self._refuse_unknown(caption, encoding)
        if caption.strip() and not encoding.ids:
            raise InputError(f"the caption {caption!r} holds no word; write some, or '' for no condition")
        room = self.max_length - self._special_count
        if len(encoding.ids) > room:
            warn_of_cut(caption, len(encoding.ids), room, encoding.offsets[room][0])
            encoding.truncate(room)
        ids = self.backend.post_process(encoding).ids
        return ids + [self._pad_id] * (self.max_length - len(ids))

    def _refuse_unknown(self, caption: str, encoding: Any) -> None:
        unknown = [
            caption[start:end]
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._unk_id
        ]
        if not unknown:
            return
        words = self.words
        parts = []
        for word in dict.fromkeys(unknown):
            close = difflib.get_close_matches(word.lower(), words, n=2, cutoff=0.7)
            parts.append(f"{word!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
        known = " ".join(words[:_LISTED_WORDS]) + (" ..." if len(words) > _LISTED_WORDS else "")
        raise InputError(f"the model has never seen the word(s) {', '.join(parts)}; it knows: {known}")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as PreTrainedTokenizerFast reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "pad_token": PAD,
            "cls_token": CLS,
            "sep_token": SEP,
            "unk_token": UNK,
        }
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, subfolder: str | None = None, max_length: int | None = None
    ) -> Tokenizer:
        """Read `tokenizer.json`, or the `vocab.txt` of an older BERT folder.

        Args:
            max_length: what the text encoder takes; counts where the folder states more, or nothing.

        Raises:
            CheckpointError: if the folder holds no tokenizer, or nothing says how long its text window is.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers.implementations import BertWordPieceTokenizer

        folder = Path(folder) / (subfolder or "")
        config = read_tokenizer_config(folder)
        try:
            if (folder / "tokenizer.json").exists():
                backend = Backend.from_file(str(folder / "tokenizer.json"))
            elif (folder / "vocab.txt").exists():
                lowercase = config.get("do_lower_case", True)
                wordpiece = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)
                backend = Backend.from_str(wordpiece.to_str())
            else:
                raise CheckpointError(f"{folder} holds neither tokenizer.json nor vocab.txt")
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be read: {error}; download or save it again"
            ) from error
        # transformers writes 1e30 for "no limit"; a BERT vocabulary states its 512 tokens, LDM takes 77.
        lengths = [n for n in (config.get("model_max_length"), max_length) if n is not None and n < 1e6]
        if not lengths:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json states no model_max_length; pass max_length"
            )
        return cls(backend, int(min(lengths)))
