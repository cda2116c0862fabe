"""Boxes, labels, masks and an optional legend on a picture, with Pillow alone.

    draw(image, boxes, labels, scores).save("out.png")

Sizes follow the picture, so that 64 and 6000 pixels look alike; a small picture is first enlarged
by a whole factor, so that its labels stay readable. Other overlays are left out: `supervision` has them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detgpt.errors import InputError
from detgpt.overlay import tint
from detgpt.typeface import Face, legible

# Any two differ clearly to normal eyes, and under simulated protanopia, deuteranopia and tritanopia.
PALETTE = ("#2FBDFA", "#F0702A", "#E2F27A", "#9F5FC8", "#1CAA78", "#FF86C2", "#EBB52E", "#86F5F4")
INK, GREY, PANEL = "#1D1D1F", "#6E6E73", "#FBFBFD"
HALO_ALPHA = 90
MOST_LISTED = 24  # targets in a legend; past that, only those found
LONGEST_ENLARGED = 4096  # pixels; a long thin strip is not enlarged beyond this
SMOOTH = 4  # supersampling of round corners, which Pillow draws jagged


class Rect(NamedTuple):
    """Whole pixels [x0, x1) x [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def area(self) -> int:
        return max(0, self.x1 - self.x0) * max(0, self.y1 - self.y0)

    def overlap(self, other: Rect) -> int:
        return Rect(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area


def draw(
    image: Image.Image,
    boxes: np.ndarray | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: np.ndarray | Sequence[float] | None = None,
    *,
    masks: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    legend: str | None = None,
    instruction: str | None = None,
    line_width: int | None = None,
    text_size: int | None = None,
    min_side: int = 400,
    font: str | None = None,
) -> Image.Image:
    """Return an RGB copy of `image` with the boxes drawn; the given image stays as it is.

    boxes: (N, 4), xyxy in pixels of the image. labels, scores: one per box.
    masks: (N, H, W) bool, the pixels of each thing, to be tinted below the boxes.
    names: the targets, found or not, which fixes their colours; the labels as they come unless given.
    legend: reasoning to print on a panel under the picture, below a chip for each target ("" for
        the chips alone); a text longer than the picture is high is cut.
    instruction: the panel's heading.
    line_width, text_size: in pixels of the result; chosen from its size unless given.
    min_side: enlarge, by a whole factor, until the short side has this many pixels; the result may
        thus be larger than the image. 0 never enlarges.
    font: path or name of a TrueType font; otherwise Pillow's own, and a system font for other scripts.

    Raises InputError where boxes, labels, scores and masks do not fit together or the font cannot be read.
    """
    corners = _checked(boxes, labels, scores)
    if masks is not None and masks.shape != (len(corners), image.height, image.width):
        raise InputError(f"masks must have shape {(len(corners), image.height, image.width)}, got {masks.shape}")
    names = list(dict.fromkeys([*(names or ()), *labels]))
    colours = dict(zip(names, target_colours(len(names)), strict=True))
    factor = _enlargement(image.size, min_side)
    canvas = image.convert("RGB")  # a copy, even of an RGB image
    if factor > 1:
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    look = _Look.for_size(canvas.size, line_width, text_size, font)

    rects = [_outline(box, canvas.size, look.line) for box in corners * factor]
    order = sorted(range(len(rects)), key=lambda index: -rects[index].area)  # small boxes on top
    if masks is not None:
        for index in order:
            tint(canvas, masks[index], colours[labels[index]], factor, edge=look.line - look.halo)
    for index in order:
        _draw_box(canvas, rects[index], colours[labels[index]], look)
    _draw_tags(canvas, rects, labels, scores, colours, look)
    if legend is None and not instruction:
        return canvas
    listed = names if len(names) <= MOST_LISTED else [name for name in names if name in labels]
    entries = [_Entry.of(name, colours[name], labels, scores) for name in listed]
    return _with_legend(canvas, instruction or "", legend or "", entries, look)


def target_colours(count: int) -> list[str]:
    """`count` colours as "#RRGGBB", always the same in the same order; the first 200 all differ."""
    colours = list(PALETTE)
    for step in range(count - len(PALETTE)):
        # Past the palette: hues a golden ratio apart, in turn light and less light.
        red, green, blue = colorsys.hls_to_rgb(0.07 + step * 0.618034 % 1, (0.72, 0.58, 0.82)[step % 3], 0.62)
        colours.append(f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}")
    return colours[:count]


def _checked(
    boxes: np.ndarray | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Sequence[float] | np.ndarray | None,
) -> np.ndarray:
    """The boxes as (N, 4) float64."""
    corners = np.asarray(boxes, dtype=np.float64)
    if corners.size == 0:
        corners = corners.reshape(0, 4)
    if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
        raise InputError(f"boxes must be finite xyxy numbers of shape (N, 4), got shape {corners.shape}")
    if len(labels) != len(corners) or (scores is not None and len(scores) != len(corners)):
        given = "no" if scores is None else len(scores)
        raise InputError(f"{len(corners)} boxes need as many labels and scores, got {len(labels)} and {given}")
    return corners


def _enlargement(size: tuple[int, int], min_side: int) -> int:
    wanted = -(-min_side // min(size))
    return max(1, min(wanted, LONGEST_ENLARGED // max(size)))


@dataclass(frozen=True)
class _Look:
    """Sizes in pixels of the result, and the typeface."""

    line: int
    text: int
    font: str | None

    @classmethod
    def for_size(cls, size: tuple[int, int], line: int | None, text: int | None, font: str | None) -> _Look:
        for name, value in (("line_width", line), ("text_size", text)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 pixel or more, got {value}")
        scale = (size[0] * size[1]) ** 0.5
        text = text or max(1, min(max(13, round(scale * 0.017)), max(13, min(size) // 20), min(size) // 2))
        if font is not None:
            try:
                ImageFont.truetype(font, text)
            except OSError as error:
                raise InputError(f"font {font!r} cannot be read ({error}); give a TrueType file") from error
        return cls(line or max(3, round(scale * 0.0027)), text, font)

    @property
    def halo(self) -> int:
        return max(1, round(self.line / 3))

    @property
    def radius(self) -> int:
        return self.line * 3

    @property
    def pad(self) -> int:
        return round(self.text * 0.5)


# --- boxes ---


def _outline(box: np.ndarray, size: tuple[int, int], line: int) -> Rect:
    """The stroke's outer edge: centred on the box's edge, but within the picture, and never of no size."""
    half, (width, height) = line // 2, size
    spans = []
    for low, high, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        start = int(np.clip(round(low) - half, 0, max(0, limit - 2 * line)))
        spans.append((start, int(np.clip(round(high) + line - half, start + min(2 * line, limit), limit))))
    (x0, x1), (y0, y1) = spans
    return Rect(x0, y0, x1, y1)


def _draw_box(canvas: Image.Image, rect: Rect, colour: str, look: _Look) -> None:
    halo = look.halo
    around = Rect(rect.x0 - halo, rect.y0 - halo, rect.x1 + halo, rect.y1 + halo)
    _stroke(canvas, around, look.line + 2 * halo, look.radius + halo, "black", HALO_ALPHA)
    _stroke(canvas, rect, look.line, look.radius, colour, 255)


def _stroke(canvas: Image.Image, rect: Rect, width: int, radius: int, colour: str, alpha: int) -> None:
    """A round-cornered frame inside `rect`: four strips and four corners, so that its cost is its length."""
    x0, y0, x1, y1 = rect
    radius = min(radius, (x1 - x0) // 2, (y1 - y0) // 2)
    width_x, width_y = min(width, (x1 - x0) // 2), min(width, (y1 - y0) // 2)
    strips = (
        (x0 + radius, y0, x1 - radius, y0 + width_y),
        (x0 + radius, y1 - width_y, x1 - radius, y1),
        (x0, y0 + radius, x0 + width_x, y1 - radius),
        (x1 - width_x, y0 + radius, x1, y1 - radius),
    )
    for left, top, right, bottom in strips:
        if right > left and bottom > top:
            mask = Image.new("L", (right - left, bottom - top), alpha)
            canvas.paste(colour, (left, top), mask)
    if radius == 0:
        return
    ring = _ring(radius, width, alpha)
    for left, column in ((x0, 0), (x1 - radius, radius)):
        for top, row in ((y0, 0), (y1 - radius, radius)):
            canvas.paste(colour, (left, top), ring.crop((column, row, column + radius, row + radius)))


@lru_cache(maxsize=64)
def _ring(radius: int, width: int, alpha: int) -> Image.Image:
    """The four corners of a frame, pushed together."""
    side = 2 * radius * SMOOTH
    ring = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(ring)
    pen.ellipse((0, 0, side - 1, side - 1), fill=alpha)
    if radius > width:
        inset = width * SMOOTH
        pen.ellipse((inset, inset, side - 1 - inset, side - 1 - inset), fill=0)
    return ring.resize((2 * radius, 2 * radius), Image.Resampling.BOX)


# --- tags ---


def _draw_tags(
    canvas: Image.Image,
    rects: Sequence[Rect],
    labels: Sequence[str],
    scores: Sequence[float] | np.ndarray | None,
    colours: dict[str, str],
    look: _Look,
) -> None:
    height = round(look.text * 1.6)
    if canvas.height < height or canvas.width < 2 * height:
        return  # too thin for text; the colours still tell the targets apart
    names = list(colours)
    tags: list[tuple[Rect, str, Face, str]] = []
    order = range(len(rects)) if scores is None else np.argsort(-np.asarray(scores), kind="stable").tolist()
    for index in order:  # the surest boxes choose their places first
        label = labels[index]
        name, face = legible(label, look.text, look.font, instead=f"#{names.index(label) + 1}")
        score = "" if scores is None else f"{scores[index]:.2f}"
        room = canvas.width - 2 * look.pad
        name = face.fit(name, room - face.width(f"  {score}") if score else room)
        if text := "  ".join(part for part in (name, score) if part):
            size = min(canvas.width, face.width(text) + 2 * look.pad), height
            rect = _place(size, rects[index], [tag[0] for tag in tags], canvas.size, look)
            tags.append((rect, text, face, colours[label]))
    for rect, text, face, colour in reversed(tags):
        pill = _pill((rect.x1 - rect.x0, height), round(height * 0.28))
        canvas.paste(colour, rect[:2], pill)
        face.write(canvas, rect.x0 + look.pad, rect.y0 + height // 2, text, ink_on(colour))


def _place(tag: tuple[int, int], box: Rect, placed: Sequence[Rect], size: tuple[int, int], look: _Look) -> Rect:
    """The first place that covers no other tag; where all do, the one that covers least."""
    width, height = tag
    options = []
    for x, y in _places(tag, box, size, look):
        if 0 <= y <= size[1] - height:
            x = min(max(x, 0), size[0] - width)
            options.append(Rect(x, y, x + width, y + height))
    return min(options, key=lambda rect: sum(rect.overlap(other) for other in placed))


def _places(tag: tuple[int, int], box: Rect, size: tuple[int, int], look: _Look) -> Iterator[tuple[int, int]]:
    """Top left corners for a tag, best first; at least one fits the picture's height."""
    width, height = tag
    gap = look.line + look.halo
    rows = box.y0 - height - look.halo, box.y1 + look.halo
    outside = [(x, y) for y in rows for x in (box.x0, box.x1 - width)]
    top, bottom, left, right = box.y0 + gap, box.y1 - gap - height, box.x0 + gap, box.x1 - gap - width
    inside = [(left, top), (right, top), (left, bottom), (right, bottom)]
    beside = [(box.x1 + look.halo, box.y0), (box.x0 - look.halo - width, box.y0)]
    roomy = box.area > 4 * width * height and box.y1 - box.y0 > 2 * height
    yield from outside[:1] + inside + outside[1:] + beside if roomy else outside + beside + inside
    for step in range(1, 4):
        yield box.x0, box.y0 - height - step * (height + gap)
        yield left, top + step * (height + gap)
    yield box.x0, min(max(box.y0, 0), size[1] - height)


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more (WCAG's relative luminance)."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if (luminance + 0.05) / 0.0615 > 1.05 / (luminance + 0.05) else "#FFFFFF"


@lru_cache(maxsize=256)
def _pill(size: tuple[int, int], radius: int) -> Image.Image:
    large = Image.new("L", (size[0] * SMOOTH, size[1] * SMOOTH), 0)
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * SMOOTH, fill=255)
    return large.resize(size, Image.Resampling.BOX)


# --- legend ---


@dataclass(frozen=True)
class _Entry:
    """One target's line in the legend."""

    name: str
    colour: str
    tally: str

    @classmethod
    def of(cls, name: str, colour: str, labels: Sequence[str], scores: Sequence[float] | np.ndarray | None) -> _Entry:
        mine = [index for index, label in enumerate(labels) if label == name]
        if not mine:
            return cls(name, colour, "not found")
        best = "" if scores is None else f"{max(scores[index] for index in mine):.2f}"
        if len(mine) > 1:
            best = f"{len(mine)} boxes, best {best}" if best else f"{len(mine)} boxes"
        return cls(name, colour, best)


def _with_legend(
    canvas: Image.Image, instruction: str, reasoning: str, entries: Sequence[_Entry], look: _Look
) -> Image.Image:
    """The picture above a panel: instruction, one chip per target, reasoning."""
    margin = round(look.text * 1.4)
    width = max(canvas.width, 20 * look.text)
    room, most = width - 2 * margin, max(6, canvas.height // (2 * look.text))
    parts = (
        _text_block(instruction, round(look.text * 1.25), INK, room, most, look),
        _chip_block(entries, room, look),
        _text_block(reasoning, look.text, GREY, room, most, look),
    )
    blocks = [part for part in parts if part is not None]
    panel_height = sum(block.height for block in blocks) + margin * (len(blocks) + 1)
    sheet = Image.new("RGB", (width, canvas.height + panel_height), PANEL)
    sheet.paste(canvas, ((width - canvas.width) // 2, 0))
    top = canvas.height + margin
    for block in blocks:
        sheet.paste(block, (margin, top))
        top += block.height + margin
    return sheet


def _text_block(text: str, size: int, colour: str, room: int, most: int, look: _Look) -> Image.Image | None:
    text, face = legible(text, size, look.font)
    lines = face.wrap(text, room, most)
    if not lines:
        return None
    step = round(size * 1.5)
    block = Image.new("RGB", (room, step * len(lines)), PANEL)
    for row, line in enumerate(lines):
        face.write(block, 0, row * step + step // 2, line, colour)
    return block


def _chip_block(entries: Sequence[_Entry], room: int, look: _Look) -> Image.Image | None:
    """The targets side by side in rows, each a coloured dot, its name and its tally."""
    if not entries:
        return None
    dot, gap, step = round(look.text * 0.8), round(look.text * 0.5), round(look.text * 1.7)
    block, x, middle = Image.new("RGB", (room, step * len(entries)), PANEL), 0, step // 2
    for number, entry in enumerate(entries, start=1):
        name, face = legible(entry.name, look.text, look.font, instead=f"#{number}")
        tally_width = face.width(entry.tally)
        name = face.fit(name, room - dot - 2 * gap - tally_width)
        width = dot + gap + face.width(name) + gap + tally_width
        if x and x + width > room:
            x, middle = 0, middle + step
        block.paste(entry.colour, (x, middle - dot // 2), _pill((dot, dot), dot // 2))
        face.write(block, x + dot + gap, middle, name, INK)
        face.write(block, x + width - tally_width, middle, entry.tally, GREY)
        x += width + 3 * gap
    return block.crop((0, 0, room, middle + step // 2))
