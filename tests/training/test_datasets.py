"""The built-in captioned shapes and folders of pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.errors import InputError
from fastldm.training.datasets import CaptionedShapes, ImageFolder, export_image_folder
from fastldm.training.datasets.shapes import (
    COLOURS,
    HELD_OUT_PAIRS,
    PAIRS,
    PALETTE,
    SEEN_PAIRS,
    SHAPES,
    Object,
    Scene,
    all_captions,
    all_scenes,
    caption,
    paraphrase,
    parse_caption,
    render,
    sample_scene,
    vocabulary,
)


def pairs_of(scene: Scene) -> set[tuple[str, str]]:
    return {(o.colour, o.shape) for o in scene.objects}


def test_items():
    data = CaptionedShapes(length=20, size=48)
    assert len(data) == 20
    for index in range(20):
        item = data[index]
        assert item["image"].shape == (3, 48, 48)
        assert item["image"].dtype == torch.float32
        assert item["image"].min() >= -1
        assert item["image"].max() <= 1
        scene, text, picture = data.draw(index)
        assert item["caption"] == text
        assert PAIRS[item["label"]] == (scene.objects[0].colour, scene.objects[0].shape)
        levels = ((item["image"] + 1) * 127.5).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(levels, np.asarray(picture), atol=1e-4)
    with pytest.raises(IndexError):
        data[20]


def test_item_is_a_function_of_seed_split_and_index():
    first, again = CaptionedShapes(seed=4), CaptionedShapes(seed=4, length=50)
    for index in (7, 3, 7, 49):
        a, b = first[index], again[index]
        assert torch.equal(a["image"], b["image"])
        assert (a["caption"], a["label"]) == (b["caption"], b["label"])
    streams = [
        CaptionedShapes("train", "one", seed=0),
        CaptionedShapes("train", "one", seed=1),
        CaptionedShapes("seen", "one", seed=0),
        CaptionedShapes("held-out", "one", seed=0),
    ]
    pictures = {np.asarray(data.draw(i)[2]).tobytes() for data in streams for i in range(50)}
    assert len(pictures) == 4 * 50


def test_at_least_a_tenth_of_the_pairs_is_held_out():
    assert len(HELD_OUT_PAIRS) >= 0.1 * len(PAIRS)
    assert len({colour for colour, _ in HELD_OUT_PAIRS}) == len({shape for _, shape in HELD_OUT_PAIRS}) == 3
    assert not set(HELD_OUT_PAIRS) & {("red", "circle"), ("blue", "star"), ("green", "square")}
    assert set(SEEN_PAIRS) | set(HELD_OUT_PAIRS) == set(PAIRS)


@pytest.mark.parametrize("kind", ["one", "two", "mixed"])
def test_splits_keep_the_pairs_apart(kind):
    rng = np.random.default_rng(0)
    splits = ("train", "seen", "held-out")
    scenes = {split: [sample_scene(rng, kind, split) for _ in range(600)] for split in splits}
    for split in ("train", "seen"):
        shown = set().union(*map(pairs_of, scenes[split]))
        assert shown == set(SEEN_PAIRS)
    assert all(pairs_of(scene) & set(HELD_OUT_PAIRS) for scene in scenes["held-out"])
    assert set().union(*map(pairs_of, scenes["held-out"])) >= set(HELD_OUT_PAIRS)
    counts = {len(scene.objects) for scene in scenes["train"]}
    assert counts == {"one": {1}, "two": {2}, "mixed": {1, 2}}[kind]


def test_all_captions_round_trip():
    scenes = all_scenes()
    assert len(all_scenes("one")) == 2 * 6 * 4 * 4
    assert len(all_scenes("two")) == 24 * 23 * 4
    assert len(set(all_captions())) == len(scenes)
    assert "a large red circle at the top left" in all_captions("one")
    assert "a red circle left of a green square" in all_captions("two")
    for scene in scenes:
        assert parse_caption(caption(scene)) == scene
        assert parse_caption(caption(scene.reversed())) == scene.reversed() if scene.relation else True


def test_paraphrases_never_contradict_the_scene():
    rng = np.random.default_rng(1)
    words, texts = set(), set()
    for _ in range(6000):
        scene = sample_scene(rng)
        text = paraphrase(scene, rng)
        said = parse_caption(text)
        assert len(said.objects) == len(scene.objects)
        assert said.relation == scene.relation
        for a, b in zip(said.objects, scene.objects):
            for name in ("shape", "colour", "size", "place"):
                assert getattr(a, name) in (None, getattr(b, name)), text
        words |= set(text.split())
        texts.add(text)
    assert words == set(vocabulary())
    assert len(texts) > 2000


def test_training_captions_are_mostly_canonical():
    data = CaptionedShapes("train", length=400)
    canonical = sum(data.draw(i)[1] == caption(data.draw(i)[0]) for i in range(400))
    assert 0.5 * 400 < canonical < 0.75 * 400
    evaluation = CaptionedShapes("seen", length=50)
    assert all(evaluation.draw(i)[1] == caption(evaluation.draw(i)[0]) for i in range(50))


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("red circle", Scene((Object("circle", "red"),))),
        ("Big blue star, bottom right!", Scene((Object("star", "blue", "large", "bottom right"),))),
        ("the tiny star in the upper-left corner", Scene((Object("star", None, "small", "top left"),))),
        ("at the lower left a yellow square", Scene((Object("square", "yellow", None, "bottom left"),))),
        ("a picture of a circle", Scene((Object("circle"),))),
        (
            "The red circle is to the left of the blue star.",
            Scene((Object("circle", "red"), Object("star", "blue")), "left of"),
        ),
        ("red circle under square", Scene((Object("circle", "red"), Object("square")), "below")),
    ],
)
def test_newcomers_captions(text, scene):
    assert parse_caption(text) == scene


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a pink dog", "unknown words: dog, pink"),
        ("", "order"),
        ("left of a circle", "order"),
        ("red", "order"),
        ("a red circle left of a blue star below a square", "order"),
        ("a large red circle left of a small blue star", "order"),
    ],
)
def test_other_captions_are_refused_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_caption(text)
    assert "\n" not in str(error.value)
    assert "a large red circle at the top left" in str(error.value)


def objects_in(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, float)
    return np.linalg.norm(pixels - np.median(pixels.reshape(-1, 3), axis=0), axis=2) > 40


@pytest.mark.parametrize("shape", SHAPES)
def test_one_object_lies_in_its_place_and_inside(shape):
    areas = {"small": [], "large": []}
    for scene in all_scenes("one"):
        thing = scene.objects[0]
        if thing.shape != shape:
            continue
        mask = objects_in(render(scene, len(areas[thing.size])))
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        y, x = (axis.mean() for axis in np.nonzero(mask))
        vertical, horizontal = thing.place.split()
        assert (y < 24) if vertical == "top" else (y > 40)
        assert (x < 24) if horizontal == "left" else (x > 40)
        areas[thing.size].append(mask.sum())
    assert min(areas["large"]) > 2 * max(areas["small"])


def test_two_objects_never_touch_and_stand_as_said():
    rng = np.random.default_rng(2)
    for _ in range(150):
        scene = sample_scene(rng, "two")
        mask = objects_in(render(scene, rng))
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()
        sideways = scene.relation in ("left of", "right of")
        profile = mask.any(axis=0 if sideways else 1)
        runs = np.flatnonzero(np.diff(profile.astype(int), prepend=0, append=0)).reshape(-1, 2)
        assert len(runs) == 2
        assert runs[1, 0] - runs[0, 1] >= 2


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_first_object_stands_where_the_relation_says(relation):
    pixels = np.asarray(render(Scene((Object("circle", "red"), Object("star", "blue")), relation), 0), float)
    red, blue = (
        np.argwhere(np.linalg.norm(pixels - PALETTE[name], axis=2) < 60).mean(axis=0)
        for name in ("red", "blue")
    )
    dy, dx = blue - red
    signed = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    assert signed > 25


def test_unsaid_attributes_are_drawn_and_said_ones_kept():
    colours = set()
    for seed in range(40):
        picture = render(parse_caption("a large square at the top left"), seed)
        fill = np.asarray(picture, float)[12:20, 12:20].mean(axis=(0, 1))
        colours.add(min(PALETTE, key=lambda name, fill=fill: np.linalg.norm(fill - PALETTE[name])))
    assert colours == set(COLOURS)
    scene = parse_caption("a small red star")
    assert np.array_equal(np.asarray(render(scene, 5)), np.asarray(render(scene, np.random.default_rng(5))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"kind": "three"}, "kind 'three'"),
        ({"size": 60}, "size 60"),
        ({"size": 16}, "size 16"),
        ({"length": 0}, "length"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        CaptionedShapes(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Object("hexagon"),
        lambda: Object("circle", "pink"),
        lambda: Scene(()),
        lambda: Scene((Object("circle"),), "above"),
        lambda: Scene((Object("circle"), Object("star")), "behind"),
        lambda: Scene((Object("circle", size="small"), Object("star"))),
    ],
)
def test_impossible_scenes(make):
    with pytest.raises(InputError):
        make()


def save(path, size=(40, 32), colour=(10, 200, 90), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def write_metadata(folder, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def test_export_and_read_back(tmp_path):
    data = CaptionedShapes(length=12, seed=9)
    export_image_folder(data, tmp_path / "shapes")
    back = ImageFolder(tmp_path / "shapes", 64)
    assert len(back) == 12
    for index in range(12):
        assert back[index]["caption"] == data[index]["caption"]
        assert torch.equal(back[index]["image"], data[index]["image"])
    with pytest.raises(InputError, match="not empty"):
        export_image_folder(data, tmp_path / "shapes")
    assert not list(tmp_path.glob(".*"))


def test_failed_export_leaves_nothing(tmp_path):
    class Broken(CaptionedShapes):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("No space left on device")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="No space"):
        export_image_folder(Broken(length=5), tmp_path / "shapes")
    assert not list(tmp_path.iterdir())


def test_captions_in_metadata_order(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "more" / "a.jpg")
    write_metadata(
        tmp_path,
        {"file_name": "more/a.jpg", "text": "größer", "title": "A"},
        "",
        {"file_name": "b.png", "text": "second", "title": "B"},
    )
    data = ImageFolder(tmp_path, 32)
    assert [data[i]["caption"] for i in range(2)] == ["größer", "second"]
    assert set(data[0]) == {"image", "caption"}
    assert [ImageFolder(tmp_path, 32, caption_column="title")[i]["caption"] for i in range(2)] == ["A", "B"]


def test_classes_and_plain_pictures(tmp_path):
    for name in ("cat/1.png", "cat/deep/2.png", "ant/3.PNG"):
        save(tmp_path / "classes" / name)
    (tmp_path / "classes" / "cat" / "notes.txt").write_text("not a picture")
    data = ImageFolder(tmp_path / "classes", 32)
    assert data.classes == ["ant", "cat"]
    assert [data[i]["label"] for i in range(3)] == [0, 1, 1]
    save(tmp_path / "plain" / "1.png")
    plain = ImageFolder(tmp_path / "plain", 32)
    assert set(plain[0]) == {"image"}
    assert plain.classes == []


def test_scaling_and_centre_crop(tmp_path):
    """A picture in three vertical bands, twice as wide as high: only the middle remains, at half the size."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:96], pixels[:, 96:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "bands.png")
    image = ImageFolder(tmp_path, 32)[0]["image"]
    assert image.shape == (3, 32, 32)
    expected = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 32, 28)
    assert torch.equal(image[:, :, 2:30], expected)


def test_random_flip_adds_every_picture_mirrored(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{name}.png")
    plain, flipped = ImageFolder(tmp_path, 32), ImageFolder(tmp_path, 32, random_flip=True)
    assert len(flipped) == 4
    for i in range(2):
        assert torch.equal(flipped[i]["image"], plain[i]["image"])
        assert torch.equal(flipped[2 + i]["image"], plain[i]["image"].flip(-1))


def test_modes_and_orientation(tmp_path):
    save(tmp_path / "1.png", mode="L", colour=51)
    save(tmp_path / "2.png", mode="RGBA", colour=(0, 0, 0, 0))
    rotated = Image.new("RGB", (32, 32), (255, 0, 0))
    rotated.paste((0, 0, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3
    rotated.save(tmp_path / "3.png", exif=exif)
    grey, clear, turned = (ImageFolder(tmp_path, 32)[i]["image"] for i in range(3))
    assert torch.allclose(grey, torch.tensor(51 / 127.5 - 1))
    assert torch.equal(clear, torch.ones(3, 32, 32))
    assert turned[0, 4, 4] == 1
    assert turned[2, 4, 4] == -1


def refused(folder) -> str:
    def read_all():
        data = ImageFolder(folder, 32)
        return [data[index] for index in range(len(data))]

    with pytest.raises(InputError) as error:
        read_all()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_empty_folders(tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "list.txt").write_text("")
    assert "list.txt is a file; give the folder" in refused(tmp_path / "list.txt")
    assert "has no pictures" in refused(tmp_path)
    write_metadata(tmp_path)
    assert "metadata.jsonl is empty" in refused(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    assert "metadata.csv is not read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "b.png", "text": "x"}, "line 2 names b.png, which does not exist"),
        ({"file_name": "a.png"}, "line 2 has no caption 'text' for a.png (other keys: none)"),
        ({"file_name": "a.png", "text": None}, "line 2 has no caption 'text' for a.png (other keys: none)"),
        ({"file_name": "a.png", "text": 7}, "line 2: the caption 'text' of a.png is 7, which is not text"),
        ({"file_name": "a.png", "text": ["x"]}, """'text' of a.png is ["x"], which is not text"""),
        ({"file_name": "a.png", "caption": "x"}, "(other keys: caption)"),
        ({"text": "x"}, "line 2 does not name a picture"),
        ('["a.png", "x"]', "line 2 does not name a picture"),
        ('{"file_name": "a.png", "text": "x"', "line 2 is not JSON"),
    ],
)
def test_bad_metadata_lines(tmp_path, row, message):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "x"}, row)
    assert message in refused(tmp_path)


def test_metadata_that_is_not_text(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    assert "not UTF-8" in refused(tmp_path)


def test_picture_without_a_line(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "x"})
    assert "b.png has no line in" in refused(tmp_path)


def test_bad_pictures(tmp_path):
    save(tmp_path / "a" / "small.png", (40, 30))
    save(tmp_path / "a" / "smaller.png", (24, 40))
    save(tmp_path / "a" / "whole.png", (40, 40))
    said = refused(tmp_path / "a")
    assert "small.png is 30 pixels on its shorter side; the training size is 32 (2 of 3 pictures" in said
    assert "set data.size to at most 24" in said
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "text.png").write_text("not a picture")
    assert "text.png cannot be read" in refused(tmp_path / "b")
    save(tmp_path / "c" / "deep.png", mode="I;16", colour=40000)
    assert "deep.png has pixels of type I;16" in refused(tmp_path / "c")
    save(tmp_path / "d" / "loose.png")
    save(tmp_path / "d" / "class" / "x.png")
    assert "loose.png lies beside the class folder class" in refused(tmp_path / "d")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "e").mkdir()
    Image.fromarray(noise).save(tmp_path / "e" / "cut.jpg")
    whole = (tmp_path / "e" / "cut.jpg").read_bytes()
    (tmp_path / "e" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    said = refused(tmp_path / "e")
    assert "cut.jpg cannot be read" in said
    assert "replace it (a run can then be resumed), or remove it, and its line" in said
