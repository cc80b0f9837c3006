"""GLIDE's tokenizer against transformers' GPT-2, and against an encoding written out by hand."""

from __future__ import annotations

import copy
import gzip
import json
import pickle

import pytest
import torch
from transformers import AutoTokenizer, GPT2TokenizerFast

from fastldm.errors import CheckpointError, InputError
from fastldm.models import GlideTokenizer
from fastldm.models.glide_tokenizer import EOS
from fastldm.training.datasets.shapes import CaptionedShapes

MERGES = [("l", "o"), ("Ġ", "lo"), ("e", "r"), ("Ġlo", "w"), ("lo", "w"), ("n", "e"), ("'", "s"), ("Ġ", "Ġ")]
TEXTS = [
    "low",
    "Lower NEWER  lowest",
    "it's the lower's, isn't it? IT'S",
    "  spaces\tand\nlines   ",
    "12 new3 ones: 4.5%",
    "café naïve — “quoted” Ünïcode",
    "cafe\u0301 decomposed",
    "日本語 текст 🙂👍🏽",
    "#hash ##low !!! <b>tag</b>",
    "",
    " ",
    "a" * 30,
    "ǅ ß ΟΔΥΣΣΕΥΣ",
    "under_score snake_case",
]


def bytes_as_letters():
    """OpenAI's table of letters for bytes, after its published definition."""
    known = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    extra = [b for b in range(256) if b not in known]
    return [chr(b) for b in known] + [chr(256 + i) for i in range(len(extra))]


def vocabulary():
    tokens = [*bytes_as_letters(), *("".join(pair) for pair in MERGES), EOS]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture
def ours():
    return GlideTokenizer(vocabulary(), MERGES)


@pytest.fixture
def peer(tmp_path_factory):
    """transformers' tokenizer of the same vocabulary and merges."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))
    return GPT2TokenizerFast.from_pretrained(folder)


def own(tokenizer, text):
    """The ids of a text that are in the mask, after checks of the rest."""
    tokens, mask = tokenizer(text)
    assert tokens.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert tokens.shape == mask.shape == (1, tokenizer.text_ctx)
    count = int(mask.sum())
    assert mask[0, :count].all()
    assert (tokens[0, count:] == tokenizer.eos_token_id).all()
    return tokens[0, :count].tolist()


def test_ids_are_the_peer_s_of_the_text_in_lower_case(ours, peer):
    for text in TEXTS:
        assert own(ours, text) == peer(text.lower()).input_ids
        assert ours.decode(ours(text)[0][0]) == text.lower()


def test_random_texts_are_the_peer_s(ours, peer):
    letters = "lowernstLOW'\u2019 \t0123!?.,éßж漢🙂\u0301"
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        places = torch.randint(len(letters), (12,), generator=generator).tolist()
        text = "".join(letters[i] for i in places)
        assert own(ours, text) == peer(text.lower()).input_ids


def test_ids_by_hand(ours):
    ids = {token: i for i, token in enumerate([*bytes_as_letters(), *("".join(p) for p in MERGES), EOS])}
    assert own(ours, "Low lower's") == [ids[t] for t in ("low", "Ġlow", "er", "'s")]
    assert own(ours, "new é") == [ids[t] for t in ("ne", "w", "Ġ", "Ã", "©")]
    assert (ours.vocab_size, ours.eos_token_id) == (265, 264)


def test_an_empty_caption_is_all_padding(ours):
    tokens, mask = ours(["", "low"])
    assert (tokens[0] == ours.eos_token_id).all()
    assert mask.sum(1).tolist() == [0, 1]
    tokens, mask = ours([])
    assert tokens.shape == mask.shape == (0, 128)


def test_a_long_caption_is_cut_and_what_is_cut_is_said():
    short = GlideTokenizer(vocabulary(), MERGES, 3)
    with pytest.warns(UserWarning, match="has 6 tokens, the text window 3: 'low ne' is cut off"):
        tokens, mask = short("low low low low ne")
    assert tokens.tolist() == [[short.vocab[t] for t in ("low", "Ġlow", "Ġlow")]]
    assert mask.all()


def test_spelt_special_tokens_are_letters(ours):
    for tokenizer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        ids = own(tokenizer, f"low {EOS} new")
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == f"low {EOS} new"


@pytest.mark.parametrize("packed", [False, True])
def test_openai_s_file_of_merges_gives_its_ids(ours, tmp_path, packed):
    text = ("#version\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n").encode()
    file = tmp_path / "vocab.bpe"
    file.write_bytes(gzip.compress(text) if packed else text)
    tokenizer = GlideTokenizer.from_openai(file)
    assert tokenizer.vocab == vocabulary()
    for text in TEXTS:
        assert own(tokenizer, text) == own(ours, text)


def test_folders_load_in_both_directions(ours, peer, tmp_path):
    short = GlideTokenizer(vocabulary(), MERGES, 40)
    short.save_pretrained(tmp_path / "ours")
    for peer_class in (GPT2TokenizerFast, AutoTokenizer):
        theirs = peer_class.from_pretrained(tmp_path / "ours")
        assert theirs.model_max_length == 40
        assert theirs.pad_token_id == short.eos_token_id
        for text in TEXTS:
            assert theirs(text.lower()).input_ids == own(short, text)
    peer.save_pretrained(tmp_path / "theirs")
    for folder, length in (("ours", 40), ("theirs", 128)):
        loaded = GlideTokenizer.from_pretrained(tmp_path, subfolder=folder)
        assert loaded.text_ctx == length
        assert all(own(loaded, text) == own(ours, text) for text in TEXTS)
    assert GlideTokenizer.from_pretrained(tmp_path / "theirs", text_ctx=200).text_ctx == 200
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "ours" / name).unlink()
    whole = GlideTokenizer.from_pretrained(tmp_path / "ours")
    assert all(own(whole, text) == own(ours, text) for text in TEXTS)


def test_a_tokenizer_learns_from_captions(tmp_path):
    data = CaptionedShapes("train", length=200)
    captions = [data.draw(i)[1] for i in range(200)]
    tokenizer = GlideTokenizer.from_captions(captions, 24, merges=300)
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1
    tokens, mask = tokenizer(captions)
    assert mask.sum(1).tolist() == [len(caption.split()) for caption in captions]  # a token per word
    assert [tokenizer.decode(row) for row in tokens] == [caption.lower() for caption in captions]
    assert tokenizer.vocab == GlideTokenizer.from_captions(captions[::-1], merges=300).vocab
    capitals = [caption.upper() for caption in captions]
    assert tokenizer.vocab == GlideTokenizer.from_captions(capitals, merges=300).vocab
    few = GlideTokenizer.from_captions(captions, merges=5)
    assert few.vocab_size == 256 + 5 + 1
    assert few.decode(few("Qu'est-ce? 漢")[0][0]) == "qu'est-ce? 漢"
    tokenizer.save_pretrained(tmp_path)
    text = "a small blue star, isn't it"
    assert GPT2TokenizerFast.from_pretrained(tmp_path)(text).input_ids == own(tokenizer, text)


def test_what_cannot_be_used_is_refused(ours, tmp_path):
    with pytest.raises(InputError, match=r"captions must be .* item 0 is 3, not text"):
        ours([3])
    with pytest.raises(InputError, match=r"captions must be .* not int"):
        ours(3)
    with pytest.raises(InputError, match="text_ctx=0"):
        GlideTokenizer(vocabulary(), MERGES, 0)
    for token in ("Ġ", EOS):
        lacking = {key: i for key, i in vocabulary().items() if key != token}
        with pytest.raises(CheckpointError, match="lacks 1 of the 256 bytes"):
            GlideTokenizer(lacking, [])
    with pytest.raises(CheckpointError, match="do not fit the vocabulary"):
        GlideTokenizer(vocabulary(), [("q", "xyz")])
    with pytest.raises(CheckpointError, match="holds neither"):
        GlideTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        GlideTokenizer.from_openai(tmp_path / "absent.bpe")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(CheckpointError, match="holds no merges: its first line"):
        GlideTokenizer.from_openai(tmp_path / "vocab.json")
    words = {"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="end_of_word_suffix None"):
        GlideTokenizer.from_pretrained(tmp_path)
