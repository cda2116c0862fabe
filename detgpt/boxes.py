"""Boxes: conversion, IoU, suppression. Pure numpy.

Every function that returns a `Grounding` returns it in one order: descending score, ties by name index,
then as they came. The same input therefore always gives the same output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detgpt.detectors import Grounding


def cxcywh_norm_to_xyxy(boxes: np.ndarray, image_wh: tuple[int, int]) -> np.ndarray:
    """Centre and size in fractions of the image, (N, 4) → corners in its pixels, (N, 4) float32."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return (corners * np.tile(image_wh, 2)).astype(np.float32)


def intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area that every box of `a` (N, 4) shares with every box of `b` (M, 4), xyxy → (N, M)."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.clip(bottom_right - top_left, 0, None), axis=2)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of `a` (N, 4) with every box of `b` (M, 4), xyxy → (N, M)."""
    intersection = intersections(a, b)
    union = _areas(a)[:, None] + _areas(b)[None, :] - intersection
    # Two boxes without area have no union; they overlap nothing.
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def coverage_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much of every box of `a` (N, 4) lies in every box of `b` (M, 4), as a fraction of its area → (N, M)."""
    intersection = intersections(a, b)
    areas = np.broadcast_to(_areas(a)[:, None], intersection.shape)
    return np.divide(intersection, areas, out=np.zeros_like(intersection), where=areas > 0)


def concatenate(groundings: Sequence[Grounding]) -> Grounding:
    """Join groundings that index the same names, in the module's order; nothing to join is an empty one."""
    return _ordered(
        Grounding(
            boxes=np.concatenate([np.empty((0, 4), np.float32), *(g.boxes for g in groundings)]),
            scores=np.concatenate([np.empty(0, np.float32), *(g.scores for g in groundings)]),
            name_index=np.concatenate([np.empty(0, np.int64), *(g.name_index for g in groundings)]),
        )
    )


def within_image(grounding: Grounding, image_wh: tuple[int, int]) -> Grounding:
    """Clip the boxes to the image and drop those of which nothing, or only a line, is left."""
    limit = np.tile(np.asarray(image_wh, np.float32), 2)
    clipped = Grounding(np.clip(grounding.boxes, 0, limit), grounding.scores, grounding.name_index)
    return _ordered(_select(clipped, _areas(clipped.boxes) > 0))


def nms_per_target(grounding: Grounding, iou_threshold: float = 0.7) -> Grounding:
    """Greedy non-maximum suppression inside each name: of boxes over `iou_threshold` the best stays."""
    return _suppress(grounding, iou_threshold, same_name=True)


def one_target_per_box(grounding: Grounding, iou_threshold: float = 0.9) -> Grounding:
    """Let no two names share a box: of near-identical boxes of different names the best-scored stays."""
    return _suppress(grounding, iou_threshold, same_name=False)


def _suppress(grounding: Grounding, iou_threshold: float, same_name: bool) -> Grounding:
    """Go down the scores; a box falls to a better one that stays and whose name is, or is not, the same."""
    grounding = _ordered(grounding)
    boxes, names = grounding.boxes, grounding.name_index
    kept = np.zeros(len(boxes), dtype=bool)
    for i in range(len(boxes)):
        rivals = boxes[kept & ((names == names[i]) == same_name)]
        kept[i] = not (iou_matrix(boxes[i : i + 1], rivals) > iou_threshold).any()
    return _select(grounding, kept)


def _ordered(grounding: Grounding) -> Grounding:
    # lexsort is stable and sorts by its last key first.
    return _select(grounding, np.lexsort((grounding.name_index, -grounding.scores)))


def _select(grounding: Grounding, index: np.ndarray) -> Grounding:
    return Grounding(grounding.boxes[index], grounding.scores[index], grounding.name_index[index])


def _areas(boxes: np.ndarray) -> np.ndarray:
    # A box turned inside out has no area, rather than the positive product of two negative sides.
    return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
