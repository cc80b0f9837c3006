"""Captioned shapes: a procedural text-to-image dataset that needs no download.

A picture shows one or two flat shapes on a light background, drawn with 4x supersampling. Position, size,
shade and background vary from picture to picture, always within the attribute that the caption names. Lengths
below are for 64x64 pictures and scale with the picture.

One object: a size (radius about 7.5 or 12.5), a colour, a shape and a corner of the picture.
Two objects: the same medium size (radius about 10), a colour and a shape each, and a relation between them;
the offset along the relation's axis is at least 28, along the other axis at most 4.

Grammar of the captions, words in brackets may be left out and then that attribute is free:

    caption  = ["a picture of"] (one | two)
    one      = object [place] | place object
    two      = plain ["is"] relation plain
    object   = ["a" | "the"] [size] [colour] shape
    plain    = ["a" | "the"] [colour] shape
    size     = "small" | "little" | "tiny" | "large" | "big"
    colour   = "red" | "green" | "blue" | "yellow" | "purple" | "cyan"
    shape    = "circle" | "square" | "triangle" | "star"
    place    = ["at" | "in" | "on"] ["the"] vertical ("left" | "right") ["corner"]
    vertical = "top" | "upper" | "bottom" | "lower"
    relation = sideways | "above" | "over" | "below" | "under" | "beneath"
    sideways = ["to the" | "on the"] ("left" | "right") "of"

Canonical captions are "a large red circle at the top left" and "a red circle left of a green square".
`HELD_OUT_PAIRS` never appear in the training split, so that a model can be tested on combinations it has not
seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastldm.errors import InputError

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
ATTRIBUTES = ("colour", "shape", "size", "place", "relation")

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT_PAIRS = (("purple", "circle"), ("cyan", "square"), ("yellow", "triangle"))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

PALETTE = {
    "red": (219, 50, 47),
    "green": (52, 158, 70),
    "blue": (40, 96, 214),
    "yellow": (242, 197, 36),
    "purple": (142, 62, 186),
    "cyan": (44, 190, 212),
}

# Outer radius of each shape for a nominal radius of 1: about equal areas look about equally large.
SQUARE_HALF_SIDE = 0.9
OUTER_RADIUS = {"circle": 1.0, "square": SQUARE_HALF_SIDE * math.sqrt(2), "triangle": 1.22, "star": 1.22}
STAR_INNER_RADIUS = 0.46

RADIUS = {"small": (7.0, 8.0), "large": (12.0, 13.0), None: (9.5, 10.5)}
_PICTURE = 64
_SUPERSAMPLING = 4
_MARGIN = 1.0
_CORNER, _CORNER_JITTER = 16.5, 2.0
_PAIR_OFFSET, _PAIR_JITTER = 15.25, 1.0
_PAIR_SHIFT, _PAIR_TILT = 6.0, 2.0

CANONICAL_SHARE = 0.6
TWO_OBJECT_SHARE = 0.6
_SPLITS = ("train", "seen", "held-out")
_KINDS = ("one", "two", "mixed")

_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_VERTICAL_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_PLACE_OPENINGS = ("at the", "in the", "on the", "")
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}

Split = Literal["train", "seen", "held-out"]
Kind = Literal["one", "two", "mixed"]


@dataclass(frozen=True)
class Object:
    """One shape of a picture. None means unsaid; only the object of a one-object scene has size and place."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"unknown {name} {value!r}; known are {', '.join(known)}")


@dataclass(frozen=True)
class Scene:
    """One object, or two objects of which the first stands in `relation` to the second (None: unsaid)."""

    objects: tuple[Object, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise InputError(f"a scene has 1 or 2 objects, not {len(self.objects)}")
        if self.relation is not None and self.relation not in RELATIONS:
            raise InputError(f"unknown relation {self.relation!r}; known are {', '.join(RELATIONS)}")
        if self.relation is not None and len(self.objects) == 1:
            raise InputError("a scene with one object has no relation")
        if len(self.objects) == 2 and any(o.size or o.place for o in self.objects):
            raise InputError("the objects of a two-object scene have no size and no place")

    def only(self, attributes: Collection[str]) -> Scene:
        """The same scene, of which only some of `ATTRIBUTES` are said."""
        said = [name for name in ATTRIBUTES if name in attributes and name != "relation"]
        objects = tuple(Object(**{name: getattr(o, name) for name in said}) for o in self.objects)
        return Scene(objects, self.relation if "relation" in attributes else None)

    def reversed(self) -> Scene:
        """The same picture, named from the other object: "a left of b" becomes "b right of a"."""
        return Scene(self.objects[::-1], _INVERSE.get(self.relation))


def caption(scene: Scene) -> str:
    """The canonical caption, without the attributes that are None."""
    nouns = [" ".join(["a", *filter(None, (o.size, o.colour)), o.shape or "shape"]) for o in scene.objects]
    if len(nouns) == 2:
        return f"{nouns[0]} {scene.relation or 'and'} {nouns[1]}"
    place = scene.objects[0].place
    return f"{nouns[0]} at the {place}" if place else nouns[0]


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is true of `scene`: other words for its attributes, and some attributes left unsaid."""

    def article() -> str:
        return _choose(rng, ("a", "a", "the", ""))

    keep_colour = rng.random() < 0.93
    if len(scene.objects) == 2:
        first, second = (_join(article(), o.colour if keep_colour else "", o.shape) for o in scene.objects)
        link = _join("is" if rng.random() < 0.15 else "", _choose(rng, _RELATION_PHRASES[scene.relation]))
        text = _join(first, link, second)
    else:
        thing = scene.objects[0]
        size = _choose(rng, _SIZE_WORDS[thing.size]) if rng.random() < 0.7 else ""
        text = _join(article(), size, thing.colour if keep_colour else "", thing.shape)
        if rng.random() < 0.75:
            vertical, horizontal = thing.place.split()
            corner = "corner" if rng.random() < 0.35 else ""
            words = (_choose(rng, _VERTICAL_WORDS[vertical]), horizontal, corner)
            place = _join(_choose(rng, _PLACE_OPENINGS), *words)
            if rng.random() < 0.2:
                return _join(place, text)
            text = _join(text, place)
    return _join("a picture of" if rng.random() < 0.06 else "", text)


def vocabulary() -> list[str]:
    """Every word that a caption of the grammar can contain, sorted."""
    phrases = ["a picture of", "the", "is", "corner", *COLOURS, *SHAPES, *PLACES, *_PLACE_OPENINGS]
    for words in (_SIZE_WORDS, _VERTICAL_WORDS, _RELATION_PHRASES):
        phrases += [phrase for group in words.values() for phrase in group]
    return sorted({word for phrase in phrases for word in phrase.split()})


def all_scenes(kind: Kind = "mixed") -> list[Scene]:
    """Every fully specified scene, held-out pairs included: 192 with one object, 2208 with two."""
    _check("kind", kind, _KINDS)
    scenes = []
    if kind != "two":
        scenes += [
            Scene((Object(shape, colour, size, place),))
            for size in SIZES
            for colour, shape in PAIRS
            for place in PLACES
        ]
    if kind != "one":
        scenes += [
            Scene((Object(a[1], a[0]), Object(b[1], b[0])), relation)
            for a in PAIRS
            for b in PAIRS
            if a != b
            for relation in RELATIONS
        ]
    return scenes


def all_captions(kind: Kind = "mixed") -> list[str]:
    """The canonical captions of `all_scenes(kind)`."""
    return [caption(scene) for scene in all_scenes(kind)]


def parse_caption(text: str) -> Scene:
    """The scene that a caption of the grammar names; what it leaves unsaid is None.

    Case and punctuation do not matter ("Top-left!" reads as "top left").

    Raises:
        InputError: the caption is not of the grammar; names the words that are unknown, if any.
    """
    words = re.findall(r"[^\W_]+", text.lower())
    match = _CAPTION.fullmatch(" ".join(words))
    if match is None:
        unknown = sorted(set(words) - set(vocabulary()))
        what = f"unknown words: {', '.join(unknown)}" if unknown else "the words are known, the order is not"
        raise InputError(
            f'caption "{text}" is not understood ({what}); '
            'write it like "a large red circle at the top left" or "a red circle left of a green square"'
        )
    said = match.groupdict()
    if said["phrase"]:
        first, second = (Object(said[f"shape{i}"], said[f"colour{i}"]) for i in (1, 2))
        relation = next(r for r, phrases in _RELATION_PHRASES.items() if said["phrase"] in phrases)
        return Scene((first, second), relation)
    pick = {name: said[f"{name}3"] or said[f"{name}4"] for name in ("shape", "colour", "size", "up", "side")}
    size = next((s for s, words in _SIZE_WORDS.items() if pick["size"] in words), None)
    vertical = next((v for v, words in _VERTICAL_WORDS.items() if pick["up"] in words), None)
    place = f"{vertical} {pick['side']}" if vertical else None
    return Scene((Object(pick["shape"], pick["colour"], size, place),))


def sample_scene(rng: np.random.Generator, kind: Kind = "mixed", split: Split = "train") -> Scene:
    """A random, fully specified scene.

    "train" and "seen" use seen colour-shape pairs only; each "held-out" scene has at least one held-out pair.
    """
    if kind == "mixed":
        kind = "two" if rng.random() < TWO_OBJECT_SHARE else "one"
    first = _choose(rng, HELD_OUT_PAIRS if split == "held-out" else SEEN_PAIRS)
    if kind == "one":
        return Scene((Object(first[1], first[0], _choose(rng, SIZES), _choose(rng, PLACES)),))
    others = [pair for pair in (PAIRS if split == "held-out" else SEEN_PAIRS) if pair != first]
    scene = Scene((Object(first[1], first[0]), Object(*_choose(rng, others)[::-1])), _choose(rng, RELATIONS))
    return scene.reversed() if rng.random() < 0.5 else scene


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with every unsaid attribute drawn at random."""
    while True:
        objects = []
        for o in scene.objects:
            colour, shape = o.colour or _choose(rng, COLOURS), o.shape or _choose(rng, SHAPES)
            if len(scene.objects) == 2:
                objects.append(Object(shape, colour))
            else:
                size, place = o.size or _choose(rng, SIZES), o.place or _choose(rng, PLACES)
                objects.append(Object(shape, colour, size, place))
        said = all(o.colour and o.shape for o in scene.objects)
        if said or len(set(objects)) == len(objects):
            relation = _choose(rng, RELATIONS) if len(objects) == 2 else None
            return Scene(tuple(objects), scene.relation or relation)


def render(scene: Scene, rng: np.random.Generator | int, size: int = 64) -> Image.Image:
    """Draws `scene` as an RGB picture of `size` x `size`; unsaid attributes and all jitter come from `rng`.

    Args:
        rng: a NumPy generator, or an integer seed for one.
        size: side of the picture, a multiple of 8, at least 32.
    """
    if size < 32 or size % 8:
        raise InputError(f"picture size {size} cannot be drawn; give a multiple of 8 that is at least 32")
    rng = np.random.default_rng(rng) if isinstance(rng, int) else rng
    scene = complete(scene, rng)
    grey = rng.uniform(228, 248)
    background = tuple(round(float(c)) for c in grey + rng.uniform(-3, 3, 3))
    canvas = Image.new("RGB", (size * _SUPERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(canvas)
    scale = size * _SUPERSAMPLING / _PICTURE
    for thing, (x, y, radius) in zip(scene.objects, _layout(scene, rng)):
        shade = rng.uniform(0.9, 1.06)
        tint = rng.uniform(-5, 5, 3)
        fill = np.clip(np.array(PALETTE[thing.colour]) * shade + tint, 0, 255).round().astype(int)
        if thing.shape == "circle":
            box = np.array((x - radius, y - radius, x + radius, y + radius)) * scale - 0.5
            draw.ellipse(box.tolist(), fill=tuple(fill.tolist()))
        else:
            # Pillow addresses pixel centres, the layout measures from the picture's edge.
            corners = outline(thing.shape) * radius + (x, y)
            draw.polygon([tuple(p) for p in (corners * scale - 0.5).tolist()], fill=tuple(fill.tolist()))
    return canvas.reduce(_SUPERSAMPLING)


def outline(shape: str) -> np.ndarray:
    """Corners (N, 2), x right and y down, of a polygonal shape of nominal radius 1 with its centroid at 0."""
    if shape == "square":
        return SQUARE_HALF_SIDE * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    steps = {"triangle": 3, "star": 10}[shape]
    angles = 2 * np.pi * np.arange(steps) / steps - np.pi / 2
    radii = np.full(steps, OUTER_RADIUS[shape])
    if shape == "star":
        radii[1::2] *= STAR_INNER_RADIUS
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


class CaptionedShapes(torch.utils.data.Dataset):
    """Captioned shapes as a map-style dataset; item `index` is a pure function of (split, kind, seed, index).

    Args:
        split: "train" (seen pairs, canonical captions and paraphrases), "seen" (seen pairs, canonical
            captions, a random stream apart from training) or "held-out" (every picture shows a held-out pair,
            canonical captions).
        kind: "one" object, "two" objects with a relation, or "mixed".
        size: side of the pictures in pixels, a multiple of 8.
        length: number of items; they are drawn on demand, so it may be as large as one likes.
        seed: another seed gives other pictures.
        attributes: the `ATTRIBUTES` that captions say, canonically; None = all of them, and in the training
            split also paraphrases.

    Items are {"image": float32 (3, size, size) in [-1, 1], "caption": str, "label": int}; the label is
    the index in `PAIRS` of the (first) object's colour and shape.
    """

    def __init__(
        self,
        split: Split = "train",
        kind: Kind = "mixed",
        size: int = 64,
        length: int = 100_000,
        seed: int = 0,
        attributes: Collection[str] | None = None,
    ) -> None:
        _check("split", split, _SPLITS)
        _check("kind", kind, _KINDS)
        for name in attributes or ():
            _check("attribute", name, ATTRIBUTES)
        if attributes is not None and "shape" not in attributes:
            raise InputError(f"attributes {list(attributes)}: captions always name the shape; add it")
        if size < 32 or size % 8:
            raise InputError(f"picture size {size} cannot be drawn; give a multiple of 8 that is at least 32")
        if length < 1 or seed < 0:
            raise InputError(f"length must be at least 1 and seed at least 0, not {length} and {seed}")
        self.split, self.kind, self.size, self.length, self.seed = split, kind, size, length, seed
        self.attributes = ATTRIBUTES if attributes is None else tuple(attributes)
        self.paraphrases = split == "train" and attributes is None

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> tuple[Scene, str, Image.Image]:
        """The scene, the caption and the picture of item `index`."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside a dataset of {self.length} items")
        rng = np.random.default_rng((self.seed, _SPLITS.index(self.split), int(index)))
        scene = sample_scene(rng, self.kind, self.split)
        plain = not self.paraphrases or rng.random() < CANONICAL_SHARE
        text = caption(scene.only(self.attributes)) if plain else paraphrase(scene, rng)
        return scene, text, render(scene, rng, self.size)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str | int]:
        scene, text, picture = self.draw(index)
        pixels = np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1
        label = PAIRS.index((scene.objects[0].colour, scene.objects[0].shape))
        return {"image": torch.from_numpy(np.ascontiguousarray(pixels)), "caption": text, "label": label}


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and nominal radius of each object, in 64ths of the picture."""
    if len(scene.objects) == 1:
        thing = scene.objects[0]
        radius = rng.uniform(*RADIUS[thing.size])
        nearest = OUTER_RADIUS[thing.shape] * radius + _MARGIN
        x, y = (max(nearest, _CORNER + rng.uniform(-_CORNER_JITTER, _CORNER_JITTER)) for _ in range(2))
        vertical, horizontal = thing.place.split()
        x = _PICTURE - x if horizontal == "right" else x
        y = _PICTURE - y if vertical == "bottom" else y
        return [(x, y, radius)]
    along = [side * (_PAIR_OFFSET + rng.uniform(-_PAIR_JITTER, _PAIR_JITTER)) for side in (-1, 1)]
    shift = rng.uniform(-_PAIR_SHIFT, _PAIR_SHIFT)
    across = [shift + rng.uniform(-_PAIR_TILT, _PAIR_TILT) for _ in range(2)]
    if scene.relation in ("right of", "below"):
        along = along[::-1]
    places = zip(along, across) if scene.relation in ("left of", "right of") else zip(across, along)
    return [(_PICTURE / 2 + x, _PICTURE / 2 + y, rng.uniform(*RADIUS[None])) for x, y in places]


def _caption_pattern() -> re.Pattern[str]:
    def any_of(words) -> str:
        return "|".join(sorted(words, key=len, reverse=True))

    sizes = any_of(word for words in _SIZE_WORDS.values() for word in words)
    ups = any_of(word for words in _VERTICAL_WORDS.values() for word in words)
    phrases = any_of(phrase for group in _RELATION_PHRASES.values() for phrase in group)
    colours, shapes = any_of(COLOURS), any_of(SHAPES)

    def thing(i: int, sized: bool) -> str:
        size = f"(?:(?P<size{i}>{sizes}) )?" if sized else ""
        return f"(?:(?:a|the) )?{size}(?:(?P<colour{i}>{colours}) )?(?P<shape{i}>{shapes})"

    def place(i: int) -> str:
        return f"(?:(?:at|in|on) )?(?:the )?(?P<up{i}>{ups}) (?P<side{i}>left|right)(?: corner)?"

    two = f"{thing(1, False)} (?:is )?(?P<phrase>{phrases}) {thing(2, False)}"
    one = f"{thing(3, True)}(?: {place(3)})?|{place(4)} {thing(4, True)}"
    return re.compile(f"(?:a picture of )?(?:{two}|{one})")


_CAPTION = _caption_pattern()


def _choose(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _join(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} {value!r} is not known; give one of {', '.join(known)}")
