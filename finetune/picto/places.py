"""The places of the built-in world: what is painted behind the objects, and where objects may stand.

A place is data: `shapes` are painted back to front in unit coordinates (0..1 of width and height), and
`surfaces` say where things stand (`y` is the line their feet touch). Colours are the middle of a range;
`scenes.py` shifts them by its random generator, so no two kitchens look the same.
"""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    kind: str  # "rect" | "ellipse" | "polygon"
    points: tuple[float, ...]  # x0, y0, x1, y1, … in 0..1
    colour: Colour


@dataclass(frozen=True)
class Surface:
    """A line on which things stand (`y`), between `x0` and `x1`; `depth` lets them stand nearer or farther."""

    y: float
    x0: float = 0.02
    x1: float = 0.98
    depth: float = 0.03
    scale: tuple[float, float] = (0.16, 0.30)  # object size as a fraction of the picture's side


@dataclass(frozen=True)
class Place:
    phrase: str  # completes "… I see a cup"
    shapes: tuple[Shape, ...]
    surfaces: tuple[Surface, ...]
    categories: tuple[str, ...]  # what is at home here; other things turn up too
    air: tuple[float, float] | None = None  # y range in which flying things may be


def rect(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> Shape:
    return Shape("rect", (x0, y0, x1, y1), colour)


def ellipse(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> Shape:
    return Shape("ellipse", (x0, y0, x1, y1), colour)


def polygon(colour: Colour, *points: float) -> Shape:
    return Shape("polygon", points, colour)


def board(y: float, colour: Colour, x0: float = 0.0, x1: float = 1.0, thick: float = 0.025) -> tuple[Shape, ...]:
    """A wooden board with a darker front edge: a shelf or a table top."""
    r, g, b = colour
    return (
        rect(x0, y, x1, y + thick, colour),
        rect(x0, y + thick * 0.7, x1, y + thick * 1.15, (int(r * 0.72), int(g * 0.72), int(b * 0.72))),
    )


def tiles(y0: float, y1: float, step: float, colour: Colour) -> tuple[Shape, ...]:
    """Thin joints of a tiled wall."""
    across = tuple(rect(0, y0 + i * step, 1, y0 + i * step + 0.004, colour) for i in range(int((y1 - y0) / step) + 1))
    down = tuple(rect(i * step, y0, i * step + 0.004, y1, colour) for i in range(int(1 / step) + 1))
    return across + down


WOOD, DARK_WOOD = (186, 140, 99), (130, 92, 64)
SKY, GRASS, WATER = (176, 212, 240), (134, 184, 104), (96, 168, 208)

PLACES: dict[str, Place] = {
    "kitchen": Place(
        "In this kitchen",
        (
            rect(0, 0, 1, 1, (236, 228, 214)),
            *tiles(0.0, 0.62, 0.125, (222, 212, 198)),
            rect(0, 0.66, 1, 1, (150, 168, 170)),
            rect(0.03, 0.74, 0.47, 0.97, (166, 184, 186)),
            rect(0.53, 0.74, 0.97, 0.97, (166, 184, 186)),
            *board(0.34, WOOD, 0.08, 0.92),
            *board(0.64, (214, 206, 196), 0, 1, 0.04),
        ),
        (
            Surface(0.345, 0.09, 0.91, 0.0, (0.14, 0.26)),
            Surface(0.665, depth=0.02, scale=(0.16, 0.28)),
            Surface(0.97),
        ),
        ("food", "fruit", "vegetable", "drink", "kitchenware"),
    ),
    "desk": Place(
        "On this desk",
        (
            rect(0, 0, 1, 1, (206, 216, 220)),
            rect(0.56, 0.06, 0.92, 0.36, (250, 250, 246)),
            rect(0.58, 0.085, 0.9, 0.335, (178, 208, 228)),
            rect(0.735, 0.085, 0.745, 0.335, (250, 250, 246)),
            rect(0, 0.58, 1, 1, (198, 158, 116)),
            *board(0.56, (208, 168, 126), 0, 1, 0.05),
            rect(0.0, 0.9, 1, 1, (146, 110, 80)),
        ),
        (Surface(0.62, depth=0.03), Surface(0.86, depth=0.06, scale=(0.18, 0.34))),
        ("electronics", "stationery", "drink", "household"),
    ),
    "street": Place(
        "On this street",
        (
            rect(0, 0, 1, 0.6, SKY),
            rect(0.02, 0.18, 0.26, 0.6, (196, 132, 112)),
            rect(0.28, 0.08, 0.5, 0.6, (208, 190, 160)),
            rect(0.52, 0.22, 0.74, 0.6, (158, 166, 180)),
            rect(0.76, 0.12, 0.98, 0.6, (190, 160, 150)),
            *(
                rect(x, y, x + 0.045, y + 0.07, (232, 236, 220))
                for x in (0.06, 0.15, 0.32, 0.41, 0.56, 0.66, 0.8, 0.89)
                for y in (0.27, 0.41)
            ),
            rect(0, 0.58, 1, 0.68, (184, 180, 174)),
            rect(0, 0.68, 1, 1, (110, 112, 118)),
            *(rect(x, 0.825, x + 0.12, 0.845, (226, 222, 206)) for x in (0.04, 0.29, 0.54, 0.79)),
        ),
        (Surface(0.67, depth=0.02, scale=(0.15, 0.28)), Surface(0.93, depth=0.07, scale=(0.2, 0.36))),
        ("vehicle", "animal", "clothing"),
        (0.05, 0.3),
    ),
    "garden": Place(
        "In this garden",
        (
            rect(0, 0, 1, 0.45, SKY),
            ellipse(-0.1, 0.22, 0.4, 0.7, (104, 156, 92)),
            ellipse(0.3, 0.28, 0.75, 0.7, (114, 168, 96)),
            ellipse(0.65, 0.2, 1.15, 0.7, (98, 150, 88)),
            *(rect(x / 10 + 0.01, 0.36, x / 10 + 0.065, 0.56, (236, 230, 216)) for x in range(10)),
            rect(0, 0.42, 1, 0.445, (224, 216, 200)),
            rect(0, 0.54, 1, 1, GRASS),
            ellipse(0.1, 0.86, 0.9, 1.12, (160, 126, 92)),
        ),
        (Surface(0.66, depth=0.05, scale=(0.15, 0.28)), Surface(0.93, depth=0.06, scale=(0.18, 0.36))),
        ("nature", "animal", "vegetable", "tool", "furniture"),
        (0.05, 0.3),
    ),
    "bathroom": Place(
        "In this bathroom",
        (
            rect(0, 0, 1, 1, (204, 228, 232)),
            *tiles(0.0, 0.7, 0.1, (188, 214, 220)),
            rect(0, 0.7, 1, 1, (158, 176, 186)),
            rect(0.34, 0.04, 0.66, 0.28, (240, 244, 246)),
            rect(0.36, 0.06, 0.64, 0.26, (212, 230, 238)),
            *board(0.42, (238, 240, 240), 0.06, 0.94),
        ),
        (
            Surface(0.425, 0.07, 0.93, 0.0, (0.14, 0.26)),
            Surface(0.76, depth=0.03),
            Surface(0.97, scale=(0.18, 0.34)),
        ),
        ("bathroom", "health", "clothing"),
    ),
    "park": Place(
        "In this park",
        (
            rect(0, 0, 1, 0.5, (188, 222, 244)),
            ellipse(0.08, 0.06, 0.34, 0.16, (246, 248, 250)),
            ellipse(0.62, 0.1, 0.9, 0.19, (246, 248, 250)),
            ellipse(-0.2, 0.34, 0.6, 0.9, (150, 196, 120)),
            ellipse(0.4, 0.38, 1.3, 0.9, (138, 188, 112)),
            rect(0, 0.56, 1, 1, (146, 192, 112)),
            polygon((222, 204, 168), 0.42, 0.56, 0.5, 0.56, 0.8, 1.0, 0.34, 1.0),
        ),
        (Surface(0.66, depth=0.05, scale=(0.14, 0.26)), Surface(0.94, depth=0.08, scale=(0.18, 0.36))),
        ("animal", "sport", "nature", "toy", "food", "party"),
        (0.04, 0.34),
    ),
    "living room": Place(
        "In this living room",
        (
            rect(0, 0, 1, 1, (226, 206, 186)),
            rect(0.1, 0.06, 0.3, 0.26, (150, 110, 84)),
            rect(0.12, 0.08, 0.28, 0.24, (208, 220, 206)),
            rect(0, 0.72, 1, 1, (172, 126, 92)),
            ellipse(0.12, 0.78, 0.88, 1.06, (188, 92, 88)),
            ellipse(0.2, 0.82, 0.8, 1.02, (204, 124, 112)),
            *board(0.38, DARK_WOOD, 0.38, 0.98),
        ),
        (
            Surface(0.385, 0.39, 0.97, 0.0, (0.13, 0.24)),
            Surface(0.76, depth=0.03),
            Surface(0.96, depth=0.04, scale=(0.2, 0.38)),
        ),
        ("furniture", "toy", "electronics", "music", "animal"),
    ),
    "workshop": Place(
        "In this workshop",
        (
            rect(0, 0, 1, 1, (178, 172, 160)),
            rect(0.06, 0.05, 0.94, 0.4, (206, 186, 150)),
            *(
                ellipse(x / 12 + 0.02, y / 12 + 0.06, x / 12 + 0.03, y / 12 + 0.07, (160, 140, 110))
                for x in range(1, 11)
                for y in range(4)
            ),
            rect(0, 0.62, 1, 1, (126, 122, 116)),
            *board(0.6, (164, 118, 78), 0, 1, 0.06),
            rect(0.05, 0.67, 0.11, 1, (130, 92, 60)),
            rect(0.89, 0.67, 0.95, 1, (130, 92, 60)),
        ),
        (
            Surface(0.38, 0.08, 0.92, 0.02, (0.14, 0.26)),
            Surface(0.64, depth=0.02),
            Surface(0.95, depth=0.04, scale=(0.2, 0.34)),
        ),
        ("tool", "electronics", "vehicle", "household"),
    ),
    "beach": Place(
        "On this beach",
        (
            rect(0, 0, 1, 0.36, (160, 212, 244)),
            ellipse(0.74, 0.05, 0.9, 0.2, (250, 228, 140)),
            rect(0, 0.34, 1, 0.56, WATER),
            *(rect(x, y, x + 0.1, y + 0.008, (150, 204, 228)) for x, y in ((0.1, 0.4), (0.5, 0.44), (0.75, 0.39))),
            rect(0, 0.54, 1, 1, (236, 214, 164)),
        ),
        (
            Surface(0.52, depth=0.04, scale=(0.13, 0.24)),
            Surface(0.74, depth=0.04),
            Surface(0.95, depth=0.05, scale=(0.18, 0.36)),
        ),
        ("drink", "food", "sport", "clothing", "vehicle", "animal"),
        (0.04, 0.26),
    ),
    "camp site": Place(
        "At this camp site",
        (
            rect(0, 0, 1, 0.6, (70, 86, 122)),
            ellipse(0.76, 0.06, 0.88, 0.18, (240, 236, 210)),
            *(
                polygon((52, 84, 78), x, 0.6, x + 0.09, 0.2 + 0.04 * (i % 3), x + 0.18, 0.6)
                for i, x in enumerate((-0.05, 0.1, 0.24, 0.42, 0.58, 0.72, 0.88))
            ),
            rect(0, 0.56, 1, 1, (104, 124, 92)),
            ellipse(0.1, 0.72, 0.9, 1.1, (128, 136, 104)),
        ),
        (Surface(0.68, depth=0.04, scale=(0.15, 0.28)), Surface(0.94, depth=0.06, scale=(0.18, 0.36))),
        ("outdoors", "animal", "tool", "clothing", "nature", "food"),
        (0.05, 0.3),
    ),
    "bedroom": Place(
        "In this bedroom",
        (
            rect(0, 0, 1, 1, (206, 202, 226)),
            rect(0.62, 0.06, 0.92, 0.4, (248, 246, 248)),
            rect(0.64, 0.08, 0.9, 0.38, (120, 140, 186)),
            rect(0, 0.7, 1, 1, (190, 158, 138)),
            *board(0.46, WOOD, 0.04, 0.54),
            ellipse(0.2, 0.82, 0.9, 1.05, (150, 168, 200)),
        ),
        (
            Surface(0.465, 0.05, 0.53, 0.0, (0.14, 0.26)),
            Surface(0.75, depth=0.03),
            Surface(0.96, depth=0.05, scale=(0.2, 0.38)),
        ),
        ("clothing", "accessory", "furniture", "toy", "electronics"),
    ),
    "shop": Place(
        "In this shop",
        (
            rect(0, 0, 1, 1, (232, 226, 232)),
            rect(0.03, 0.03, 0.97, 0.97, (206, 198, 206)),
            *board(0.3, (150, 140, 150), 0.03, 0.97),
            *board(0.62, (150, 140, 150), 0.03, 0.97),
            *board(0.94, (150, 140, 150), 0.03, 0.97),
        ),
        (
            Surface(0.305, 0.05, 0.95, 0.0, (0.13, 0.25)),
            Surface(0.625, 0.05, 0.95, 0.0, (0.13, 0.27)),
            Surface(0.945, 0.05, 0.95, 0.0, (0.13, 0.27)),
        ),
        ("food", "drink", "toy", "music", "stationery", "health", "bathroom", "sport"),
    ),
}
