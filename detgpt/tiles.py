"""Small things: look at overlapping parts of a picture too, each shown to the detector at its full input size.

    Tiled(detector, 3).detect([image], [["cup"]])        # the whole picture, and 3 x 3 parts of it

After SAHI (Akyon et al., 2022, arXiv:2202.06934). The parts of one picture are of one size, so a detector may batch
them. Suppressing what was seen twice is left to the pipeline, as with any detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from PIL import Image

from detgpt.boxes import concatenate, coverage_matrix
from detgpt.detectors import Detector, Grounding

MAX_TILES = 8  # 65 looks at a picture; more would make the parts smaller than what a detector needs around a thing
OVERLAP = 0.4  # of a part's side, shared with the next part; at 0.25 more things stood whole in no part
EDGE = 0.01  # of a part's side: a box that comes so close to a border ends there
INSIDE = 0.8  # of a box: so much of it in another one makes it a piece of that


def in_tiles(detector: Detector, tiles: int) -> Detector:
    """`detector`, looking at parts of a picture too where there are more than one."""
    return detector if tiles == 1 else Tiled(detector, tiles)


class Tiled:
    """A detector that sees each picture whole and in `tiles` x `tiles` overlapping parts.

    The rule at a seam: pieces are dropped, for the whole thing comes from another look. A piece is a box that ends at
    an inner border of its part, or one that lies in a better-scored box that another look has for the same name. A
    thing no larger than the overlap stands whole in some part, and comes from there; a larger one is a good part of
    the picture, and comes from the look at the whole. Only what is longer than the overlap and too thin for that
    look is lost: a pole, say.
    """

    def __init__(self, detector: Detector, tiles: int) -> None:
        self.detector, self.tiles = detector, tiles
        self.name = detector.name

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        """As `Detector.detect`; what several looks found of one thing is all there, best first."""
        looks = [_looks(image.size, self.tiles) for image in images]
        groundings = iter(
            self.detector.detect(
                [image.crop(look) for image, parts in zip(images, looks, strict=True) for look in parts],
                [asked for asked, parts in zip(names, looks, strict=True) for _ in parts],
                box_threshold=box_threshold,
                text_threshold=text_threshold,
                prompting=prompting,
            )
        )
        return [
            _joined([_in_picture(next(groundings), look, image.size) for look in parts])
            for image, parts in zip(images, looks, strict=True)
        ]


def _looks(image_wh: tuple[int, int], tiles: int) -> list[tuple[int, int, int, int]]:
    """The whole picture, then its parts row by row, as xyxy in whole pixels."""
    columns, rows = (_spans(side, tiles) for side in image_wh)
    parts = [(x0, y0, x1, y1) for (y0, y1), (x0, x1) in product(rows, columns)]
    return list(dict.fromkeys([(0, 0, *image_wh), *parts]))


def _spans(side: int, tiles: int) -> list[tuple[int, int]]:
    """`tiles` stretches of one length that cover `side` pixels, each overlapping the next."""
    length = min(side, round(side / (tiles - (tiles - 1) * OVERLAP)) + 1)
    starts = np.linspace(0, side - length, tiles).round().astype(int).tolist()
    return [(start, start + length) for start in starts]


def _in_picture(grounding: Grounding, look: tuple[int, int, int, int], image_wh: tuple[int, int]) -> Grounding:
    """What a part shows whole, moved from its pixels to those of the picture."""
    origin, size = np.array(look[:2]), np.array(look[2:]) - look[:2]
    inner = np.concatenate([origin > 0, look[2:] < np.array(image_wh)])  # left, top, right, bottom
    boxes, margin = grounding.boxes, EDGE * size
    at_border = np.concatenate([boxes[:, :2] <= margin, boxes[:, 2:] >= size - margin], axis=1)
    whole = ~(at_border & inner).any(axis=1)
    moved = boxes[whole] + np.tile(origin, 2).astype(np.float32)
    return Grounding(moved, grounding.scores[whole], grounding.name_index[whole])


def _joined(groundings: Sequence[Grounding]) -> Grounding:
    """All looks together, without what is a piece of another look's better box."""
    kept = []
    for number, grounding in enumerate(groundings):
        others = concatenate([other for i, other in enumerate(groundings) if i != number])
        better = grounding.scores[:, None] < others.scores
        same_name = grounding.name_index[:, None] == others.name_index
        inside = coverage_matrix(grounding.boxes, others.boxes) > INSIDE
        whole = ~(better & same_name & inside).any(axis=1)
        kept.append(Grounding(grounding.boxes[whole], grounding.scores[whole], grounding.name_index[whole]))
    return concatenate(kept)
