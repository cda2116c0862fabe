"""Training data: a folder with data.jsonl becomes a 🤗 Dataset, or an error that names file and line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detgpt.errors import InputError
from detgpt.evaluation.readers import read_dataset
from finetune.data import detections
from finetune.data.detections import load_detections
from finetune.data.records import fingerprint, load_records

SEEN = Path(__file__).parents[1] / "finetune/picto/splits/seen"
CUP = [10, 10, 30, 30]
WISH = {
    "image": "a.png",
    "instruction": "I am thirsty",
    "targets": ["cup"],
    "boxes": [CUP],
    "labels": ["cup"],
    "present": ["cup", "chair"],
}
NOTHING = {**WISH, "instruction": "I want to swim", "targets": [], "boxes": [], "labels": []}
SYSTEM = {"role": "system", "content": "Be short."}
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    """A folder of data with two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (90, 60), "gray").save(folder / "a.png")
    Image.new("RGB", (90, 60), "blue").save(folder / "b.png")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (WISH, [user("I am thirsty"), assistant('Targets: ["cup"]')]),
        ({**WISH, "reasoning": "A desk. "}, [user("I am thirsty"), assistant('A desk.\nTargets: ["cup"]')]),
        ({**WISH, "reasoning": "A desk.", "answer": "[cup]"}, [user("I am thirsty"), assistant("[cup]")]),
        ({**NOTHING, "reasoning": ""}, [user("I want to swim"), assistant("Targets: []")]),
        ({"instruction": "2 + 2?", "answer": "4"}, [user("2 + 2?"), assistant("4")]),
        ({"image": "a.png", "messages": TALK * 2}, TALK * 2),
        ({"messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
        ({**WISH, "chosen": "[cup]", "rejected": "[]"}, [user("I am thirsty")]),
        ({"messages": [*TALK, user("Bye")], "chosen": "Bye.", "rejected": "No."}, [*TALK, user("Bye")]),
        ({"text": "Cups are made of clay."}, []),
        ({"image": "a.png", "boxes": [CUP], "labels": ["cup"]}, []),
    ],
)  # fmt: skip
def test_what_a_record_says_becomes_messages(tmp_path: Path, row: dict[str, Any], messages: list[dict[str, str]]):
    [record] = load_records(write(tmp_path, row))
    assert record["messages"] == messages
    assert record["image"] == (str(tmp_path / "a.png") if "image" in row else None)
    given = {key: row.get(key) for key in ("instruction", "chosen", "rejected", "text", "boxes", "labels", "targets")}
    assert {key: record[key] for key in given} == given


def test_several_places_are_read_one_after_the_other(tmp_path: Path):
    write(tmp_path / "one", WISH, {"text": "plain"})
    write(tmp_path / "two", NOTHING)
    records = load_records([tmp_path / "one", tmp_path / "two/data.jsonl"])
    assert records["instruction"][:] == ["I am thirsty", None, "I want to swim"]
    assert records["targets"][:] == [["cup"], None, []], "nothing fits and nothing is known are not the same"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png"}, "has one of 'instruction', 'messages' or 'text'"),
        ({"text": "a", "messages": TALK}, "has one of"),
        ({"image": "a.png", "instruction": "I am thirsty"}, "'targets' must be a list"),
        ({**WISH, "instruction": " "}, "'instruction' must be a text"),
        ({**WISH, "labels": []}, "1 boxes but 0 labels"),
        ({**WISH, "boxes": [], "labels": []}, "every target needs a box"),
        ({**WISH, "boxes": [[30, 10, 10, 30]]}, "x0 < x1"),
        ({**WISH, "targets": ["nothing"], "labels": ["nothing"], "present": ["nothing"]}, "cannot be a target name"),
        ({"boxes": [CUP], "labels": ["cup"]}, "'image' must be a text"),
        ({"image": "a.png", "boxes": [CUP], "labels": []}, "1 boxes but 0 labels"),
        ({"messages": []}, "must go user, assistant"),
        ({"messages": TALK[:1]}, "end with the assistant"),
        ({"messages": [TALK[0], *TALK]}, "must go user, assistant"),
        ({"messages": TALK, "chosen": "a", "rejected": "b"}, "end with the user"),
        ({"messages": ["Hello"]}, "list of objects"),
        ({"messages": [user("")]}, "'content' must be a text"),
        ({**WISH, "chosen": "[cup]"}, "needs one that is 'rejected'"),
        ({**WISH, "chosen": "[cup]", "rejected": "[]", "answer": "a"}, "not both"),
        ({**WISH, "image": "c.png"}, r"there is no image .*c\.png"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(InputError, match=rf"data\.jsonl, line 2: .*{message}"):
        load_records(write(tmp_path, WISH, row))


def test_a_place_without_data_is_an_error_that_names_the_parts_it_has(tmp_path: Path):
    write(tmp_path / "set/train", WISH)
    write(tmp_path / "set/val", WISH)
    with pytest.raises(InputError, match="choose one of its parts train, val"):
        load_records(tmp_path / "set")
    with pytest.raises(InputError, match=r"nowhere is no training data: give a folder with data\.jsonl"):
        load_records(tmp_path / "nowhere")


def test_evaluation_reads_the_same_folder_and_says_what_it_left_out(tmp_path: Path):
    write(tmp_path, {"text": "plain"}, {**WISH, "reasoning": "A desk."}, {"image": "a.png", "messages": TALK}, NOTHING)
    dataset = read_dataset(tmp_path)
    assert [record.instruction for record in dataset.records] == ["I am thirsty", "I want to swim"]
    left_out = f"2 of 4 records of {tmp_path / 'data.jsonl'} have no instruction or no boxes and were left out."
    assert dataset.notes == (left_out,)
    assert len(load_records(tmp_path)) == 4
    assert len(load_records(SEEN)) == len(read_dataset(SEEN).records)


def test_the_fingerprint_is_of_what_is_there_not_of_where_and_when(tmp_path: Path):
    first = fingerprint(write(tmp_path / "one", WISH, {"text": "plain"}))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two/a.png", (1, 1))
    assert fingerprint(tmp_path / "two") == fingerprint(str(tmp_path / "two/data.jsonl")) == first
    Image.new("RGB", (90, 60), "blue").save(tmp_path / "two/b.png")
    assert fingerprint(tmp_path / "two") == first, "b.png is no part of the data"
    Image.new("RGB", (90, 60), "red").save(tmp_path / "two/a.png")
    changed = fingerprint(tmp_path / "two")
    write(tmp_path / "two", {**WISH, "instruction": "a drink"}, {"text": "plain"})
    assert len({first, changed, fingerprint(tmp_path / "two"), fingerprint([tmp_path / "one"] * 2)}) == 4
    (tmp_path / "two/a.png").unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.png"):
        fingerprint(tmp_path / "two")


# --- boxes for a detector ---


def test_a_detector_gets_each_picture_once_with_all_its_boxes(tmp_path: Path):
    chair = {**WISH, "instruction": "sit", "targets": ["chair"], "labels": ["chair"], "boxes": [[40, 10, 80, 50]]}
    write(tmp_path, WISH, chair, {**WISH, "instruction": "drink"}, {**NOTHING, "image": "b.png"}, {"text": "plain"})
    a, b = load_detections(tmp_path)
    assert (Path(a["image"]).name, a["boxes"], a["labels"]) == ("a.png", [CUP, [40, 10, 80, 50]], ["cup", "chair"])
    assert (Path(b["image"]).name, b["boxes"], b["present"]) == ("b.png", [], ["cup", "chair"])
    with pytest.raises(InputError, match="no box to train"):
        load_detections(write(tmp_path, {"text": "plain"}))


def coco(folder: Path, images: str = "images") -> Path:
    write(folder / images)
    document = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "chair"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]},
            {"id": 2, "image_id": 1, "category_id": 4, "bbox": [0, 0, 90, 60], "iscrowd": 1},
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder


def test_a_detector_learns_from_a_coco_set_as_it_is(tmp_path: Path):
    expected = {
        "boxes": [CUP], "labels": ["cup"], "present": ["cup", "chair"], "ignored": [[0, 0, 90, 60]],
        "ignored_labels": ["chair"], "image": str(tmp_path / "images/a.png"),
    }  # fmt: skip
    one, two = load_detections(coco(tmp_path))
    assert one == expected
    assert (two["boxes"], two["present"]) == ([], [])
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    assert load_detections(tmp_path / "annotations.json", images=tmp_path / "elsewhere")[0]["boxes"] == [CUP]
    with pytest.raises(InputError, match=r"there is no image .*a\.png of picture 1"):
        load_detections(tmp_path)


def test_the_fingerprint_of_a_coco_set_has_its_pictures_in_it(tmp_path: Path):
    first = detections.fingerprint(coco(tmp_path / "one"))
    assert detections.fingerprint(coco(tmp_path / "two")) == first
    Image.new("RGB", (90, 60), "red").save(tmp_path / "two/images/b.png")
    assert detections.fingerprint(tmp_path / "two") != first
    assert detections.fingerprint(write(tmp_path / "three", WISH)) == fingerprint(tmp_path / "three")
