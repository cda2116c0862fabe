"""What a result promises: it fits together, cannot change, and leaves in every format without loss."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from detgpt.errors import InputError, MissingExtraError
from detgpt.results import Detections, Target

TARGETS = (Target("cup", 0.9, found=True), Target("spoon"), Target("bottle", None, found=True))


def kitchen(**changes: object) -> Detections:
    fields: dict = {
        "boxes": [[10.123, 20, 50, 60], [0, 0, 30, 90], [60.5, 5.25, 99, 40]],
        "scores": [0.91, 0.5, 0.3],
        "labels": ["cup", "bottle", "cup"],
        "targets": TARGETS,
        "reasoning": "A cup holds tea: お茶.",
        "answer": "A cup holds tea.\n[cup, spoon, bottle]",
        "instruction": "I want tea",
        "image_wh": (100, 90),
    }
    return Detections(**{**fields, **changes})


def nothing(**changes: object) -> Detections:
    return kitchen(boxes=[], scores=[], labels=[], targets=[], **changes)


def test_arrays_are_float32_read_only_copies() -> None:
    boxes = np.array([[1, 2, 3, 4]])
    result = kitchen(boxes=boxes, scores=[0.5], labels=["cup"])
    boxes[:] = 0
    assert result.boxes.dtype == result.scores.dtype == np.float32
    assert result.boxes.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="read-only"):
        result.boxes[0, 0] = 9
    with pytest.raises(AttributeError):
        result.reasoning = "other"  # type: ignore[misc]


def test_a_pickled_result_is_equal_and_still_read_only() -> None:
    result = pickle.loads(pickle.dumps(kitchen()))
    assert result == kitchen()
    assert not result.boxes.flags.writeable
    assert not result.scores.flags.writeable


def test_length_truth_and_iteration() -> None:
    result = kitchen()
    assert len(result) == 3
    assert result
    assert not nothing()
    assert nothing().boxes.shape == (0, 4)
    box, score, label = next(iter(result))
    assert box.tolist() == result.boxes[0].tolist()
    assert (round(score, 2), label) == (0.91, "cup")


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": [0.9, 0.5, 0.31]},
        {"boxes": [[10, 20, 50, 60], [0, 0, 30, 90], [60.5, 5.25, 99, 40]]},
        {"labels": ["cup", "cup", "cup"]},
        {"targets": (*TARGETS, Target("fork"))},
        {"problem": "no list"},
        {"instruction": None},
        {"image_wh": (100, 91)},
    ],
)
def test_equality_sees_every_part(changes: dict) -> None:
    assert kitchen() == kitchen()
    assert kitchen() != kitchen(**changes)


def test_equality_leaves_the_image_out_and_survives_strangers() -> None:
    assert kitchen(image=Image.new("RGB", (100, 90))) == kitchen()
    assert kitchen() != "kitchen"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [1, 2, 3, 4]}, r"boxes must have shape \(N, 4\)"),
        ({"boxes": [[1, 2, 3]] * 3}, r"boxes must have shape \(N, 4\)"),
        ({"scores": [[0.1], [0.2], [0.3]]}, r"scores must have shape \(N,\)"),
        ({"scores": [0.1, 0.2]}, "equally many, got 3, 2 and 3"),
        ({"scores": [0.1, 0.2, 1.5]}, r"scores must lie in \[0, 1\]"),
        ({"scores": [0.1, 0.2, float("nan")]}, "scores must be finite"),
        ({"boxes": [[50, 20, 10, 60]] * 3}, "x0 <= x1"),
        ({"boxes": [[0, 0, float("inf"), 1]] * 3}, "boxes must be finite"),
        ({"labels": ["cup", "bottle", "fork"]}, "fork"),
        ({"targets": (*TARGETS, Target("cup"))}, "must differ"),
        ({"image_wh": (0, 0)}, "give an image or its"),
        ({"image": Image.new("RGB", (5, 5))}, r"the image is \(5, 5\)"),
    ],
)
def test_parts_that_do_not_fit_together_raise(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kitchen(**changes)


def test_the_size_comes_from_the_image() -> None:
    assert nothing(image=Image.new("RGB", (7, 5)), image_wh=(0, 0)).image_wh == (7, 5)


def test_repr_is_short_and_says_what_was_found() -> None:
    assert repr(kitchen()) == ("Detections(2 'cup', 1 'bottle', 1 of 3 targets not found, image_wh=(100, 90))")
    assert len(repr(nothing(problem="no list " * 500))) < 120


def test_json_round_trip() -> None:
    once = Detections.from_json(kitchen(problem="no list").to_json(indent=2))
    assert once.boxes[0].tolist() == pytest.approx([10.12, 20, 50, 60])
    assert Detections.from_json(once.to_json()) == once
    assert Detections.from_dict(once.to_dict()) == once
    assert (once.targets, once.reasoning, once.problem) == (TARGETS, kitchen().reasoning, "no list")
    assert Detections.from_json(nothing().to_json()) == nothing()


def test_json_is_plain_short_and_readable() -> None:
    text = kitchen().to_json()
    first = json.loads(text)["detections"][0]
    assert first == {"label": "cup", "score": 0.91, "xyxy": [10.12, 20.0, 50.0, 60.0]}
    assert "お茶" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a saved result"),
        ("[]", "not a saved result"),
        ("{}", "'detections' is missing"),
        (kitchen().to_json().replace('"xyxy": [10.12, ', '"xyxy": ['), "not a saved result"),
        (kitchen().to_json().replace('"found"', '"seen"'), "seen"),
        (kitchen().to_json().replace("0.91", "NaN"), "finite"),
    ],
)
def test_json_of_something_else_raises(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Detections.from_json(text)


def test_coco_has_xywh_boxes_and_categories_in_target_order() -> None:
    coco = kitchen().to_coco(image_id=7, file_name="kitchen.jpg")
    assert coco["images"] == [{"id": 7, "width": 100, "height": 90, "file_name": "kitchen.jpg"}]
    assert coco["categories"] == [
        {"id": 1, "name": "cup"},
        {"id": 2, "name": "spoon"},
        {"id": 3, "name": "bottle"},
    ]
    first, second, _ = coco["annotations"]
    where = {"bbox": [10.12, 20, 39.88, 40], "area": 1595.2, "iscrowd": 0}
    assert first == {"id": 1, "image_id": 7, "category_id": 1, "score": 0.91, **where}
    assert (second["id"], second["category_id"], second["bbox"]) == (2, 3, [0, 0, 30, 90])
    json.dumps(coco)


def test_coco_results_of_two_images_can_be_joined() -> None:
    names = ["bottle", "cup"]
    first = kitchen().to_coco(1, categories=names)
    second = kitchen().to_coco(2, categories=names, first_annotation_id=len(first["annotations"]) + 1)
    assert [row["id"] for row in first["annotations"] + second["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [row["category_id"] for row in second["annotations"]] == [2, 1, 2]
    with pytest.raises(InputError, match="bottle"):
        kitchen().to_coco(categories=["cup"])


def test_supervision_gets_boxes_scores_and_names() -> None:
    pytest.importorskip("supervision")
    result = kitchen()
    theirs = result.to_supervision()
    np.testing.assert_array_equal(theirs.xyxy, result.boxes)
    np.testing.assert_array_equal(theirs.confidence, result.scores)
    assert theirs.class_id.tolist() == [0, 2, 0]
    if hasattr(theirs, "data"):
        assert theirs.data["class_name"].tolist() == ["cup", "bottle", "cup"]
    theirs.xyxy[:] = 0  # theirs to change
    assert len(nothing().to_supervision()) == 0


def test_pandas_gets_one_row_per_box() -> None:
    pytest.importorskip("pandas")
    table = kitchen().to_pandas()
    assert table.columns.tolist() == ["label", "score", "x0", "y0", "x1", "y1"]
    assert table["label"].tolist() == ["cup", "bottle", "cup"]
    assert table.loc[1, "y1"] == 90
    assert nothing().to_pandas().empty


@pytest.mark.parametrize(("package", "method"), [("supervision", "to_supervision"), ("pandas", "to_pandas")])
def test_a_missing_package_says_how_to_install_it(package: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"pip install 'detgpt\\[{package}\\]'"):
        getattr(kitchen(), method)()


def test_importing_results_loads_no_heavy_package() -> None:
    code = (
        "import sys, detgpt.results;"
        "heavy = {'torch', 'transformers', 'supervision', 'pandas', 'cv2'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_filter_by_score_and_label_updates_found() -> None:
    by_score = kitchen().filter(min_score=0.5)
    assert by_score.labels == ("cup", "bottle")
    assert by_score.boxes.tolist() == kitchen().boxes[:2].tolist()

    cups = kitchen().filter(labels="cup")
    assert cups.labels == ("cup", "cup")
    assert [target.found for target in cups.targets] == [True, False, False]

    assert not kitchen().filter(min_score=0.4, labels=["spoon"])
    assert kitchen().filter() == kitchen()
    assert kitchen().filter(min_score=0.91).labels == ("cup",)


def test_crops_come_in_order_and_stay_inside_the_image() -> None:
    image = Image.new("RGB", (100, 90), "white")
    image.paste("red", (20, 30, 40, 50))
    boxes = [[20, 30, 40, 50], [90, 80, 100, 90], [5, 5, 5, 5], [100, 90, 100, 90]]
    result = kitchen(boxes=boxes, scores=[0.5] * 4, labels=["cup"] * 4, image=image)
    crops = result.crop()
    assert [crop.size for crop in crops] == [(20, 20), (10, 10), (1, 1), (1, 1)]
    assert crops[0].getcolors() == [(400, (255, 0, 0))]
    assert [crop.size for crop in result.crop(padding=0.5)] == [(40, 40), (15, 15), (1, 1), (1, 1)]
    with pytest.raises(InputError, match="padding"):
        result.crop(padding=-0.1)


def test_pictures_need_the_image_and_say_how_to_add_it() -> None:
    result = kitchen()
    with pytest.raises(InputError, match=r"dataclasses\.replace"):
        result.crop()
    with pytest.raises(InputError, match=r"dataclasses\.replace"):
        result.draw()
    assert replace(result, image=Image.new("RGB", (100, 90))).draw().width >= 100


def test_draw_adds_a_legend_only_when_asked() -> None:
    result = kitchen(image=Image.new("RGB", (400, 400)), image_wh=(0, 0))
    assert result.draw().size == (400, 400)
    assert result.draw(legend=True).height > 400
