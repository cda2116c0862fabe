"""What `detgpt eval` measures, from a folder to a table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detgpt.detectors import Grounding
from detgpt.errors import InputError, MissingExtraError
from detgpt.evaluation import evaluate, table
from detgpt.evaluation.data import Dataset, truth_by_image
from detgpt.evaluation.readers import read_dataset
from detgpt.pipeline import DetGPT
from detgpt.reasoners import RawAnswer, Request, TokenSpan
from detgpt.reasoners.scripted import ScriptedReasoner

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
    kinds = result["end_to_end"].pop("by_kind")
    assert {kind: (numbers["n"], numbers["f1_50"]) for kind, numbers in kinds.items()} == {
        "need": (2, pytest.approx(2 / 3)),
        "direct": (1, 0.0),
    }
    assert result["end_to_end"] == pytest.approx(
        {
            "f1_50": 0.5,
            "f1": 0.5,
            "f1_50_labelled": 0.5,
            "acc_50": 0.5,
            "ece": 0.85 - 0.5,  # 0.9 right and 0.8 wrong: as float32 both in one bin
            "pm_f1": 2 / 3,
            "il_mcc": -0.5,
            "cgf1": -100 / 3,
            "rejection": 0.0,
            "box_giou": 1 / 3,
            "box_ciou": 512 / (512 + 600 + 200),
        }
    )
    assert set(result["seconds"]) == {"reasoner", "detector", "detector_ap"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert json.dumps(result, allow_nan=False)


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
    first, second = truth_by_image(read_dataset(write(*RECORDS, again)).records)
    assert (first.names, first.boxes.tolist()) == (["milk", "hammer"], [MILK, HAMMER])
    assert (second.names, second.boxes.shape) == ([], (0, 4))


def test_a_synonym_is_as_right_as_the_target(write: Callable[..., Path]):
    folder = write({**RECORDS[0], "synonyms": {"milk": ["moo juice"]}})
    reasoner = ScriptedReasoner(['Targets: ["Moo Juice"]'])
    detector = ShelfDetector()
    detector.things["Moo Juice"] = [(MILK, 0.9)]
    numbers = evaluate(DetGPT(reasoner, detector), folder)["reasoner"]
    assert (numbers["f1"], numbers["exact"], numbers["hallucination"]) == (1.0, 1.0, 0.0)


def test_where_names_are_not_judged_boxes_still_are(write: Callable[..., Path]):
    records = read_dataset(write(*RECORDS)).records
    result = evaluate(model(), Dataset(tuple(replace(record, named=False) for record in records)))
    named = evaluate(model(), Dataset(records))
    reasoner = result["reasoner"]
    known = {key for key, value in reasoner.items() if value is not None}
    assert known == {"name", "rejection", "parse_failure", "by_kind"}
    assert (reasoner["rejection"], reasoner["parse_failure"]) == (0.0, pytest.approx(1 / 3))
    assert result["detector"] == {"name": "shelf", "ap": None, "ap50": None}
    assert (result["images"], result["end_to_end"]) == (2, named["end_to_end"])
    assert "names F1" not in table({"a": result})


def test_every_wish_is_given_out_with_its_result(write: Callable[..., Path]):
    seen: list[tuple[Any, Any]] = []
    evaluate(model(), write(*RECORDS), batch_size=2, each=lambda record, result: seen.append((record, result)))
    assert [record.instruction for record, _ in seen] == [record["instruction"] for record in RECORDS]
    assert [result.labels for _, result in seen] == [("milk",), (), ("boat",)]
    assert all(record.where.endswith(f"data.jsonl, line {n}") for n, (record, _) in enumerate(seen, start=1))


def test_masks_are_measured_where_there_are_outlines(write: Callable[..., Path]):
    x0, y0, x1, y1 = MILK
    outline = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    with_outline = {**RECORDS[0], "segmentations": [outline]}
    folder = write(with_outline, RECORDS[1], {**RECORDS[2], "segmentations": []})

    class UpperHalf:
        name = "upper half"

        def segment(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
            masks = np.zeros((len(boxes), image.height, image.width), bool)
            for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
                mask[top : (top + bottom) // 2, left:right] = True
            return masks

    outlining = DetGPT(ScriptedReasoner(ANSWERS), ShelfDetector(), segmenter=UpperHalf())
    numbers = evaluate(outlining, folder, masks=True)["masks"]
    assert numbers == {"n": 2, "giou": 1 / 4, "ciou": 256 / (512 + 20 * 5)}
    assert "masks" not in evaluate(model(), folder)


def test_a_table_of_splits(write: Callable[..., Path]):
    folder = write(*RECORDS)
    header, rule, row, short = table(
        {"seen": evaluate(model(), folder), "a|b": evaluate(model(), folder, limit=1)}
    ).split("\n")
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(names, [cell.strip() for cell in row.strip("|").split("|")], strict=True))
    assert rule.count("---") == len(names)
    assert (cells["split"], cells["wishes"], cells["exact"], cells["cgF1"]) == ("seen", "3", "33.3", "-33.3")
    assert (cells["AP50"], cells["box gIoU"]) == ("100.0", "33.3")
    assert short.startswith("| a\\|b | 1 | 100.0 |") and short.endswith("| – | – |"), "it has no wish without a target"
    assert not {"ECE", "gIoU", "cIoU"} & set(names), "a number that nobody has gets no column"


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
    with pytest.raises(InputError, match=r"no known evaluation set \(a folder with data\.jsonl"):
        evaluate(model(), tmp_path)
    with pytest.raises(InputError, match=r"there is no .*elsewhere"):
        evaluate(model(), tmp_path / "elsewhere")
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
