"""Captions to token ids: what is normalised, what is refused, what transformers makes of the saved folder."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastldm.errors import CheckpointError, InputError
from fastldm.models import Tokenizer

CAPTIONS = ["a large red circle at the top left", "a small blue five-pointed star", "don't", "a square"]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_captions(CAPTIONS, max_length=12)


def words_of(tokenizer, row):
    return tokenizer.backend.decode(row.tolist(), skip_special_tokens=True)


def test_ids_are_framed_and_padded(tokenizer):
    rows = tokenizer(["a red circle", ""])
    assert rows.dtype == torch.int64
    assert rows.shape == (2, 12)
    vocabulary = tokenizer.backend.get_vocab()
    assert [vocabulary[t] for t in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")] == [0, 1, 2, 3]
    assert rows[0].tolist() == [1, vocabulary["a"], vocabulary["red"], vocabulary["circle"], 2, *[0] * 7]
    assert rows[1].tolist() == [1, 2, *[0] * 10]


def test_one_caption_is_a_batch_of_one(tokenizer):
    assert torch.equal(tokenizer("a star"), tokenizer(["a star"]))
    assert tokenizer([]).shape == (0, 12)


@pytest.mark.parametrize(
    "caption",
    [
        "A Large RED circle",
        " a  large red\ncircle ",
        "a large, red circle!",
        "“a large-red circle”.",
        "a_large red/circle",
    ],
)
def test_case_punctuation_and_spaces_do_not_matter(tokenizer, caption):
    assert torch.equal(tokenizer(caption), tokenizer("a large red circle"))


def test_apostrophes_and_hyphens(tokenizer):
    assert (
        words_of(tokenizer, tokenizer("don\u2019t")[0])
        == words_of(tokenizer, tokenizer("don't")[0])
        == "dont"
    )
    assert words_of(tokenizer, tokenizer("five-pointed")[0]) == "five pointed"


def test_frequent_words_come_first(tokenizer):
    assert tokenizer.words[0] == "a"
    assert tokenizer.vocab_size == len(tokenizer.words) + 4
    assert sorted(tokenizer.words) == sorted({*" ".join(CAPTIONS).replace("-", " ").replace("'", "").split()})


def test_unknown_words_are_named_with_what_is_near_and_known(tokenizer):
    with pytest.raises(InputError) as raised:
        tokenizer(["a red circle", "a Reed cirle on a horse"])
    message = str(raised.value)
    for part in ("'Reed' (did you mean red?)", "'cirle' (did you mean circle?)", "'on'", "'horse'", "large"):
        assert part in message
    assert "\n" not in message


def test_a_large_vocabulary_is_listed_shortly():
    tokenizer = Tokenizer.from_captions([f"word{i}" for i in range(500)], max_length=8)
    with pytest.raises(InputError) as raised:
        tokenizer("zebra")
    assert len(str(raised.value)) < 600
    assert str(raised.value).endswith("...")


@pytest.mark.parametrize("caption", ["a red 🐱", "a [PAD] circle", "[UNK]", "a ☆"])
def test_nothing_unknown_passes_silently(tokenizer, caption):
    with pytest.raises(InputError, match="never seen"):
        tokenizer(caption)


def test_what_is_not_a_caption_is_refused(tokenizer):
    with pytest.raises(InputError, match="holds no word"):
        tokenizer("...")
    with pytest.raises(InputError, match="item 1 is 3, not text"):
        tokenizer(["a", 3])
    with pytest.raises(InputError, match=r"captions must be .* not int"):
        tokenizer(3)


def test_a_long_caption_is_cut_with_a_warning_that_says_what(tokenizer):
    long = "a large red circle at the top left a small Blue five-pointed star"
    with pytest.warns(
        UserWarning, match="14 tokens, the text window 10: 'Blue five-pointed star' is cut off"
    ) as seen:
        row = tokenizer(long)[0]
    assert seen[0].filename == __file__
    assert words_of(tokenizer, row) == "a large red circle at the top left a small"
    assert row[-1] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("a large red circle at the top left a small")


def test_transformers_reads_the_saved_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (peer.model_max_length, peer.pad_token_id, peer.cls_token, peer.unk_token) == (
        12,
        0,
        "[CLS]",
        "[UNK]",
    )
    captions = [
        "A large, red circle",
        "",
        "a large red circle at the top left a small blue five-pointed star",
    ]
    theirs = peer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="cut off"):
        assert torch.equal(tokenizer(captions), theirs)


def test_folders_go_round(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    back = Tokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    assert back.max_length == 12
    assert back.words == tokenizer.words
    assert torch.equal(back(CAPTIONS), tokenizer(CAPTIONS))
    with pytest.raises(InputError, match="'PAD'"):
        back("[PAD]")


def test_a_copy_is_as_strict(tokenizer):
    with pytest.raises(InputError, match="never seen"):
        copy.deepcopy(tokenizer)("[PAD] circle")


def test_the_peer_s_folder_loads(tmp_path):
    backend = Tokenizer.from_captions(CAPTIONS, 12).backend
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    peer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_max_length"):
        Tokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path, max_length=9)
    theirs = peer("a red star", padding="max_length", max_length=9, return_tensors="pt").input_ids
    assert torch.equal(ours("a red star"), theirs)


def test_a_vocabulary_file_of_an_older_bert_loads(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "star", "##s", ","])
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "model_max_length": 8})
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer("A Red, stars").tolist() == [[2, 4, 5, 8, 6, 7, 3, 0]]
    assert Tokenizer.from_pretrained(tmp_path, max_length=9).max_length == 8
    assert Tokenizer.from_pretrained(tmp_path, max_length=5).max_length == 5


def test_unreadable_folders_are_refused(tmp_path, tokenizer):
    with pytest.raises(CheckpointError, match="neither tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*; download or save it again"):
        Tokenizer.from_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for content, said in (
        ("[]", "holds a list, not a JSON object; download or save it again"),
        ("null", "holds a NoneType, not a JSON object"),
        ("", "it is empty; download or save it again"),
        ('{"model_max_length": "77"}', "model_max_length is '77'; use a number from 1"),
        ('{"model_max_length": 0}', "model_max_length is 0; use a number from 1"),
    ):
        config.write_text(content)
        with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json.* {said}"):
            Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="max_length=2"):
        Tokenizer.from_captions(CAPTIONS, max_length=2)
