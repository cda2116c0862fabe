"""The true pixels of a wish: outlines as annotations have them, made into masks when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from detgpt.errors import InputError, MissingExtraError


class Outline(NamedTuple):
    """A COCO `segmentation`: polygons [[x0, y0, x1, y1, ...], ...], or a run-length code (RLE) as a dict."""

    segmentation: Any
    ignored: bool = False


@dataclass(frozen=True, eq=False)
class Outlines:
    """Outlines of one picture; where they overlap, the later one counts.

    edges: whether the pixels under a polygon's edges all belong to it, as in LISA's code for ReasonSeg, which
        draws them; otherwise COCO's own rule.
    """

    layers: tuple[Outline, ...]
    edges: bool = False

    def masks(self, image_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(true, ignored), both (H, W) bool and disjoint. Raises `MissingExtraError` without pycocotools."""
        width, height = image_wh
        true, ignored = (np.zeros((height, width), dtype=bool) for _ in range(2))
        rasterise = _with_edges if self.edges else _as_coco
        for layer in self.layers:
            mask = rasterise(layer.segmentation, width, height)
            true, ignored = (true & ~mask, ignored | mask) if layer.ignored else (true | mask, ignored & ~mask)
        return true, ignored


def checked_segmentation(value: Any, where: str) -> Any:
    """`value`, if it is a COCO segmentation; otherwise `InputError`."""
    if isinstance(value, dict) and isinstance(value.get("counts"), (list, str)) and isinstance(value.get("size"), list):
        return value
    if not (isinstance(value, list) and value and all(_is_polygon(points) for points in value)):
        raise InputError(
            f"{where}: a segmentation is a list of polygons [x0, y0, x1, y1, x2, y2, ...] or a run-length code "
            f'{{"size", "counts"}}, got {str(value)[:60]}'
        )
    return value


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in points)
    )


def _as_coco(segmentation: Any, width: int, height: int) -> np.ndarray:
    try:
        coco = import_module("pycocotools.mask")
    except ImportError as error:
        raise MissingExtraError("pycocotools", "eval") from error
    if isinstance(segmentation, dict) and list(segmentation["size"]) != [height, width]:
        raise InputError(f"a run-length code is of size {segmentation['size']}, but the picture of [{height}, {width}]")
    plain = isinstance(segmentation, list) or isinstance(segmentation["counts"], list)
    codes = coco.frPyObjects(segmentation, height, width) if plain else segmentation
    return coco.decode(coco.merge(codes) if isinstance(codes, list) else codes).astype(bool)


def _with_edges(segmentation: Sequence[Sequence[float]], width: int, height: int) -> np.ndarray:
    """Polygons through the centres of whole pixels, filled, with the pixels under their edges."""
    edges = Image.new("1", (width, height))
    corners = [np.array(points).astype(int).reshape(-1, 2) for points in segmentation]
    for polygon in corners:
        ImageDraw.Draw(edges).line([tuple(point) for point in [*polygon.tolist(), polygon[0].tolist()]], fill=1)
    filled = _as_coco([(polygon + 0.5).ravel().tolist() for polygon in corners], width, height)
    return filled | np.asarray(edges)
