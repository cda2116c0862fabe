"""The formats that `detgpt eval` reads, each from files as their authors publish them."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detgpt.errors import InputError
from detgpt.evaluation.coco import read_annotations
from detgpt.evaluation.readers import FORMATS, read_dataset

CUP, MUG, CROWD, MAN = [10, 20, 30, 40], [50, 20, 10, 10], [0, 0, 90, 15], [5, 5, 20, 50]  # xywh
TRIANGLE = [[10, 20, 40, 20, 10, 60]]


def annotation(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


COCO: dict[str, Any] = {
    "images": [{"id": 42, "file_name": "000000000042.jpg"}, {"id": 7, "file_name": "000000000007.jpg"}],
    "annotations": [
        annotation(1, 42, 3, CUP, segmentation=TRIANGLE, iscrowd=0),
        annotation(2, 42, 3, MUG, segmentation=[[50, 20, 60, 20, 60, 30]], iscrowd=0),
        annotation(3, 42, 1, CROWD, segmentation={"size": [80, 100], "counts": [800, 80, 7120]}, iscrowd=1),
        annotation(4, 42, 1, MAN, segmentation=[[5, 5, 25, 5, 25, 55]], iscrowd=0),
        annotation(5, 7, 3, CUP, segmentation=TRIANGLE, iscrowd=0),
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "cup", "synonyms": ["cup", "mug"]}],
}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the pictures of `COCO` in `images/`, and with its annotation."""
    (tmp_path / "images").mkdir()
    for row in COCO["images"]:
        Image.new("RGB", (100, 80)).save(tmp_path / "images" / row["file_name"])
    write_json(tmp_path / "annotations.json", COCO)
    return tmp_path


# --- COCO and a file of wishes ---


def test_wishes_about_a_coco_annotation(place: Path):
    write_lines(
        place / "instructions.jsonl",
        {"image_id": 42, "instruction": "I am thirsty", "targets": ["cup"], "kind": "need"},
        {"image": "000000000042.jpg", "instruction": "who can help", "targets": ["person"]},
        {"image_id": "000000000007", "instruction": "I want to swim", "targets": []},
    )
    dataset = read_dataset(place)
    cup, person, nothing = dataset.records
    assert cup.image == place / "images/000000000042.jpg"
    assert (cup.instruction, cup.kind, cup.targets, cup.labels) == ("I am thirsty", "need", ("cup",), ("cup", "cup"))
    assert cup.boxes.tolist() == [[10, 20, 40, 60], [50, 20, 60, 30]]
    assert set(cup.present) == {"cup", "person"}
    assert cup.synonyms == {"cup": ("mug",)}
    assert person.boxes.tolist() == [[5, 5, 25, 55]]
    assert (person.ignored.tolist(), person.ignored_labels) == ([[0, 0, 90, 15]], ("person",))
    assert (nothing.image.name, nothing.targets, nothing.boxes.shape) == ("000000000007.jpg", (), (0, 4))
    assert dataset.notes == ()


def test_the_true_pixels_of_a_wish_are_those_of_all_that_fits_and_crowds_do_not_count(place: Path):
    pytest.importorskip("pycocotools")
    wishes = write_lines(place / "wishes.jsonl", {"image_id": 42, "instruction": "help", "targets": ["person"]})
    (record,) = read_dataset(wishes, annotations=place / "annotations.json").records
    true, ignored = record.outlines.masks((100, 80))
    assert true.sum() == pytest.approx(20 * 50 / 2, rel=0.05)
    assert 0 < true[:, 10].sum() < 80, "the person stands in the crowd, one column of pixels, and counts there"
    assert ignored.sum() == 80 - true[:, 10].sum()


def test_files_may_lie_apart(place: Path, tmp_path_factory: pytest.TempPathFactory):
    wishes = tmp_path_factory.mktemp("elsewhere") / "w.jsonl"
    write_lines(wishes, {"image_id": 7, "instruction": "drink", "targets": ["cup"]})
    (record,) = read_dataset(wishes, annotations=place / "annotations.json", images=place / "images").records
    assert record.image.is_file()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x", "targets": []}, "name the picture by its 'image_id'"),
        ({"image_id": 9, "instruction": "x", "targets": []}, "has no picture 9"),
        ({"image_id": 7, "targets": []}, "'instruction' must be a text"),
        ({"image_id": 7, "instruction": "x", "targets": "cup"}, "'targets' must be a list"),
        ({"image_id": 7, "instruction": "x", "targets": ["person"]}, r"targets \['person'\] have no box .* \['cup'\]"),
        ({"image_id": 7, "instruction": "x", "targets": ["cup"], "synonyms": ["a"]}, "'synonyms' must map"),
    ],
)
def test_a_wrong_wish_is_named_by_its_line(place: Path, row: dict[str, Any], message: str):
    write_lines(place / "instructions.jsonl", {"image_id": 7, "instruction": "y", "targets": []}, row)
    with pytest.raises(InputError, match=rf"instructions\.jsonl, line 2: .*{message}"):
        read_dataset(place)


def test_a_crowd_alone_is_no_target(place: Path):
    alone = [row for row in COCO["annotations"] if row["id"] != 4]
    write_json(place / "annotations.json", COCO | {"annotations": alone})
    write_lines(place / "instructions.jsonl", {"image_id": 42, "instruction": "help", "targets": ["person"]})
    with pytest.raises(InputError, match=r"targets \['person'\] have no box of their own"):
        read_dataset(place)


def test_a_picture_that_is_missing_is_named_unless_it_is_past_the_limit(place: Path):
    rows = [{"image_id": image, "instruction": "drink", "targets": ["cup"]} for image in (7, 42)]
    write_lines(place / "instructions.jsonl", *rows)
    (place / "images/000000000042.jpg").unlink()
    with pytest.raises(InputError, match=r"line 2: there is no image .*0042\.jpg"):
        read_dataset(place)
    assert len(read_dataset(place, limit=1).records) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "is no annotation file"),
        ({"annotations": [{"id": 1}]}, "not of COCO's form .*bbox"),
        ({"annotations": [annotation(1, 42, 99, CUP)]}, "not of COCO's form .*99"),
        ({"annotations": [annotation(1, 42, 3, [0, 0, float("nan"), 1])]}, "not finite"),
    ],
)
def test_what_is_no_annotation_file(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        read_annotations(write_json(tmp_path / "a.json", COCO | changes))


def test_boxes_without_area_are_left_out_and_that_is_said(tmp_path: Path):
    flat = annotation(6, 7, 1, [5, 5, 0, 20])
    annotations = read_annotations(
        write_json(tmp_path / "a.json", COCO | {"annotations": [*COCO["annotations"], flat]})
    )
    assert annotations.picture(7, "").present == ("cup",)
    assert annotations.notes == ("1 annotations of a.json have a box without area and were left out.",)


# --- RefCOCO ---

REFS = [
    {
        "ref_id": 1,
        "ann_id": 2,
        "image_id": 42,
        "category_id": 3,
        "split": "testA",
        "file_name": "COCO_train2014_000000000042_2.jpg",
        "sent_ids": [10, 11],
        "sentences": [
            {"sent_id": 10, "sent": "small mug", "raw": "small mug", "tokens": ["small", "mug"]},
            {"sent_id": 11, "sent": "right cup", "raw": "Right cup", "tokens": ["right", "cup"]},
        ],
    },
    {
        "ref_id": 2,
        "ann_id": 4,
        "image_id": 42,
        "category_id": 1,
        "split": "val",
        "file_name": "COCO_train2014_000000000042_4.jpg",
        "sent_ids": [12],
        "sentences": [{"sent_id": 12, "sent": "man", "raw": "man", "tokens": ["man"]}],
    },
]


def as_python_2_wrote_it(value: Any) -> bytes:
    """Plain values in pickle's protocol 2, texts as byte strings."""

    def body(value: Any) -> bytes:
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, str):
            return b"T" + struct.pack("<i", len(value.encode())) + value.encode()
        if isinstance(value, list):
            return b"](" + b"".join(map(body, value)) + b"e"
        return b"}(" + b"".join(body(part) for pair in value.items() for part in pair) + b"u"

    return b"\x80\x02" + body(value) + b"."


@pytest.fixture
def refcoco(place: Path) -> Path:
    (place / "annotations.json").rename(place / "instances.json")
    (place / "refs(unc).p").write_bytes(as_python_2_wrote_it(REFS))
    return place


def test_every_sentence_of_refcoco_is_a_wish_for_one_box(refcoco: Path):
    first, second = read_dataset(refcoco, split="testA").records
    assert [first.instruction, second.instruction] == ["small mug", "right cup"]
    assert first.boxes.tolist() == second.boxes.tolist() == [[50, 20, 60, 30]]
    assert (first.labels, first.named) == (("cup",), False)
    assert first.image.is_file()


def test_the_split_is_val_unless_given_and_that_is_said(refcoco: Path):
    dataset = read_dataset(refcoco)
    assert [record.instruction for record in dataset.records] == ["man"]
    assert dataset.notes == ("refs(unc).p: read split val of testA, val.",)
    with pytest.raises(InputError, match=r"no split 'testB': choose one of testA, val"):
        read_dataset(refcoco, split="testB")


def test_the_layout_of_the_refer_tool(refcoco: Path):
    images = refcoco / "images/mscoco/images/train2014"
    images.mkdir(parents=True)
    (refcoco / "images/000000000042.jpg").rename(images / "000000000042.jpg")
    folder = refcoco / "refcoco"
    folder.mkdir()
    for name in ("refs(unc).p", "instances.json"):
        (refcoco / name).rename(folder / name)
    (record,) = read_dataset(folder).records
    assert record.image == images / "000000000042.jpg"


def test_of_several_refs_files_one_must_be_chosen(refcoco: Path):
    write_json(refcoco / "refs(google).json", REFS[:1])
    with pytest.raises(InputError, match=r"holds refs\(google\)\.json, refs\(unc\)\.p: give the file"):
        read_dataset(refcoco)
    assert len(read_dataset(refcoco / "refs(google).json", split="testA").records) == 2


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(refcoco: Path, protocol: int):
    marker = refcoco / "exploded"
    bomb = pickle.dumps([{**REFS[0], "sent_ids": Bomb(marker)}], protocol=protocol)
    (refcoco / "refs(unc).p").write_bytes(bomb)
    with pytest.raises(InputError, match=r"only plain values are read.*write it as JSON"):
        read_dataset(refcoco, split="testA")
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "it is a bomb"


@pytest.mark.parametrize("content", [b"", b"\x80\x02]", b"junk", pickle.dumps(np.float64(3)), pickle.dumps([3])])
def test_a_damaged_refs_file_is_an_error(refcoco: Path, content: bytes):
    (refcoco / "refs(unc).p").write_bytes(content)
    with pytest.raises(InputError, match=r"refs\(unc\)\.p"):
        read_dataset(refcoco)


def test_a_ref_without_its_annotation_is_an_error(refcoco: Path):
    write_json(refcoco / "refs(unc).json", [{**REFS[0], "ann_id": 5}])
    with pytest.raises(InputError, match="ref 1: picture 42 has no annotation 5"):
        read_dataset(refcoco / "refs(unc).json", split="testA")


# --- ReasonSeg ---


@pytest.fixture
def reasonseg(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40)).save(tmp_path / "a_1.jpg")
    Image.new("RGB", (60, 40)).save(tmp_path / "b_2.jpg")
    square, hole = [[10, 10], [30, 10], [30, 30], [10, 30]], [[15.9, 15], [20, 15], [20, 20], [15, 20]]
    write_json(
        tmp_path / "a_1.json",
        {
            "text": [" What keeps the rain away? ", "another text"],
            "is_sentence": True,
            "shapes": [
                {"label": "Ignore", "points": hole},
                {"label": "target", "points": square},
                {"label": "flag", "points": [[0, 0], [59, 0], [59, 39]]},
            ],
        },
    )
    text = json.dumps({"text": ["the café"], "is_sentence": False, "shapes": []}, ensure_ascii=False)
    (tmp_path / "b_2.json").write_bytes(text.encode("cp1252"))
    return tmp_path


def test_reasonseg(reasonseg: Path):
    pytest.importorskip("pycocotools")
    first, second = read_dataset(reasonseg).records
    assert (first.instruction, first.kind, first.named) == ("What keeps the rain away?", "sentence", False)
    assert first.boxes.tolist() == [[10, 10, 31, 31]]
    assert first.ignored.tolist() == [[15, 15, 21, 21]]
    true, ignored = first.outlines.masks((60, 40))
    assert (true.sum(), ignored.sum()) == (21 * 21 - 36, 36), "the smaller shape lies on the larger one"
    assert (second.instruction, second.kind, second.targets) == ("the café", "phrase", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["x"]}, "is something else"),
        ({"text": [], "shapes": []}, "'text' holds no instruction"),
        ({"text": ["x"], "shapes": [{"points": []}]}, "a shape is an object"),
        ({"text": ["x"], "shapes": [{"label": "target", "points": [[1, 2], [3]]}]}, "'points' must be a list"),
        ({"text": ["x"], "shapes": [{"label": "target", "points": [[1, 2], [3, 4]]}]}, "a segmentation is"),
    ],
)
def test_a_wrong_reasonseg_annotation_is_named(reasonseg: Path, row: dict[str, Any], message: str):
    write_json(reasonseg / "b_2.json", row)
    with pytest.raises(InputError, match=rf"b_2\.json.*{message}"):
        read_dataset(reasonseg)


# --- the original DetGPT ---

ANSWERS = {
    "annotations": [
        {"image_id": "000000000042", "task": "drink", "answer": "I see a cup. Therefore the answer is: [cup, mugs]"},
        {"image_id": "000000000042", "task": "eat", "answer": "Therefore the answer is: [pizza]"},
        {"image_id": "000000000007", "task": "swim", "answer": "Therefore the answer is: []"},
    ]
}


def test_answers_of_a_language_model_get_the_boxes_of_an_annotation(place: Path):
    file = write_json(place / "coco_task_annotation.json", ANSWERS)
    dataset = read_dataset(file, annotations=place / "annotations.json")
    assert [(record.instruction, record.targets) for record in dataset.records] == [("drink", ("cup",)), ("swim", ())]
    assert dataset.records[0].boxes.shape == (2, 4)
    assert dataset.notes == ("1 of 3 wishes name nothing that has a box in its picture and were left out.",)
    with pytest.raises(InputError, match="has no boxes: give the COCO file"):
        read_dataset(file)


def test_the_original_benchmark(place: Path):
    chosen = {
        "42": {"image_id": "42", "task": "help", "categories": ["person"]},
        "99": {"image_id": "99", "task": "of a picture that this subset lacks", "categories": ["cup"]},
    }
    file = write_json(place / "benchmark.json", {**COCO, "instruct_task1": chosen, "annotations_task1": []})
    (record,) = read_dataset(file).records
    assert (record.instruction, record.targets, record.boxes.tolist()) == ("help", ("person",), [[5, 5, 25, 55]])
    with pytest.raises(InputError, match=r"no wishes of 'task9': choose one of task1"):
        read_dataset(file, split="task9")


# --- which format it is ---


def test_a_format_can_be_given(place: Path):
    write_lines(place / "data.jsonl", {"image_id": 7, "instruction": "drink", "targets": ["cup"]})
    assert len(read_dataset(place / "data.jsonl", format="coco").records) == 1
    with pytest.raises(InputError, match=r"no wish that could be measured. 1 of 1 records of .*data\.jsonl have no"):
        read_dataset(place / "data.jsonl")
    with pytest.raises(InputError, match=f"no format 'voc': choose one of {', '.join(FORMATS)}"):
        read_dataset(place, format="voc")


def test_a_place_that_a_format_does_not_use_is_an_error(reasonseg: Path):
    with pytest.raises(InputError, match="read as 'reasonseg', which takes no annotations and no split"):
        read_dataset(reasonseg, annotations=reasonseg / "a.json", split="val")


def test_a_set_without_a_wish_is_an_error(place: Path):
    file = write_json(place / "t.json", {"annotations": ANSWERS["annotations"][1:2]})
    with pytest.raises(InputError, match=r"holds no wish that could be measured. 1 of 1 wishes"):
        read_dataset(file, annotations=place / "annotations.json")
