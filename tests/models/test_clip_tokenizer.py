"""CLIP's tokenizer against transformers' CLIPTokenizer on a vocabulary and merges made here."""

from __future__ import annotations

import copy
import gzip
import json
import pickle

import pytest
import torch
from transformers import AutoTokenizer
from transformers import CLIPTokenizerFast as PeerTokenizer

from fastldm.errors import CheckpointError, InputError
from fastldm.models import CLIPTokenizer
from fastldm.models.clip_tokenizer import BOS, EOS
from fastldm.training.datasets.shapes import CaptionedShapes

MERGES = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("lo", "w"), ("n", "e"), ("ne", "w"), ("'", "s</w>")]
TEXTS = [
    "low",
    "Lower NEWER  lowest",
    "it's the lower's, isn't it?",
    "  spaces\tand\nlines  ",
    "12 new3 ones: 4.5%",
    "café naïve — “quoted” Ünïcode",
    "cafe\u0301 decomposed",
    "日本語 текст 🙂👍🏽",
    "#hash ##low !!! <b>tag</b>",
    "",
    "a" * 30,
    "ǅ İstanbul ß",
    "under_score snake_case",
]


def bytes_as_letters():
    """OpenAI's table of letters for bytes, after its published definition."""
    known = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    extra = [b for b in range(256) if b not in known]
    return [chr(b) for b in known] + [chr(256 + i) for i in range(len(extra))]


def vocabulary():
    letters = bytes_as_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in MERGES),
        BOS,
        EOS,
    ]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture
def peer(tmp_path_factory):
    """make(**options) -> transformers' tokenizer of the same vocabulary and merges."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES))
    return lambda **options: PeerTokenizer.from_pretrained(folder, **options)


def ids_of(theirs, texts, length):
    kwargs = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return theirs(texts, **kwargs).input_ids


@pytest.fixture
def ours():
    return CLIPTokenizer(vocabulary(), MERGES)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_ids_are_the_peer_s(peer, pad):
    ours = CLIPTokenizer(vocabulary(), MERGES, pad_token=pad)
    # transformers reads the padding where a text spells it, OpenAI's tokenizer and ours read letters.
    texts = [text for text in TEXTS if pad not in text]
    found = ours(texts)
    assert found.dtype == torch.int64
    assert torch.equal(found, ids_of(peer(pad_token=pad), texts, 77))
    assert found.shape == (len(texts), 77)
    assert found[0, :4].tolist() == [519, ours.vocab["low</w>"], 520, ours.vocab[pad]]


@pytest.mark.filterwarnings("ignore:the caption has")
@pytest.mark.parametrize("length", [3, 4, 8])
def test_long_texts_are_cut_as_the_peer_s(peer, length):
    ours = CLIPTokenizer(vocabulary(), MERGES, length)
    found = ours(TEXTS)
    assert torch.equal(found, ids_of(peer(), TEXTS, length))
    assert (found == ours.eos_token_id).any(dim=1).all()


def test_what_is_cut_off_is_said():
    with pytest.warns(UserWarning, match=r"has 5 tokens, the text window 2: 'new low' is cut off"):
        CLIPTokenizer(vocabulary(), MERGES, 4)("low low new low")


def test_random_texts_are_the_peer_s(peer, ours):
    letters = "lowernstLOW'\u2019 \t0123!?.,éßж漢🙂\u0301"
    generator = torch.Generator().manual_seed(3)
    texts = [
        "".join(letters[i] for i in torch.randint(len(letters), (12,), generator=generator).tolist())
        for _ in range(300)
    ]
    assert torch.equal(ours(texts), ids_of(peer(), texts, 77))


def test_spelt_special_tokens_are_letters(ours):
    """So that no caption can end itself early."""
    ids = ours(f"low {EOS} new")[0]
    end = ids.tolist().index(ours.eos_token_id)
    assert ids[end - 2 : end].tolist() == [ours.vocab["ne"], ours.vocab["w</w>"]]
    assert ours.decode(ids) == "low <| endoftext |> new"
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(f"low {EOS} new")[0], ids)


def test_folders_load_in_both_directions(peer, ours, tmp_path):
    short = CLIPTokenizer(vocabulary(), MERGES, 20, pad_token="!")
    texts = [text for text in TEXTS if len(text) < 16 and text.isascii()]
    wanted = short(texts)
    short.save_pretrained(tmp_path / "ours")
    for peer_class in (PeerTokenizer, AutoTokenizer):
        theirs = peer_class.from_pretrained(tmp_path / "ours")
        assert theirs.model_max_length == 20
        assert torch.equal(ids_of(theirs, texts, None), wanted)
    assert torch.equal(CLIPTokenizer.from_pretrained(tmp_path / "ours")(texts), wanted)

    peer(pad_token="!", model_max_length=20).save_pretrained(tmp_path / "theirs")
    assert torch.equal(CLIPTokenizer.from_pretrained(tmp_path / "theirs")(texts), wanted)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ours" / name).unlink()  # as the first versions of transformers wrote it
    old = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    assert old.max_length == 77
    assert torch.equal(old(TEXTS), ours(TEXTS))
    assert CLIPTokenizer.from_pretrained(tmp_path / "ours", max_length=9).max_length == 9


@pytest.mark.parametrize("packed", [False, True])
def test_openai_s_file_of_merges_gives_its_ids(peer, tmp_path, packed):
    text = "#version\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n"
    file = tmp_path / "bpe.txt"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    tokenizer = CLIPTokenizer.from_openai(file)
    assert tokenizer.vocab == vocabulary()
    assert tokenizer.pad_token_id == 0
    wanted = ids_of(peer(), TEXTS, 77)
    ends = (wanted == 520).cumsum(1)
    assert torch.equal(
        tokenizer(TEXTS), torch.where((ends == 0) | ((ends == 1) & (wanted == 520)), wanted, 0)
    )


def test_a_tokenizer_learns_from_captions():
    data = CaptionedShapes("train", length=200)
    captions = [data.draw(i)[1] for i in range(200)]
    tokenizer = CLIPTokenizer.from_captions(captions, 24, merges=300)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        tokenizer.vocab_size - 2,
        tokenizer.vocab_size - 1,
    )
    ids = tokenizer(captions)
    lengths = (ids == tokenizer.eos_token_id).int().argmax(dim=1) - 1
    assert lengths.tolist() == [len(caption.split()) for caption in captions]  # a token per word
    assert [tokenizer.decode(row) for row in ids] == captions
    assert tokenizer.decode(tokenizer("Qu'est-ce? 漢")[0]) == "qu ' est - ce ? 漢"
    few = CLIPTokenizer.from_captions(captions, merges=5)
    assert few.vocab_size == 512 + 5 + 2
    assert few.decode(few(captions[0])[0]) == captions[0]


def test_the_commonest_pair_is_merged_first_and_the_first_of_equals():
    tokenizer = CLIPTokenizer.from_captions(["ab ab abc", "xyxy"], merges=4)
    # the first occurs twice, of those that occur once the first by alphabet
    assert tokenizer.merges == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>"), ("x", "y")]
    everything = CLIPTokenizer.from_captions(["aaaa aa"])
    assert everything.merges == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]


def test_the_order_of_captions_does_not_matter():
    data = CaptionedShapes("train", length=100)
    captions = [data.draw(i)[1] for i in range(100)]
    one, other = (CLIPTokenizer.from_captions(c, merges=80) for c in (captions, captions[::-1]))
    assert one.vocab == other.vocab
    assert one.merges == other.merges


def test_a_learned_tokenizer_is_one_of_the_peer_s(tmp_path):
    tokenizer = CLIPTokenizer.from_captions(["a large red circle", "a small green square"] * 3, 30, merges=40)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a large green circle", "a SMALL blue star, isn't it"]
    assert torch.equal(ids_of(PeerTokenizer.from_pretrained(tmp_path), texts, None), tokenizer(texts))


def test_what_cannot_be_used_is_refused(ours, tmp_path):
    with pytest.raises(InputError, match=r"captions must be .* item 0 is 3, not text"):
        ours([3])
    with pytest.raises(InputError, match=r"captions must be .* not int"):
        ours(3)
    with pytest.raises(InputError, match="max_length=2"):
        CLIPTokenizer(vocabulary(), MERGES, 2)
    with pytest.raises(CheckpointError, match=r"no <\|startoftext\|>, <\|endoftext\|>"):
        CLIPTokenizer({"a": 0}, [])
    with pytest.raises(CheckpointError, match="do not fit the vocabulary"):
        CLIPTokenizer(vocabulary(), [("q", "xyz")])
    with pytest.raises(CheckpointError, match="holds neither"):
        CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        CLIPTokenizer.from_openai(tmp_path / "absent.txt")
    (tmp_path / "bpe.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(CheckpointError, match="two symbols, not 'a b c'"):
        CLIPTokenizer.from_openai(tmp_path / "bpe.txt")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel"}}))
    with pytest.raises(CheckpointError, match="no byte-pair encoding"):
        CLIPTokenizer.from_pretrained(tmp_path)
