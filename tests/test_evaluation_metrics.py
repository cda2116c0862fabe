"""Each number that `detgpt eval` gives against one worked out by hand, or by the library that defines it."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detgpt.evaluation.data import ImageTruth
from detgpt.evaluation.metrics import (
    average_precision,
    box_metrics,
    matthews_correlation,
    name_metrics,
    outside_ignored,
)
from detgpt.results import Detections, Target

UNDEFINED = None


def boxed(*boxes: Sequence[float], labels: Sequence[str] = (), scores: Sequence[float] = ()) -> Detections:
    """Boxes of one picture, all of a cup and certain unless said otherwise."""
    labels = tuple(labels) or ("cup",) * len(boxes)
    targets = tuple(map(Target, dict.fromkeys(labels)))
    scores = np.array(scores or np.ones(len(boxes)), np.float32)
    return Detections(np.array(boxes, np.float32), scores, labels, targets, image_wh=(200, 200))


# --- names ---


def test_names_are_counted_over_all_wishes():
    named = [["cup", "knife"], [], None, ["boat"]]  # one right and one wrong, "nothing", unreadable, a ghost
    true = [["cup", "milk", "jug"], [], ["hammer"], []]
    present = [["cup", "milk", "jug", "knife"], ["cup"], ["hammer"], ["cup"]]
    assert name_metrics(named, true, present) == pytest.approx(
        {
            "f1": 2 * 1 / (3 + 4),
            "precision": 1 / 3,
            "recall": 1 / 4,
            "exact": 1 / 4,
            "rejection": 1 / 2,
            "hallucination": 1 / 3,
            "parse_failure": 1 / 4,
        }
    )


def test_naming_exactly_the_targets_is_perfect_whatever_case_order_and_repetition():
    metrics = name_metrics([["Milk", "cup", "milk"], []], [["cup", "milk"], []], [["CUP", "milk"], ["cup"]])
    perfect = dict.fromkeys(("f1", "precision", "recall", "exact", "rejection"), 1.0)
    assert metrics == {**perfect, "hallucination": 0.0, "parse_failure": 0.0}


def test_an_unreadable_answer_is_no_rejection():
    metrics = name_metrics([None], [[]], [["cup"]])
    assert (metrics["rejection"], metrics["exact"], metrics["parse_failure"]) == (0.0, 0.0, 1.0)


def test_where_nothing_is_named_or_wanted_the_shares_are_undefined():
    metrics = name_metrics([[]], [[]], [["cup"]])
    assert [metrics[key] for key in ("f1", "precision", "recall", "hallucination")] == [UNDEFINED] * 4
    assert name_metrics([["cup"]], [["cup"]], [["cup"]])["rejection"] is UNDEFINED


# --- boxes ---

SQUARE = (0, 0, 10, 10)
LOW_PART = (0, 0, 10, 6.2)  # IoU 0.62 with SQUARE: a hit at 0.50, 0.55 and 0.60
ELSEWHERE = (100, 100, 110, 110)


def test_cgf1_of_four_wishes():
    found = [boxed(SQUARE), boxed(LOW_PART), boxed(), boxed(ELSEWHERE)]
    truth = [boxed(SQUARE), boxed(SQUARE, ELSEWHERE), boxed(), boxed()]
    pm_f1 = (3 * (2 * 2 / 5) + 7 * (2 * 1 / 5)) / 10  # 2 boxes found of 3, on the two wishes with a target
    il_mcc = (2 * 1 - 1 * 0) / math.sqrt(3 * 2 * 2 * 1)
    assert box_metrics(found, truth) == pytest.approx(
        {
            "f1_50": 4 / 6,
            "f1": (3 * 4 / 6 + 7 * 2 / 6) / 10,
            "f1_50_labelled": 4 / 6,
            "acc_50": 1.0,  # the one wish with exactly one true box
            "ece": 1 / 3,  # three boxes of score 1, two of them right
            "pm_f1": pm_f1,
            "il_mcc": il_mcc,
            "cgf1": 100 * pm_f1 * il_mcc,
            "rejection": 1 / 2,
        }
    )


@pytest.mark.parametrize(("height", "f1"), [(4.9, 0.0), (5.1, 0.1), (9.2, 0.9), (9.6, 1.0)])
def test_a_box_counts_at_each_of_ten_ious_that_it_reaches(height: float, f1: float):
    assert box_metrics([boxed((0, 0, 10, height))], [boxed(SQUARE)])["f1"] == pytest.approx(f1)


def test_the_right_boxes_and_nothing_when_nothing_is_perfect():
    wishes = [boxed(SQUARE, ELSEWHERE), boxed()]
    perfect = dict.fromkeys(("f1_50", "f1", "f1_50_labelled", "pm_f1", "il_mcc", "rejection"), 1.0)
    assert box_metrics(wishes, wishes) == {**perfect, "acc_50": None, "ece": 0.0, "cgf1": 100.0}


@pytest.mark.parametrize(
    ("height", "scores", "accuracy"),
    [
        (5.0, [0.9, 0.1], 0.0),  # an IoU of exactly one half is not over it
        (5.1, [0.9, 0.1], 1.0),
        (10.0, [0.1, 0.9], 0.0),  # the better-scored one is elsewhere
    ],
)
def test_acc_at_half_looks_at_the_best_scored_box_only(height: float, scores: list[float], accuracy: float):
    found = boxed((0, 0, 10, height), ELSEWHERE, scores=scores)
    assert box_metrics([found], [boxed(SQUARE)])["acc_50"] == accuracy


def test_acc_at_half_counts_wishes_with_one_true_box():
    found = [boxed(SQUARE), boxed(), boxed(ELSEWHERE), boxed(SQUARE)]
    truth = [boxed(SQUARE), boxed(SQUARE), boxed(SQUARE, ELSEWHERE), boxed()]
    assert box_metrics(found, truth)["acc_50"] == 1 / 2


def test_scores_are_calibrated_where_they_are_the_share_of_right_boxes():
    found = [boxed(SQUARE, scores=[0.75])] * 3 + [boxed(ELSEWHERE, scores=[0.75])]
    assert box_metrics(found, [boxed(SQUARE)] * 4)["ece"] == pytest.approx(0.0)
    assert box_metrics(found[:2], [boxed(SQUARE)] * 2)["ece"] == pytest.approx(0.25)


def test_a_box_in_a_crowd_is_neither_right_nor_wrong():
    crowd = ImageTruth(Path(), np.array([SQUARE], float), ("cup",), np.array([(50, 50, 150, 150)], float), ("cup",))
    inside, outside, across = (60, 60, 70, 70), (160, 160, 170, 170), (140, 50, 162, 60)  # 10 of 22 columns lie in it
    found = boxed(SQUARE, inside, outside, across, scores=[0.9, 0.8, 0.7, 0.6])
    assert outside_ignored(found, crowd).boxes.tolist() == [list(SQUARE), list(outside), list(across)]
    with_two = replace(crowd, boxes=np.array([SQUARE, inside], float), labels=("cup", "cup"))
    assert len(outside_ignored(found, with_two).boxes) == 4, "a thing that is known by itself counts, even in a crowd"


def test_a_crowd_does_not_lower_the_average_precision():
    crowd = ImageTruth(Path(), np.array([SQUARE], float), ("cup",), np.array([(50, 50, 150, 150)], float), ("cup",))
    found = boxed((60, 60, 70, 70), SQUARE, scores=[0.9, 0.8])
    assert average_precision([found], [crowd])["ap"] == pytest.approx(1.0)
    assert average_precision([found], [boxed(SQUARE)])["ap"] == pytest.approx(0.5)


def test_a_second_box_on_the_same_thing_is_a_false_one():
    assert box_metrics([boxed(SQUARE, SQUARE)], [boxed(SQUARE)])["f1_50"] == pytest.approx(2 / 3)


def test_matching_finds_the_pairs_that_a_greedy_choice_would_miss():
    # In a row of equal boxes the second one predicted is closest to the wrong truth.
    truth = boxed((0, 0, 10, 10), (4, 0, 14, 10))
    found = boxed((2.5, 0, 12.5, 10), (6.5, 0, 16.5, 10))  # IoU 0.6 and 0.739 with the two; 0.6 with the last
    assert box_metrics([found], [truth])["f1_50"] == 1.0


def test_labels_count_only_in_the_labelled_variant():
    truth = boxed(SQUARE, ELSEWHERE, labels=["cup", "milk"])
    found = boxed(SQUARE, ELSEWHERE, labels=["Cup", "bottle"])
    metrics = box_metrics([found], [truth])
    assert (metrics["f1_50"], metrics["f1_50_labelled"]) == (1.0, 0.5)


def test_without_boxes_on_either_side_there_is_no_f1():
    metrics = box_metrics([boxed()], [boxed()])
    assert metrics == {**dict.fromkeys(metrics), "rejection": 1.0}


def test_boxes_for_every_wish_correlate_with_nothing():
    metrics = box_metrics([boxed(SQUARE), boxed(SQUARE)], [boxed(SQUARE), boxed()])
    assert (metrics["pm_f1"], metrics["il_mcc"], metrics["cgf1"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("predicted", "true", "correlation"),
    [
        ([1, 0, 1, 0], [1, 0, 1, 0], 1.0),
        ([0, 1], [1, 0], -1.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.0),
        ([0, 0], [1, 0], 0.0),
        ([1, 0], [1, 1], UNDEFINED),
        ([], [], UNDEFINED),
    ],
)
def test_matthews_correlation(predicted: list[int], true: list[int], correlation: float | None):
    assert matthews_correlation(np.array(predicted, bool), np.array(true, bool)) == correlation


# --- average precision ---


def test_average_precision_of_a_ranking():
    truth = [boxed(SQUARE), boxed(SQUARE)]
    found = [boxed(SQUARE, ELSEWHERE, scores=[0.9, 0.8]), boxed(SQUARE, scores=[0.7])]
    # Precision 1 up to recall 0.5, then 2/3; COCO reads it at 101 recalls, 51 of them up to 0.5.
    expected = (51 + 50 * 2 / 3) / 101
    assert average_precision(found, truth) == pytest.approx({"ap": expected, "ap50": expected})


@pytest.mark.parametrize(
    ("found", "truth", "ap", "ap50"),
    [
        (boxed(SQUARE), boxed(SQUARE), 1.0, 1.0),
        (boxed(LOW_PART), boxed(SQUARE), 0.3, 1.0),
        (boxed(), boxed(SQUARE), 0.0, 0.0),
        (boxed(SQUARE), boxed(), UNDEFINED, UNDEFINED),
        (boxed(SQUARE, labels=["milk"]), boxed(SQUARE), 0.0, 0.0),
    ],
    ids=["perfect", "loose", "nothing found", "nothing to find", "another name"],
)
def test_average_precision_at_its_edges(found: Detections, truth: Detections, ap: float, ap50: float):
    assert average_precision([found], [truth]) == pytest.approx({"ap": ap, "ap50": ap50})


def test_average_precision_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    names = ["cup", "milk", "hammer"]
    truth, found = [], []
    for _ in range(8):
        corners = rng.uniform(0, 100, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 60, (6, 2))], axis=1)
        labels = rng.choice(names, 6).tolist()
        moved = np.sort((boxes + rng.normal(0, 3, boxes.shape)).reshape(6, 2, 2), axis=1).reshape(6, 4)
        truth.append(boxed(*boxes, labels=labels))
        found.append(boxed(*moved, labels=labels, scores=rng.uniform(0.01, 1, 6).tolist()))
    ours = average_precision(found, truth)
    ap, ap50 = by_pycocotools(found, truth, names)
    assert 0.1 < ap < ap50 < 1
    assert ours == pytest.approx({"ap": ap, "ap50": ap50}, abs=1e-6)


def by_pycocotools(found: list[Detections], truth: list[Detections], names: list[str]) -> tuple[float, float]:
    """AP and AP50 the documented way: COCO JSON through `loadRes`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides: list[dict[str, list[Any]]] = []
    for side in (truth, found):
        joined: dict[str, list[Any]] = {"images": [], "annotations": []}
        for image_id, result in enumerate(side, start=1):
            first = len(joined["annotations"]) + 1
            part = result.to_coco(image_id, categories=names, first_annotation_id=first)
            joined = {**part, **{key: joined[key] + part[key] for key in ("images", "annotations")}}
        sides.append(joined)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = sides[0]
        known.createIndex()
        scored = COCOeval(known, known.loadRes(sides[1]["annotations"]), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return float(scored.stats[0]), float(scored.stats[1])
