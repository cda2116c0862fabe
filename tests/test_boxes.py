"""Boxes: conversion, overlap, and which of several overlapping boxes a user gets to see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detgpt.boxes import (
    concatenate,
    coverage_matrix,
    cxcywh_norm_to_xyxy,
    iou_matrix,
    nms_per_target,
    one_target_per_box,
    within_image,
)
from detgpt.detectors import Grounding

CUP, BOTTLE = 0, 1


def grounding(*rows: tuple[list[float], float, int]) -> Grounding:
    boxes, scores, names = zip(*rows, strict=True) if rows else ((), (), ())
    return Grounding(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(names, np.int64)
    )


def found(result: Grounding) -> list[tuple[list[float], float, int]]:
    assert (result.boxes.dtype, result.scores.dtype, result.name_index.dtype) == (
        np.float32,
        np.float32,
        np.int64,
    )
    rows = zip(result.boxes.tolist(), result.scores.tolist(), result.name_index.tolist(), strict=True)
    return [(box, round(score, 3), name) for box, score, name in rows]


@st.composite
def groundings(draw: st.DrawFn) -> Grounding:
    corner, size = st.integers(0, 20), st.integers(1, 20)
    row = st.tuples(corner, corner, size, size, st.integers(0, 10), st.integers(0, 2))
    rows = draw(st.lists(row, max_size=8))
    return grounding(*(([x, y, x + w, y + h], score / 10, name) for x, y, w, h, score, name in rows))


def test_a_box_in_fractions_lands_on_the_pixels_of_a_wide_image():
    boxes = np.array([[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 0.5, 0.1]], np.float32)
    expected = [[0, 0, 200, 100], [0, 70, 100, 80]]
    np.testing.assert_allclose(cxcywh_norm_to_xyxy(boxes, (200, 100)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "iou"),
    [
        ([0, 0, 10, 10], 1.0),  # itself
        ([5, 0, 15, 10], 1 / 3),  # half of it
        ([10, 0, 20, 10], 0.0),  # touching
        ([2, 2, 4, 4], 0.04),  # inside
        ([3, 3, 3, 9], 0.0),  # a line has no area
        ([9, 9, 1, 1], 0.0),  # inside out
    ],
)
def test_overlap_of_a_square_with(other, iou):
    square = np.array([[0, 0, 10, 10]], np.float32)
    assert iou_matrix(square, np.array([other], np.float32)) == pytest.approx(iou)


def test_coverage_is_the_share_of_the_first_box() -> None:
    small, large, line = [0, 0, 2, 2], [1, 0, 11, 10], [1, 1, 1, 5]
    boxes = np.array([small, large, line], np.float32)
    expected = [[1, 0.5, 0], [0.02, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(coverage_matrix(boxes, boxes), expected, rtol=1e-6)


def test_two_boxes_without_area_overlap_by_zero_and_not_by_nan():
    point = np.array([[3, 3, 3, 3]], np.float32)
    assert iou_matrix(point, point).tolist() == [[0.0]]


def test_duplicates_of_one_target_leave_the_best_box():
    result = nms_per_target(
        grounding(([0, 0, 10, 10], 0.5, CUP), ([0, 0, 10, 11], 0.9, CUP), ([50, 50, 60, 60], 0.3, CUP))
    )
    assert found(result) == [([0, 0, 10, 11], 0.9, CUP), ([50, 50, 60, 60], 0.3, CUP)]


def test_suppression_leaves_another_target_on_the_same_spot_alone():
    result = nms_per_target(grounding(([0, 0, 10, 10], 0.9, CUP), ([0, 0, 10, 10], 0.5, BOTTLE)))
    assert result.name_index.tolist() == [CUP, BOTTLE]


def test_a_suppressed_box_suppresses_no_other():
    # The middle box falls to the best; the last overlaps only the middle one and stays.
    chain = grounding(([0, 0, 10, 10], 0.9, CUP), ([4, 0, 14, 10], 0.8, CUP), ([8, 0, 18, 10], 0.7, CUP))
    assert nms_per_target(chain, 0.3).boxes[:, 0].tolist() == [0, 8]


def test_two_targets_do_not_share_a_box():
    shared = grounding(([0, 0, 10, 10], 0.5, CUP), ([0, 0, 10, 10.2], 0.8, BOTTLE), ([0, 0, 10, 10.1], 0.7, BOTTLE))
    # The cup goes to the better bottle; the two bottles are not this function's business.
    assert one_target_per_box(shared).name_index.tolist() == [BOTTLE, BOTTLE]


def test_targets_that_only_overlap_keep_their_boxes():
    side_by_side = grounding(([0, 0, 10, 10], 0.9, CUP), ([2, 0, 12, 10], 0.8, BOTTLE))
    assert len(one_target_per_box(side_by_side).boxes) == 2


def test_boxes_are_cut_at_the_image_and_those_outside_go():
    result = within_image(
        grounding(
            ([-5, -5, 10, 10], 0.9, CUP),
            ([90, 40, 200, 80], 0.8, CUP),
            ([100, 0, 120, 10], 0.7, CUP),  # outside
            ([7, 7, 7, 20], 0.6, CUP),  # a line
            ([30, 30, 20, 20], 0.5, CUP),  # inside out
        ),
        (100, 50),
    )
    assert found(result) == [([0, 0, 10, 10], 0.9, CUP), ([90, 40, 100, 50], 0.8, CUP)]


def test_the_order_is_by_score_and_ties_by_name():
    a, b, c = ([0, 0, 9, 9], 0.5, BOTTLE), ([20, 0, 29, 9], 0.5, CUP), ([40, 0, 49, 9], 0.7, BOTTLE)
    assert found(concatenate([grounding(a), grounding(b, c)])) == [found(grounding(r))[0] for r in (c, b, a)]


def test_nothing_found_stays_nothing():
    for empty in (concatenate([]), nms_per_target(grounding()), one_target_per_box(grounding())):
        assert found(empty) == []
        assert empty.boxes.shape == (0, 4)


@settings(deadline=None)  # the machine may be busy
@given(groundings(), st.sampled_from([0.0, 0.3, 0.7]))
def test_after_suppression_no_pair_of_a_name_overlaps_too_much_and_every_loss_has_a_reason(asked, threshold):
    kept = nms_per_target(asked, threshold)
    overlap = iou_matrix(kept.boxes, kept.boxes) > threshold
    same = kept.name_index[:, None] == kept.name_index[None, :]
    assert not (overlap & same & ~np.eye(len(kept.boxes), dtype=bool)).any()
    for box, score, name in zip(asked.boxes, asked.scores, asked.name_index, strict=True):
        better = (kept.name_index == name) & (kept.scores >= score)
        lost = box.tolist() not in kept.boxes.tolist()
        assert not lost or (iou_matrix(box[None], kept.boxes[better]) > threshold).any()


@settings(deadline=None)  # the machine may be busy
@given(groundings())
def test_suppressing_twice_changes_nothing(asked):
    for suppress in (nms_per_target, one_target_per_box):
        once = suppress(asked)
        assert found(suppress(once)) == found(once)
