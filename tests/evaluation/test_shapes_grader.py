"""The grader reads fresh renders right, and refuses pictures that do not show what the caption says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fastldm.errors import InputError
from fastldm.evaluation.shapes_grader import compare, grade, matches
from fastldm.training.datasets.shapes import (
    COLOURS,
    PALETTE,
    SHAPES,
    CaptionedShapes,
    Object,
    Scene,
    caption,
    parse_caption,
    render,
)

ONE = "a large red circle at the top left"
TWO = "a red circle left of a green square"


def blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    values = np.asarray(picture) + rng.normal(0, 8, (picture.height, picture.width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def unchanged(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def picture_of(text: str, seed: int = 0, size: int = 64) -> Image.Image:
    return render(parse_caption(text), seed, size)


def painted(picture: Image.Image, box: tuple[float, float, float, float], fill) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).rectangle(box, fill=fill)
    return picture


@pytest.mark.parametrize("degrade", [unchanged, blurred, noisy])
@pytest.mark.parametrize("kind", ["one", "two"])
@pytest.mark.parametrize("split", ["seen", "held-out"])
def test_reads_fresh_renders(degrade, kind, split):
    count = 100
    data = CaptionedShapes(split, kind, length=count, seed=11)
    wrong = []
    for index in range(count):
        scene, text, picture = data.draw(index)
        result = matches(text, degrade(picture, np.random.default_rng(index)))
        assert list(result) == (
            ["count", "colour", "shape", "size", "place", "all"]
            if kind == "one"
            else ["count", "colour", "shape", "relation", "all"]
        )
        if not result["all"]:
            wrong.append((scene, result))
    assert len(wrong) <= 0.01 * count, wrong[:3]


@pytest.mark.parametrize("size", [32, 96, 128])
def test_reads_other_picture_sizes(size):
    data = CaptionedShapes("seen", "mixed", size=size, length=40, seed=3)
    right = [matches(text, picture)["all"] for _, text, picture in map(data.draw, range(40))]
    # At 32 pixels the arms of a small star are two pixels long.
    assert sum(right) >= (38 if size >= 64 else 30)


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("colour", "a large blue circle at the top left"),
        ("shape", "a large red square at the top left"),
        ("size", "a small red circle at the top left"),
        ("place", "a large red circle at the top right"),
    ],
)
def test_one_wrong_attribute_is_found(attribute, other):
    result = matches(ONE, picture_of(other))
    assert result == {name: name not in (attribute, "all") for name in result}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_each_shape_is_told_from_each_other(shape, other, size):
    for seed in range(5):
        picture = picture_of(f"a {size} blue {shape} at the bottom right", seed)
        assert matches(f"a {size} blue {other} at the bottom right", picture)["shape"] == (shape == other)


@pytest.mark.parametrize("colour", COLOURS)
def test_each_colour_is_told_from_each_other(colour):
    for seed in range(5):
        picture = picture_of(f"a small {colour} star at the bottom right", seed)
        right = [name for name in COLOURS if matches(f"a small {name} star", picture)["colour"]]
        assert right == [colour]


@pytest.mark.parametrize(
    ("shown", "failing"),
    [
        ("a red circle right of a green square", {"relation"}),
        ("a green square left of a red circle", {"relation"}),
        ("a red circle above a green square", {"relation"}),
        ("a green circle left of a red square", {"colour", "shape", "relation"}),
        ("a red circle left of a blue square", {"colour"}),
        ("a red circle left of a green star", {"shape"}),
        ("a red star left of a green star", {"shape"}),
    ],
)
def test_two_objects_keep_their_own_attributes(shown, failing):
    result = matches(TWO, picture_of(shown))
    assert not result["all"]
    assert result["count"]
    wrong = {name for name, right in result.items() if not right} - {"all"}
    assert wrong
    assert wrong <= failing


def test_swapped_attributes_never_pass():
    """A red square and a green circle hold the right colours and shapes, bound wrongly."""
    for seed in range(5):
        for relation in ("left of", "right of", "above", "below"):
            picture = picture_of(f"a green circle {relation} a red square", seed)
            assert not matches(f"a red circle {relation} a green square", picture)["all"]


def test_relation_reads_both_ways():
    picture = picture_of("a red circle left of a green square")
    assert matches("a green square right of a red circle", picture)["all"]
    assert grade(picture).scene == parse_caption(TWO)


@pytest.mark.parametrize("text", [ONE, TWO])
@pytest.mark.parametrize("seed", range(3))
def test_wrong_number_of_objects_fails_everything(text, seed):
    other = {ONE: TWO, TWO: ONE}[text]
    assert not any(matches(text, picture_of(other, seed)).values())
    crowded = painted(picture_of(TWO, seed), (2, 2, 9, 9), PALETTE["blue"])
    assert not any(matches(TWO, crowded).values())


@pytest.mark.parametrize("text", [ONE, TWO])
def test_blank_and_noise_fail(text):
    rng = np.random.default_rng(0)
    blank = np.full((64, 64, 3), 240, np.uint8)
    for picture in (
        blank,
        np.zeros_like(blank),
        np.full_like(blank, (219, 50, 47)),
        rng.integers(0, 256, blank.shape, np.uint8),
        rng.normal(230, 60, blank.shape).clip(0, 255).astype(np.uint8),
    ):
        assert not any(matches(text, picture).values())
        assert grade(picture).reasons


def test_extra_blob_fails():
    clean = picture_of(ONE)
    assert matches(ONE, clean)["all"]
    for box, fill in [
        ((45, 45, 55, 55), PALETTE["blue"]),
        ((50, 50, 52, 52), PALETTE["red"]),
        ((44, 44, 56, 56), (170, 200, 200)),
    ]:
        assert not matches(ONE, painted(clean, box, fill))["all"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_half_objects_fail(shape, size):
    text = f"a {size} purple {shape} at the top left"
    picture = picture_of(text, 1)
    background = picture.getpixel((63, 63))
    mask = np.linalg.norm(np.asarray(picture, float) - background, axis=2) > 80
    rows, columns = np.nonzero(mask)
    x, y = columns.mean(), rows.mean()
    for box in ((0, 0, x, 63), (x, 0, 63, 63), (0, 0, 63, y), (0, y, 63, 63)):
        assert not matches(text, painted(picture, box, background))["all"]


@pytest.mark.parametrize("shape", SHAPES)
def test_smeared_objects_fail(shape):
    text = f"a small purple {shape} at the top left"
    picture = picture_of(text, 2)
    assert not matches(text, picture.filter(ImageFilter.GaussianBlur(4)))["all"]
    wide = picture.resize((128, 64), Image.Resampling.BILINEAR).crop((0, 0, 64, 64))
    assert not matches(text, wide)["shape"]
    assert not matches(text, picture.rotate(180))["all"]


def test_two_coloured_object_fails():
    picture = picture_of(ONE, 3)
    half = np.array(picture)
    red = np.linalg.norm(half.astype(float) - PALETTE["red"], axis=2) < 60
    rows = np.nonzero(red)[0]
    half[red & (np.arange(64)[:, None] > rows.mean())] = PALETTE["blue"]
    assert not matches(ONE, half)["colour"]


@pytest.mark.parametrize("fill", [(120, 120, 120), (0, 0, 0), (150, 110, 60), (245, 120, 180), (91, 75, 205)])
def test_unknown_colours_fail(fill):
    """Grey, black, brown, pink and a violet half way between blue and purple are no colour of the palette."""
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(picture).ellipse((5, 5, 29, 29), fill=fill)
    read = grade(picture)
    assert read.scene.objects[0].shape == "circle"
    assert read.scene.objects[0].colour is None
    assert len(read.reasons) == 1


@pytest.mark.parametrize(
    ("box", "field"), [((6, 20, 30, 44), "place"), ((20, 20, 44, 44), "place"), ((6, 6, 26, 26), "size")]
)
def test_between_two_values_is_unclear(box, field):
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(picture).ellipse(box, fill=PALETTE["red"])
    assert getattr(grade(picture).scene.objects[0], field) is None


def test_cut_off_and_diagonal():
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(picture).ellipse((-3, 5, 21, 29), fill=PALETTE["red"])
    assert "cut off" in grade(picture).reasons[0]
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(picture).ellipse((4, 4, 24, 24), fill=PALETTE["red"])
    ImageDraw.Draw(picture).ellipse((38, 38, 58, 58), fill=PALETTE["blue"])
    assert grade(picture).scene == Scene((Object("circle", "red"), Object("circle", "blue")))
    assert not matches("a red circle left of a blue circle", picture)["relation"]


def test_only_what_is_said_counts():
    picture = picture_of(ONE)
    assert matches("a circle", picture) == {"count": True, "shape": True, "all": True}
    assert matches("red circle top left", picture)["all"]
    assert matches("a circle above a square", picture_of("a red circle above a red square"))["all"]


def test_array_and_picture_agree():
    data = CaptionedShapes("seen", "mixed", length=10)
    for index in range(10):
        scene, text, picture = data.draw(index)
        read = grade(np.asarray(picture))
        assert read == grade(picture)
        assert compare(scene, read) == matches(text, picture)
        assert caption(read.scene) == text or caption(read.scene.reversed()) == text


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 64), np.uint8),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((64, 48, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(InputError, match="cannot grade"):
        grade(image)
