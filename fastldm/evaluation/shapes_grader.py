"""Reads captioned-shapes pictures back into scenes, without any learned weights.

Every object is cut out from the light background, its colour is compared with the palette and its soft mask
with analytic templates of the four shapes over small shifts and scales. A reading counts only when it is
clear: an object that fits no template, a colour between two names, a stray blob, an object cut off by the
border or a centre between two places is reported as a reason and never guessed. Lengths below are for 64x64
pictures and scale with the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastldm.errors import InputError
from fastldm.training.datasets.shapes import (
    OUTER_RADIUS,
    PALETTE,
    SHAPES,
    SQUARE_HALF_SIDE,
    STAR_INNER_RADIUS,
    Object,
    Scene,
    parse_caption,
)

# Distances in RGB (0..255) from the background. Objects of the palette lie at 170 or more.
_OBJECT_CONTRAST = 80.0
_STRAY_CONTRAST = 45.0
_STRAY_PIXELS = 6
_SMALLEST_OBJECT = 12
_LIGHTEST, _MOST_TINTED, _MOST_UNEVEN = 212.0, 24.0, 16.0

# With brightness divided out, a rendered colour lies within 9 of its own name and at 64 or more from others.
_SHADES = (0.82, 1.14)
_COLOUR_BOUND, _COLOUR_MARGIN = 40.0, 25.0
_RESIDUAL_BOUND, _RESIDUAL_SHARE = 55.0, 0.1

_FIT_BOUND, _FIT_MARGIN = 0.86, 0.02
_STEEPNESS = 2.0
_SIZE_BANDS = {"small": (5.5, 9.2), "large": (10.8, 15.0)}
_PLACE_CLEARANCE = 6.0
_RELATION_OFFSET, _RELATION_TILT = 16.0, 0.5


@dataclass(frozen=True)
class Grade:
    """What a picture shows. An attribute that is not clear is None, and `reasons` says why.

    `scene` is None when the picture does not show one or two objects on a clean background. The two objects
    of a scene are named from the left, or from the top: its relation is "left of", "above" or None.
    """

    scene: Scene | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Reading:
    shape: str | None
    colour: str | None
    radius: float
    x: float
    y: float
    reasons: tuple[str, ...]


def grade(image: Image.Image | np.ndarray) -> Grade:
    """Reads the scene of a square RGB picture, a PIL image or a uint8 array (H, H, 3) with H >= 32.

    Raises:
        InputError: the picture has another shape or dtype.
    """
    pixels = _pixels(image)
    scale = len(pixels) / 64
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    if background.min() < _LIGHTEST or np.ptp(background) > _MOST_TINTED:
        return Grade(None, ("the background is not light and neutral",))
    contrast = np.linalg.norm(pixels - background, axis=2)
    labels, areas = _components(contrast > _OBJECT_CONTRAST)
    found = [i for i, area in enumerate(areas, 1) if area >= _SMALLEST_OBJECT * scale**2]
    around = _dilate(np.isin(labels, found), round(3 * scale))
    if not found:
        return Grade(None, ("there is no object",))
    if len(found) > 2:
        return Grade(None, (f"there are {len(found)} objects",))
    rest = contrast[~around]
    if (rest > _STRAY_CONTRAST).sum() >= _STRAY_PIXELS * scale**2:
        return Grade(None, ("there are stray marks beside the objects",))
    if rest.size == 0 or rest.mean() > _MOST_UNEVEN:
        return Grade(None, ("the background is not even",))
    readings = []
    for label in found:
        others = _dilate(np.isin(labels, [i for i in found if i != label]), 1)
        readings.append(_read_object(pixels, background, labels == label, others, scale))
    return _to_scene(readings)


def matches(wanted: Scene | str, image: Image.Image | np.ndarray) -> dict[str, bool]:
    """Whether a picture shows what a scene or a caption says, attribute by attribute.

    The keys are "count" and those of "colour", "shape", "size", "place" and "relation" that `wanted` says,
    then "all". With two objects, each must have its own colour and its own shape, and "relation" asks that
    the object named first stands so to the one named second.
    """
    wanted = parse_caption(wanted) if isinstance(wanted, str) else wanted
    return compare(wanted, grade(image))


def compare(wanted: Scene, read: Grade) -> dict[str, bool]:
    """`matches` for a picture that has been graded already."""
    said = {
        name: tuple(getattr(o, name) for o in wanted.objects) for name in ("colour", "shape", "size", "place")
    }
    said = {name: values for name, values in said.items() if any(values)}
    names = ["count", *said, *(["relation"] if wanted.relation else [])]
    if read.scene is None or len(read.scene.objects) != len(wanted.objects):
        return dict.fromkeys([*names, "all"], False)
    results = []
    for shown in (read.scene, read.scene.reversed())[: len(wanted.objects)]:
        result = {"count": True}
        for name, values in said.items():
            pairs = zip(values, (getattr(o, name) for o in shown.objects))
            result[name] = all(value is None or value == other for value, other in pairs)
        if wanted.relation:
            result["relation"] = shown.relation == wanted.relation
        results.append({**result, "all": all(result.values())})
    # Which of the two objects was meant first: all right if possible, else the order that gets the objects
    # right.
    return max(
        results, key=lambda r: (r["all"], r.get("colour", True) + r.get("shape", True), sum(r.values()))
    )


def _read_object(
    pixels: np.ndarray, background: np.ndarray, inside: np.ndarray, others: np.ndarray, scale: float
) -> _Reading:
    reasons = []
    contrast = np.linalg.norm(pixels - background, axis=2)
    core = inside & (contrast >= 0.7 * np.percentile(contrast[inside], 90))
    fill = np.median(pixels[core], axis=0)
    colour = _nearest_colour(fill)
    if colour is None:
        reasons.append(f"the colour {tuple(int(c) for c in fill)} is between the names")

    rows, columns = np.nonzero(_dilate(inside, round(3 * scale)))
    window = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    axis = fill - background
    offset = np.where(others[window][..., None], 0.0, pixels[window] - background)
    mask = np.clip(offset @ axis / (axis @ axis), 0, 1)
    residual = np.linalg.norm(offset - mask[..., None] * axis, axis=2)
    if (residual > _RESIDUAL_BOUND).sum() > _RESIDUAL_SHARE * inside.sum():
        reasons.append("the colour is not the same all over the object")
        colour = None

    fits = _fit_shapes(mask)
    shape, runner_up = sorted(fits, key=lambda name: fits[name][0], reverse=True)[:2]
    (overlap, radius), margin = fits[shape], fits[shape][0] - fits[runner_up][0]
    frame = np.ones_like(inside)
    frame[1:-1, 1:-1] = False
    if (inside & frame & (contrast > np.linalg.norm(axis) / 2)).sum() > scale:
        reasons.append(f"the {shape} is cut off by the border")
        shape = None
    elif overlap < _FIT_BOUND:
        reasons.append(f"an object is no clear shape (best is {shape} with an overlap of {overlap:.2f})")
        shape = None
    elif margin < _FIT_MARGIN:
        reasons.append(f"an object is as much a {shape} as a {runner_up}")
        shape = None
    x, y = _centroid(mask)
    x, y = x + columns.min(), y + rows.min()
    return _Reading(shape, colour, radius / scale, x / scale, y / scale, tuple(reasons))


def _to_scene(readings: list[_Reading]) -> Grade:
    reasons = [reason for reading in readings for reason in reading.reasons]
    if len(readings) == 1:
        only = readings[0]
        size = next((s for s, (low, high) in _SIZE_BANDS.items() if low <= only.radius <= high), None)
        if size is None:
            reasons.append(f"a radius of {only.radius:.1f} is neither small nor large")
        place = None
        if min(abs(only.x - 32), abs(only.y - 32)) >= _PLACE_CLEARANCE:
            place = f"{'top' if only.y < 32 else 'bottom'} {'left' if only.x < 32 else 'right'}"
        else:
            reasons.append(f"the centre ({only.x:.0f}, {only.y:.0f}) is between two places")
        return Grade(Scene((Object(only.shape, only.colour, size, place),)), tuple(reasons))
    dx, dy = readings[1].x - readings[0].x, readings[1].y - readings[0].y
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    sideways = abs(dx) > abs(dy)
    if (dx if sideways else dy) < 0:
        readings = readings[::-1]
    relation = None
    if along >= _RELATION_OFFSET and across <= _RELATION_TILT * along:
        relation = "left of" if sideways else "above"
    else:
        reasons.append(f"an offset of ({dx:.0f}, {dy:.0f}) is no clear relation")
    return Grade(Scene(tuple(Object(r.shape, r.colour) for r in readings), relation), tuple(reasons))


def _nearest_colour(rgb: np.ndarray) -> str | None:
    distances = {}
    for name, palette in PALETTE.items():
        reference = np.array(palette, np.float64)
        shade = np.clip(rgb @ reference / (reference @ reference), *_SHADES)
        distances[name] = np.linalg.norm(rgb - shade * reference)
    first, second = sorted(distances, key=distances.get)[:2]
    clear = distances[first] <= _COLOUR_BOUND and distances[second] - distances[first] >= _COLOUR_MARGIN
    return first if clear else None


def _fit_shapes(mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """For each shape, the best overlap (intersection over union of soft masks) and its radius.

    The area and the centroid of `mask` give the starting point, since every template has its centroid at its
    centre.
    """
    x, y = _centroid(mask)
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    # A blurred outline costs overlap without changing the shape: steepen the mask and the templates alike.
    steep = np.clip(0.5 + _STEEPNESS * (mask - 0.5), 0, 1)
    shifts = np.array([-0.4, 0.0, 0.4])[:, None, None, None]
    u, v = np.broadcast_arrays(columns - x - shifts, rows - y - shifts[:, None])
    fits = {}
    for shape in SHAPES:
        start = np.sqrt(mask.sum() / _UNIT_AREA[shape])
        outward, apothem = _outward(shape, u, v)
        fits[shape] = (0.0, start)
        for radius in start * np.array([0.92, 0.96, 1.0, 1.04]):
            template = np.clip(0.5 - _STEEPNESS * (outward - apothem * radius), 0, 1)
            both = np.minimum(steep, template).sum(axis=(-2, -1))
            either = np.maximum(steep, template).sum(axis=(-2, -1))
            fits[shape] = max(fits[shape], (float((both / either).max()), float(radius)))
    return fits


def _outward(shape: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """How far points lie out along the normal of the nearest edge of a shape centred at 0, and the apothem.

    A shape of nominal radius r is the set of points where the first is at most r times the second; near its
    edges the difference is the distance to the outline.
    """
    if shape == "circle":
        return np.hypot(x, y), 1.0
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)), SQUARE_HALF_SIDE
    # Regular outlines repeat: fold the plane into the half sector from a tip (straight up) to the next notch.
    tips = {"triangle": 3, "star": 5}[shape]
    outer = OUTER_RADIUS[shape]
    notch = outer * (STAR_INNER_RADIUS if shape == "star" else np.cos(np.pi / 3))
    angle = np.abs((np.arctan2(x, -y) + np.pi / tips) % (2 * np.pi / tips) - np.pi / tips)
    edge = np.array([notch * np.cos(np.pi / tips) - outer, notch * np.sin(np.pi / tips)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return np.hypot(x, y) * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]), outer * normal[0]


def _unit_areas() -> dict[str, float]:
    triangle, star = OUTER_RADIUS["triangle"], OUTER_RADIUS["star"]
    return {
        "circle": np.pi,
        "square": (2 * SQUARE_HALF_SIDE) ** 2,
        "triangle": 0.75 * np.sqrt(3) * triangle**2,
        "star": 5 * star**2 * STAR_INNER_RADIUS * np.sin(np.pi / 5),
    }


_UNIT_AREA = _unit_areas()


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    total = mask.sum()
    x = (mask.sum(axis=0) @ (np.arange(mask.shape[1]) + 0.5)) / total
    y = (mask.sum(axis=1) @ (np.arange(mask.shape[0]) + 0.5)) / total
    return float(x), float(y)


def _components(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Labels (1, 2, ...) of the 8-connected components of a mask, 0 outside, and their areas in pixels."""
    runs: list[tuple[int, int, int]] = []
    parents: list[int] = []

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    above: list[int] = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
        current = []
        for start, stop in edges.reshape(-1, 2).tolist():
            index = len(runs)
            runs.append((row, start, stop))
            parents.append(index)
            current.append(index)
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    a, b = sorted((root(other), root(index)))
                    parents[b] = a
        above = current
    labels = np.zeros(mask.shape, np.int32)
    names: dict[int, int] = {}
    areas: list[int] = []
    for index, (row, start, stop) in enumerate(runs):
        label = names.setdefault(root(index), len(names) + 1)
        labels[row, start:stop] = label
        if label > len(areas):
            areas.append(0)
        areas[label - 1] += stop - start
    return labels, areas


def _dilate(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or len(set(image.shape[:2])) > 1:
        raise InputError(
            f"cannot grade an array {image.shape} of {image.dtype}; give a square RGB picture of uint8"
        )
    if len(image) < 32:
        raise InputError(f"cannot grade a picture of {len(image)} pixels; give at least 32")
    return image.astype(np.float64)
