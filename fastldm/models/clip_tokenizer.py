"""CLIP's captions to token ids: lower-cased byte-level byte-pair encoding (Radford et al. 2021, section 2.4).

A word ends in a symbol with `</w>`. A text is <|startoftext|>, its tokens, <|endoftext|>, and padding. Ids
are those of transformers' CLIPTokenizer.
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

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

# Contractions, runs of letters, single digits, runs of what is neither; the special tokens stay whole so that
# the pieces are those of transformers.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Of the lines of OpenAI's file, its tokenizer reads those after the first that fill its 49408 ids.
_OPENAI_MERGES = 49408 - 2 * 256 - 2


class CLIPTokenizer:
    """Byte-pair encoding with a fixed text window.

    Every text can be spelt, so no word is unknown. A caption that spells "<|endoftext|>" means those letters.

    Args:
        vocab: id of each token; holds <|startoftext|> and <|endoftext|>.
        merges: pairs of symbols, those merged first in front.
        max_length: tokens per caption, start and end included.
        pad_token: what follows the end of text; OpenAI pads with id 0, which is "!" in its vocabulary.

    Raises:
        CheckpointError: a vocabulary without the special tokens, or merges of symbols it lacks.
        InputError: a window without room for words.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        max_length: int = 77,
        pad_token: str = EOS,
    ) -> None:
        missing = [token for token in (BOS, EOS, pad_token) if token not in vocab]
        if missing:
            raise CheckpointError(
                f"the vocabulary has no {', '.join(dict.fromkeys(missing))}; give one of CLIP's tokenizer"
            )
        if max_length < 3:
            raise InputError(f"max_length={max_length} leaves no room for words; use 3 or more")
        self.vocab = dict(vocab)
        self.merges = [tuple(pair) for pair in merges]
        self.max_length = max_length
        self.pad_token = pad_token
        self.backend = _backend(self.vocab, self.merges)

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], max_length: int = 77, *, merges: int = 1024
    ) -> CLIPTokenizer:
        """A tokenizer that learns at most so many `merges` from `captions`, with OpenAI's order of ids: the
        bytes, the bytes that end a word, the merged tokens, start and end of text. The same captions give
        the same tokenizer."""
        first = _byte_tokens()
        splitter = _backend(bpe.numbered(first, [], (BOS, EOS)), [])
        words: Counter[tuple[str, ...]] = Counter()
        for caption in captions:
            text = splitter.normalizer.normalize_str(caption)
            for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(text):
                words[(*piece[:-1], piece[-1] + END_OF_WORD)] += 1
        learned = bpe.learn_merges(words, merges)
        return cls(bpe.numbered(first, learned, (BOS, EOS)), learned, max_length)

    @classmethod
    def from_openai(cls, path: str | os.PathLike, max_length: int = 77) -> CLIPTokenizer:
        """Read OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or the same unpacked: a heading, then a merge a line.

        Raises:
            CheckpointError: the file cannot be read or holds something else.
        """
        merges = bpe.read_openai_merges(path, _OPENAI_MERGES)
        first = _byte_tokens()
        return cls(bpe.numbered(first, merges, (BOS, EOS)), merges, max_length, pad_token=first[0])

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""
        return max(self.vocab.values()) + 1

    @property
    def bos_token_id(self) -> int:
        return self.vocab[BOS]

    @property
    def eos_token_id(self) -> int:
        return self.vocab[EOS]

    @property
    def pad_token_id(self) -> int:
        return self.vocab[self.pad_token]

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids, int64 (B, max_length), on the CPU. Warns where a caption is longer, naming what is cut.

        Raises:
            InputError: for something that is not text.
        """
        rows = [self._encode(caption) for caption in as_captions("captions", captions, at_least=0)]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.max_length)

    def _encode(self, caption: str) -> list[int]:
        encoding = self.backend.encode(caption)
        ids, room = encoding.ids, self.max_length - 2
        if len(ids) > room:
            warn_of_cut(caption, len(ids), room, encoding.offsets[room][0])
        ids = [self.bos_token_id, *ids[:room], self.eos_token_id]
        return ids + [self.pad_token_id] * (self.max_length - len(ids))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids up to its end, normalised: lower case, a space after each word."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        tokens = (self.backend.id_to_token(i) for i in ids if i != self.bos_token_id)
        return self.backend.decoder.decode(["".join(tokens)]).replace(END_OF_WORD, " ").strip()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `vocab.json`, `merges.txt`, `tokenizer.json` and `tokenizer_config.json`, between them what
        CLIP's tokenizers of every version of transformers read."""
        from tokenizers import processors

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = _backend(self.vocab, self.merges)
        whole.add_special_tokens([BOS, EOS])
        whole.post_processor = processors.RobertaProcessing(
            (EOS, self.eos_token_id), (BOS, self.bos_token_id), False, False
        )
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": EOS,
            "pad_token": self.pad_token,
        }
        vocab = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        atomic_write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
        atomic_write(folder / "merges.txt", bpe.merges_text(self.merges))
        atomic_write(folder / "tokenizer.json", whole.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, subfolder: str | None = None, max_length: int | None = None
    ) -> CLIPTokenizer:
        """Read `vocab.json` and `merges.txt`, or the model in `tokenizer.json`.

        Args:
            max_length: what the text tower takes; counts where the folder states more, or nothing. 77 where
                neither says.

        Raises:
            CheckpointError: if the folder holds no such tokenizer.
        """
        folder = Path(folder) / (subfolder or "")
        vocab, merges, config = bpe.read_folder(folder, END_OF_WORD)
        pad = config.get("pad_token", EOS)
        pad = pad["content"] if isinstance(pad, Mapping) else pad
        # transformers writes 1e30 for "no limit".
        lengths = [n for n in (config.get("model_max_length"), max_length) if n is not None and n < 1e6]
        return cls(vocab, merges, int(min(lengths, default=77)), pad or EOS)


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """A `tokenizers.Tokenizer` without special tokens around the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        model = models.BPE(dict(vocab), list(merges), end_of_word_suffix=END_OF_WORD, unk_token=EOS)
    except Exception as error:  # tokenizers raises bare Exception for merges that do not fit
        raise CheckpointError(f"the merges do not fit the vocabulary: {error}") from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_tokens() -> list[str]:
    """The letters of the bytes, then the same with `</w>`."""
    letters = bpe.byte_letters()
    return letters + [letter + END_OF_WORD for letter in letters]
