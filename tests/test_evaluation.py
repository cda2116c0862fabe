"""What `detgpt eval` measures: each number against one worked out by hand, and from a folder to a table."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detgpt.detectors import Grounding
from detgpt.errors import InputError, MissingExtraError
from detgpt.evaluation import evaluate, table
from detgpt.evaluation.data import read_records, truth_by_image
from detgpt.evaluation.metrics import (
    average_precision,
    box_metrics,
    expected_calibration_error,
    matthews_correlation,
    name_metrics,
)
from detgpt.pipeline import DetGPT
from detgpt.reasoners import RawAnswer, Request, TokenSpan
from detgpt.reasoners.scripted import ScriptedReasoner
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


@pytest.mark.parametrize(
    ("confidences", "correct", "error"),
    [
        ([], [], UNDEFINED),
        ([1.0, 1.0], [True, True], 0.0),
        ([0.9, 0.9], [True, False], 0.4),
        ([0.1, 0.95], [True, False], (0.9 + 0.95) / 2),  # two bins, equally full
        ([1.0, 0.95], [False, True], 0.475),  # certainty is of the last bin
        ([0.62, 0.68], [True, False], 0.15),  # one bin: mean confidence 0.65, accuracy 0.5
        ([0.0, 0.6, 0.6, 0.6], [False, True, True, False], 3 / 4 * (2 / 3 - 0.6)),
    ],
)
def test_calibration_error(confidences: list[float], correct: list[bool], error: float | None):
    assert expected_calibration_error(confidences, correct) == (error if error is None else pytest.approx(error))


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
    assert box_metrics(wishes, wishes) == {**perfect, "cgf1": 100.0}


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


# --- a folder ---

MILK, HAMMER, BOAT = [8, 8, 24, 40], [30, 10, 60, 30], [0, 50, 20, 60]
RECORDS: list[dict[str, Any]] = [
    {
        "image": "images/a.png",
        "instruction": "I am thirsty",
        "targets": ["milk"],
        "boxes": [MILK],
        "labels": ["milk"],
        "present": ["milk", "hammer"],
        "kind": "need",
    },
    {
        "image": "images/a.png",
        "instruction": "drive a nail in",
        "targets": ["hammer"],
        "boxes": [HAMMER],
        "labels": ["hammer"],
        "present": ["milk", "hammer"],
        "kind": "direct",
    },
    {
        "image": "images/b.png",
        "instruction": "I want to swim",
        "targets": [],
        "boxes": [],
        "labels": [],
        "present": ["milk"],
        "kind": "need",
    },
]
ANSWERS = {
    "I am thirsty": 'Milk is a drink.\nTargets: ["milk"]',
    "drive a nail in": "I cannot say.",
    "I want to swim": 'Targets: ["boat"]',
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records, or lines as they are, to an evaluation folder with two pictures."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{name}.png")

    def write(*records: dict[str, Any] | str) -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


class ShelfDetector:
    """Knows where things are, and is less sure of some than of others."""

    name = "shelf"

    def __init__(self) -> None:
        self.things = {"milk": [(MILK, 0.9)], "hammer": [(HAMMER, 0.1)], "boat": [(BOAT, 0.8)]}
        self.asked: list[tuple[Any, ...]] = []

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        self.asked.append((list(names), box_threshold, text_threshold, prompting))
        return [self._find(asked, box_threshold) for _, asked in zip(images, names, strict=True)]

    def _find(self, asked: Sequence[str], threshold: float) -> Grounding:
        known = [(*thing, i) for i, name in enumerate(asked) for thing in self.things[name]]
        rows = [row for row in known if row[1] >= threshold]
        return Grounding(
            np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4),
            np.array([score for _, score, _ in rows], np.float32),
            np.array([i for _, _, i in rows], np.int64),
        )


class SureReasoner:
    """Says the same to every wish, each token with probability 0.8."""

    name = "sure"

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        text = 'Targets: ["milk"]'
        return [RawAnswer(text, (TokenSpan(0, len(text), math.log(0.8)),)) for _ in requests]


def model() -> DetGPT:
    return DetGPT(ScriptedReasoner(ANSWERS), ShelfDetector())


def test_each_stage_is_measured(write: Callable[..., Path]):
    result = evaluate(model(), write(*RECORDS))
    assert (result["n"], result["images"]) == (3, 2)
    assert result["reasoner"] == {
        "name": "scripted",
        "f1": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "exact": pytest.approx(1 / 3),
        "rejection": 0.0,
        "hallucination": 0.5,
        "parse_failure": pytest.approx(1 / 3),
        "ece": None,
        "by_kind": {"need": {"n": 2, "f1": pytest.approx(2 / 3)}, "direct": {"n": 1, "f1": 0.0}},
    }
    assert result["detector"].pop("name") == "shelf"
    assert result["detector"] == pytest.approx({"ap": 1.0, "ap50": 1.0})  # the unsure hammer included
    assert result["end_to_end"] == pytest.approx(
        {
            "f1_50": 0.5,
            "f1": 0.5,
            "f1_50_labelled": 0.5,
            "pm_f1": 2 / 3,
            "il_mcc": -0.5,
            "cgf1": -100 / 3,
            "rejection": 0.0,
        }
    )
    assert set(result["seconds"]) == {"reasoner", "detector", "detector_ap"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_confidences_are_checked_against_the_truth(write: Callable[..., Path]):
    folder = write(*RECORDS)
    assert evaluate(DetGPT(SureReasoner(), ShelfDetector()), folder)["reasoner"]["ece"] == pytest.approx(0.8 - 1 / 3)


def test_batches_change_nothing_but_the_progress(write: Callable[..., Path]):
    folder, steps = write(*RECORDS), list[tuple[int, int]]()
    small = evaluate(model(), folder, batch_size=2, progress=lambda done, total: steps.append((done, total)))
    large = evaluate(model(), folder)
    assert {**small, "seconds": None} == {**large, "seconds": None}
    assert steps == [(2, 5), (3, 5), (5, 5)]


def test_the_first_records_only_and_options_of_the_model(write: Callable[..., Path]):
    folder = write(*RECORDS)
    first = evaluate(model(), folder, limit=1)
    assert (first["n"], first["end_to_end"]["f1"], first["end_to_end"]["cgf1"]) == (1, 1.0, None)
    strict = evaluate(model(), folder, limit=1, box_threshold=0.95)
    assert (strict["end_to_end"]["f1"], strict["detector"]["ap"]) == (0.0, pytest.approx(1.0))


def test_the_detector_is_asked_for_the_true_names_and_for_weak_boxes_too(write: Callable[..., Path]):
    detector = ShelfDetector()
    evaluate(DetGPT(ScriptedReasoner(ANSWERS), detector), write(*RECORDS), prompting="joint")
    assert detector.asked[-1] == ([["milk", "hammer"], []], 0.01, 0.01, "joint")


def test_a_detector_that_sees_double_is_forgiven_as_in_the_pipeline(write: Callable[..., Path]):
    detector = ShelfDetector()
    detector.things["milk"] = [(MILK, 0.9), (MILK, 0.8), (HAMMER, 0.7)]
    two = changed(boxes=[MILK, HAMMER], labels=["milk", "milk"])
    result = evaluate(DetGPT(ScriptedReasoner(ANSWERS), detector), write(two))
    assert result["detector"]["ap"] == pytest.approx(1.0)


def test_the_truth_of_a_picture_is_that_of_all_its_wishes(write: Callable[..., Path]):
    again = {**RECORDS[0], "instruction": "something white"}
    first, second = truth_by_image(read_records(write(*RECORDS, again)))
    assert (first.names, first.boxes.tolist()) == (["milk", "hammer"], [MILK, HAMMER])
    assert (second.names, second.boxes.shape) == ([], (0, 4))


def test_a_table_of_splits(write: Callable[..., Path]):
    folder = write(*RECORDS)
    header, rule, row, short = table(
        {"seen": evaluate(model(), folder), "a|b": evaluate(model(), folder, limit=1)}
    ).split("\n")
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(names, [cell.strip() for cell in row.strip("|").split("|")], strict=True))
    assert rule.count("---") == len(names)
    assert (cells["split"], cells["wishes"], cells["exact"], cells["cgF1"]) == ("seen", "3", "33.3", "-33.3")
    assert (cells["AP50"], cells["ECE"]) == ("100.0", "–")
    assert short.startswith("| a\\|b | 1 | 100.0 |")


def changed(**fields: Any) -> dict[str, Any]:
    return {**RECORDS[0], **fields}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a record is a JSON object"),
        ({}, "'image' must be a text"),
        (changed(instruction=" "), "'instruction' must be a text"),
        (changed(kind=3), "'kind' must be a text"),
        (changed(targets="milk"), "'targets' must be a list of names"),
        (changed(present=[1]), "'present' must be a list of names"),
        (changed(boxes=[[8, 8, 24]]), "x0 < x1"),
        (changed(boxes=[[24, 8, 8, 40]]), "x0 < x1"),
        (changed(boxes=[[8, 8, "24", 40]]), "x0 < x1"),
        (changed(boxes=[[8, 8, float("nan"), 40]]), "x0 < x1"),
        (changed(boxes=[[8, 8, 10**400, 40]]), "x0 < x1"),
        (changed(boxes=None), "x0 < x1"),
        (changed(boxes=[MILK, HAMMER]), "2 boxes but 1 labels"),
        (changed(labels=["hammer"]), r"check \['hammer', 'milk'\]"),
        (changed(present=["hammer"]), r"targets \['milk'\] are not in 'present'"),
        (changed(image="images/c.png"), "there is no image .*c.png"),
    ],
)
def test_a_wrong_record_is_named_by_its_line(write: Callable[..., Path], line: dict[str, Any] | str, message: str):
    folder = write(RECORDS[2], "", line)
    with pytest.raises(InputError, match=rf"data\.jsonl, line 3: .*{message}"):
        evaluate(model(), folder)


def test_a_folder_without_data_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read .*data\.jsonl"):
        evaluate(model(), tmp_path)
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        evaluate(model(), tmp_path)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"batch_size": 0}, {"box_treshold": 0.5}])
def test_wrong_arguments_are_errors(write: Callable[..., Path], wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        evaluate(model(), write(*RECORDS), **wrong)


@pytest.mark.parametrize(("module", "package"), [("scipy.optimize", "scipy"), ("pycocotools.coco", "pycocotools")])
def test_a_missing_extra_shows_before_the_first_answer(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, module: str, package: str
):
    monkeypatch.setitem(sys.modules, module, None)
    nothing_asked = DetGPT(ScriptedReasoner(lambda request: pytest.fail("asked")), ShelfDetector())
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*detgpt\[eval\]"):
        evaluate(nothing_asked, write(*RECORDS))


def test_importing_it_loads_nothing_heavy():
    code = "import sys, detgpt.evaluation; print(*{'torch', 'scipy', 'pycocotools'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
