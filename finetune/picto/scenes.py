"""Everyday scenes, rendered with exact boxes: deterministic by seed, at any picture size.

    scene = make_scene(seed=(0, 17), size=(640, 480), catalogue=load_knowledge().classes)
    scene.image, scene.objects        # RGB image; name and box (xyxy pixels of what is visible) of each thing

A scene is first laid out in unit coordinates, then painted, so the same seed gives the same scene at any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from finetune.picto import sprites
from finetune.picto.places import PLACES, Place, Shape

MIN_VISIBLE = 0.7  # of a thing's own pixels: occlusion stays mild
FLYING = {"airplane", "helicopter", "butterfly", "bee", "kite", "balloon"}
LINES = 7  # of the picture, for reading order: the rows of cells that the reasoner sees
AT_HOME = 0.6  # chance that a thing belongs to the place it is in


class Pictured(Protocol):
    """What a scene needs to know of a class of things."""

    @property
    def picture(self) -> str: ...

    @property
    def category(self) -> str: ...


@dataclass(frozen=True)
class Thing:
    """One thing of a layout, before painting; all lengths are fractions of the picture's sides."""

    name: str
    style: str
    x: float  # centre
    y: float  # feet
    scale: float  # of the square root of the picture's area
    angle: float  # degrees
    flipped: bool
    brightness: float


@dataclass(frozen=True)
class Object:
    name: str
    box: tuple[float, float, float, float]  # xyxy pixels of the visible part


def reading_order(boxes: np.ndarray) -> list[int]:
    """Indices of boxes (N, 4) in 0..1 by their centres: line by line, each from left to right."""
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return [int(i) for i in np.lexsort((x, np.floor(y * LINES)))]


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    place: str
    objects: tuple[Object, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Each name once, in reading order."""
        boxes = np.array([o.box for o in self.objects]).reshape(-1, 4) / np.tile(self.image.size, 2)
        return tuple(dict.fromkeys(self.objects[i].name for i in reading_order(boxes)))


def make_scene(
    seed: int | Sequence[int],
    size: tuple[int, int],
    catalogue: Mapping[str, Pictured],
    styles: Sequence[str] = sprites.TRAIN_STYLES,
) -> Scene:
    """Lay out and paint the scene of `seed`; `size` is (width, height) in pixels."""
    rng = np.random.default_rng(seed)
    key = str(rng.choice(list(PLACES)))
    place = PLACES[key]
    canvas = _paint_place(rng, place, size)
    taken = np.full((size[1], size[0]), -1, np.int16)  # which thing each pixel shows
    placed: list[tuple[str, int]] = []  # name, its own pixels
    for name in _choose(rng, place, catalogue):
        for _ in range(6):  # look for a spot that does not hide what already stands there
            thing = _put(rng, place, name, styles)
            if _paint_thing(canvas, taken, placed, thing, catalogue[name].picture):
                break
    return Scene(_light(rng, canvas), key, _boxes(taken, placed))


def _choose(rng: np.random.Generator, place: Place, catalogue: Mapping[str, Pictured]) -> list[str]:
    everything = list(catalogue)
    native = [n for n in everything if catalogue[n].category in place.categories] or everything
    names: list[str] = []
    for _ in range(int(rng.integers(3, 9))):
        name = str(rng.choice(native if rng.random() < AT_HOME else everything))
        repeats = int(rng.integers(2, 4)) if rng.random() < 0.12 else 1
        names += [name] * (repeats if name not in names else 1)
    return names[:10]


def _put(rng: np.random.Generator, place: Place, name: str, styles: Sequence[str]) -> Thing:
    if place.air is not None and name in FLYING and rng.random() < 0.8:
        scale = rng.uniform(0.14, 0.26)
        x, y = rng.uniform(0.1, 0.9), rng.uniform(*place.air) + scale
    else:
        surface = place.surfaces[int(rng.integers(len(place.surfaces)))]
        scale = rng.uniform(*surface.scale)
        margin = scale / 2
        x = rng.uniform(surface.x0 + margin, max(surface.x0 + margin, surface.x1 - margin))
        y = surface.y + rng.uniform(-surface.depth, surface.depth)
    upright = rng.random() < 0.85
    return Thing(
        name=name,
        style=str(rng.choice(list(styles))),
        x=float(x),
        y=float(min(y, 0.99)),
        scale=float(scale),
        angle=float(rng.normal(0, 5) if upright else rng.uniform(-50, 50)),
        flipped=bool(rng.random() < 0.4),
        brightness=float(rng.uniform(0.85, 1.12)),
    )


def _paint_thing(
    canvas: Image.Image, taken: np.ndarray, placed: list[tuple[str, int]], thing: Thing, picture: str
) -> bool:
    """Paint a thing with its shadow, unless it would hide too much of another; tell whether it was painted."""
    width, height = canvas.size
    sprite = sprites.load(thing.style)[picture]
    side = thing.scale * (width * height) ** 0.5 / max(sprite.size)
    sprite = sprite.resize(
        (max(4, round(sprite.width * side)), max(4, round(sprite.height * side))), Image.Resampling.BILINEAR
    )
    if thing.flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if abs(thing.angle) > 1:
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
    left = round(min(max(thing.x * width - sprite.width / 2, 0), width - sprite.width))
    top = round(min(max(thing.y * height - sprite.height, 0), height - sprite.height))
    mask = np.asarray(sprite.getchannel("A")) > 110
    area = taken[top : top + mask.shape[0], left : left + mask.shape[1]]
    for other in np.unique(area[mask]):
        if other >= 0:
            still_visible = int((taken == other).sum()) - int((area[mask] == other).sum())
            if still_visible < MIN_VISIBLE * placed[other][1]:
                return False
    _paint_shadow(canvas, left, top, sprite.size)
    colours = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(thing.brightness)
    canvas.paste(colours, (left, top), sprite.getchannel("A"))
    area[mask] = len(placed)
    placed.append((thing.name, int(mask.sum())))
    return True


def _paint_shadow(canvas: Image.Image, left: int, top: int, size: tuple[int, int]) -> None:
    width, height = size
    depth = max(2, height // 9)
    box = (left, top + height - depth, left + width, min(top + height + depth // 2, canvas.height))
    patch = canvas.crop(box)
    shade = Image.new("L", patch.size)
    ImageDraw.Draw(shade).ellipse((0, 0, patch.width - 1, patch.height - 1), fill=70)
    canvas.paste((30, 28, 34), box[:2], shade)


def _paint_place(rng: np.random.Generator, place: Place, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    tint = rng.normal(0, 12, 3)
    for shape in place.shapes:
        _paint_shape(draw, shape, size, tint + rng.normal(0, 4, 3))
    return canvas


def _paint_shape(draw: ImageDraw.ImageDraw, shape: Shape, size: tuple[int, int], shift: np.ndarray) -> None:
    width, height = size
    points = [v * (width if i % 2 == 0 else height) for i, v in enumerate(shape.points)]
    red, green, blue = (int(c) for c in np.clip(np.array(shape.colour) + shift, 0, 255))
    if shape.kind == "rect":
        draw.rectangle(points, fill=(red, green, blue))
    elif shape.kind == "ellipse":
        draw.ellipse(points, fill=(red, green, blue))
    else:
        draw.polygon(points, fill=(red, green, blue))


def _light(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """A soft light from one side, and a warmer or colder day."""
    width, height = canvas.size
    across = np.linspace(-1, 1, width, dtype=np.float32) * rng.uniform(-0.12, 0.12)
    down = np.linspace(-1, 1, height, dtype=np.float32) * rng.uniform(-0.08, 0.08)
    gain = (rng.uniform(0.88, 1.1) + across[None, :] + down[:, None])[..., None] * rng.uniform(0.96, 1.04, 3)
    lit = np.asarray(canvas, np.float32) * gain.astype(np.float32)
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _boxes(taken: np.ndarray, placed: Sequence[tuple[str, int]]) -> tuple[Object, ...]:
    objects = []
    for i, (name, _) in enumerate(placed):
        rows, columns = np.nonzero(taken == i)
        box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        objects.append(Object(name, box))
    return tuple(objects)
