"""gIoU and cIoU of reasoning segmentation: what is found of one wish against what is true, as two areas.

As in LISA (Lai et al., 2023), with the union of all that is predicted against the union of all that is true:
gIoU is the mean over the wishes of intersection over union, and 1 for a wish where both are empty; cIoU is the
sum of all intersections over the sum of all unions, so large things weigh more. The published numbers are on
masks. On boxes the same is another measure and goes by other names, `box_giou` and `box_ciou`; its areas are
exact, not rasterised. (This gIoU has nothing to do with the "generalized IoU" of box regression.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detgpt.errors import InputError


class Overlap(NamedTuple):
    """Areas in pixels: of what is both predicted and true, and of what is either."""

    intersection: float
    union: float

    @property
    def iou(self) -> float:
        return self.intersection / self.union if self.union else 1.0


def box_overlap(predicted: np.ndarray, true: np.ndarray, ignored: np.ndarray) -> Overlap:
    """Of boxes (N, 4), (M, 4) and (K, 4) xyxy; what lies in an `ignored` box but in no true one does not count.

    Exact: the edges of all boxes cut the plane into cells that lie in a box wholly or not at all.
    """
    corners = np.concatenate([predicted, true, ignored]).astype(np.float64)
    columns, rows = np.unique(corners[:, [0, 2]]), np.unique(corners[:, [1, 3]])
    sides = [_covered(boxes.astype(np.float64), columns, rows) for boxes in (predicted, true, ignored)]
    cells = np.diff(rows)[:, None] * np.diff(columns)[None, :]
    return _overlap(sides[0], sides[1], sides[2] & ~sides[1], cells)


def mask_overlap(predicted: np.ndarray | None, true: np.ndarray, ignored: np.ndarray) -> Overlap:
    """Of masks: `predicted` (N, H, W), its union counts, None for nothing; `true` and `ignored` (H, W) bool.

    Raises `InputError` where the shapes differ.
    """
    found: np.ndarray = np.zeros(true.shape, dtype=bool)
    if predicted is not None and len(predicted):
        found = np.asarray(np.asarray(predicted, dtype=bool).any(axis=0))
    if not found.shape == true.shape == ignored.shape:
        raise InputError(f"masks must be of one picture, got {found.shape}, {true.shape} and {ignored.shape}")
    return _overlap(found, np.asarray(true, dtype=bool), np.asarray(ignored, dtype=bool), np.ones(true.shape))


def overlap_metrics(overlaps: Sequence[Overlap]) -> dict[str, float | None]:
    """giou and ciou of one `Overlap` a wish; None where there is no wish, or nothing at all in any."""
    union = sum(overlap.union for overlap in overlaps)
    return {
        "giou": sum(overlap.iou for overlap in overlaps) / len(overlaps) if overlaps else None,
        "ciou": sum(overlap.intersection for overlap in overlaps) / union if union else None,
    }


def _overlap(found: np.ndarray, true: np.ndarray, ignored: np.ndarray, area: np.ndarray) -> Overlap:
    counts = ~ignored
    return Overlap(float(area[found & true & counts].sum()), float(area[(found | true) & counts].sum()))


def _covered(boxes: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(len(rows) - 1, len(columns) - 1) bool: which cells between these edges lie in a box."""
    covered = np.zeros((max(len(rows) - 1, 0), max(len(columns) - 1, 0)), dtype=bool)
    left, right = np.searchsorted(columns, boxes[:, 0]), np.searchsorted(columns, boxes[:, 2])
    top, bottom = np.searchsorted(rows, boxes[:, 1]), np.searchsorted(rows, boxes[:, 3])
    for x0, y0, x1, y1 in zip(left, top, right, bottom, strict=True):
        covered[y0:y1, x0:x1] = True
    return covered
