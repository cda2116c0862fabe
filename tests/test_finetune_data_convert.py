"""`detgpt-finetune data convert`: a small file in each format's true layout, and the records that it gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_finetune_data import CUP, TALK, assistant, coco, user
from typer.testing import CliRunner

from detgpt.errors import InputError
from detgpt.evaluation.readers import read_dataset
from finetune.cli import app
from finetune.data.convert import CAPTION_REQUEST, FORMATS, convert
from finetune.data.detections import load_detections
from finetune.data.records import load_records


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A COCO set, and pictures by the names that the formats below use."""
    return coco(tmp_path)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if path.suffix == ".jsonl" else None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if rows else json.dumps(value))
    return path


def converted(place: Path, source: Path, format: str, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """What is written, read back, and the notes."""
    output = place / f"out-{format}"
    _, notes = convert(source, output, format=format, **options)
    return list(load_records(output)), notes


def shown(records: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The file name of each picture, and these columns."""
    return [(record["image"] and Path(record["image"]).name, *(record[key] for key in keys)) for record in records]


def test_the_formats_are_the_files():
    assert FORMATS == (
        "clicks", "coco", "coco_captions", "detgpt", "labelstudio", "llava", "lmflow", "odvg", "refcoco", "roboflow"
    )  # fmt: skip


# --- what is annotated ---


def test_coco(place: Path):
    records, notes = converted(place, place / "annotations.json", "coco")
    assert shown(records, "boxes", "labels", "ignored", "ignored_labels", "present") == [
        ("a.png", [CUP], ["cup"], [[0, 0, 90, 60]], ["chair"], ["cup", "chair"]),
        ("b.png", [], [], [], [], []),
    ]
    assert notes == []
    one, two = load_detections(place / "out-coco"), load_detections(place)
    assert all(one[column][:] == two[column][:] for column in ("boxes", "labels", "ignored", "present"))


def test_captions_of_coco(place: Path):
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 90}],
        "annotations": [
            {"image_id": 1, "id": 7, "caption": "A cup on a desk. "},
            {"image_id": 1, "id": 8, "caption": "A grey desk."},
            {"image_id": 5, "id": 9, "caption": "Nobody knows."},
        ],
    }
    records, notes = converted(place, write(place / "captions_train2017.json", document), "coco_captions")
    asked = user(CAPTION_REQUEST)
    assert shown(records, "messages") == [
        ("a.png", [asked, assistant("A cup on a desk.")]),
        ("a.png", [asked, assistant("A grey desk.")]),
    ]
    assert notes == ["1 pictures have captions but no entry in 'images'."]


def test_a_roboflow_export_whose_first_category_is_a_dummy(place: Path):
    for part in ("train", "valid"):
        document = {
            "info": {"description": "Exported from roboflow.com"},
            "categories": [
                {"id": 0, "name": "kitchen-things", "supercategory": "none"},
                {"id": 1, "name": "cup", "supercategory": "kitchen-things"},
            ],
            "images": [{"id": 0, "file_name": f"{part}_jpg.rf.0a1b.jpg", "height": 60, "width": 90}],
            "annotations": [
                {"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
                {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 10, 0, 20], "area": 0, "iscrowd": 0},
            ],
        }
        write(place / "export" / part / "_annotations.coco.json", document)
        Image.new("RGB", (90, 60)).save(place / f"export/{part}/{part}_jpg.rf.0a1b.jpg")
    counts, notes = convert(place / "export", place / "out", format="roboflow")
    assert counts == {"train": 1, "valid": 1}
    assert [note.partition(":")[0] for note in notes] == ["train", "valid"]
    [record] = load_records(place / "out/valid")
    assert shown([record], "labels", "present") == [("valid_jpg.rf.0a1b.jpg", ["cup"], ["cup"])]
    with pytest.raises(InputError, match="choose one of its parts train, valid"):
        load_records(place / "out")


def labelstudio_task(number: int, image: str, **value: Any) -> dict[str, Any]:
    rectangle = {"x": 100 / 9, "y": 50 / 3, "width": 200 / 9, "height": 100 / 3, "rotation": 0}
    result = {
        "id": "Dx_aB91ISN", "from_name": "label", "to_name": "image", "type": "rectanglelabels", "origin": "manual",
        "original_width": 90, "original_height": 60, "image_rotation": value.pop("image_rotation", 0),
        "value": {**rectangle, "rectanglelabels": ["cup"], **value},
    }  # fmt: skip
    choice = {"type": "choices", "from_name": "c", "to_name": "image", "value": {"choices": ["indoors"]}}
    annotation = {"id": 10 + number, "completed_by": 1, "was_cancelled": False, "result": [result, choice]}
    return {"id": number, "data": {"image": image}, "annotations": [annotation], "predictions": []}


def test_a_label_studio_export(place: Path):
    cancelled = labelstudio_task(4, "/data/upload/1/a.png")
    cancelled["annotations"][0]["was_cancelled"] = True
    tasks = [
        labelstudio_task(1, "/data/upload/1/4f2a7c9e-a.png"),
        labelstudio_task(2, "/data/local-files/?d=my%20files/b.png"),
        labelstudio_task(3, "s3://bucket/b.png", rotation=30),
        cancelled,
        labelstudio_task(5, "https://example.com/a.png", image_rotation=90),
    ]
    records, notes = converted(place, write(place / "export.json", tasks), "labelstudio")
    assert shown(records, "boxes", "labels") == [("a.png", [CUP], ["cup"]), ("b.png", [CUP], ["cup"])]
    assert notes == [
        "2 pictures were left out: a rectangle or the picture is rotated, and boxes here have upright sides.",
        "1 pictures were left out: nobody annotated them.",
    ]


def test_odvg(place: Path):
    instances = [
        {"bbox": [10, 10, 30, 30], "label": 0, "category": "cup"},
        {"bbox": [40, 10, 80.5, 50], "label": 1},
        {"bbox": [40, 10, 40, 50], "label": 1},
    ]
    regions = [
        {"bbox": [10, 10, 30, 30], "phrase": "a red cup"},
        {"bbox": [[40, 10, 80, 50], [0, 0, 9, 9]], "phrase": "chairs"},
    ]
    size = {"height": 60, "width": 90}
    lines = [
        {"filename": "a.png", **size, "detection": {"instances": instances}},
        {"filename": "b.png", **size, "grounding": {"caption": "a red cup by chairs", "regions": regions}},
    ]
    label_map = write(place / "label_map.json", {"0": "cup", "1": "chair"})
    source = write(place / "odvg.jsonl", lines)
    records, notes = converted(place, source, "odvg", annotations=label_map)
    assert shown(records, "boxes", "labels", "messages") == [
        ("a.png", [CUP, [40, 10, 80.5, 50]], ["cup", "chair"], []),
        (
            "b.png",
            [CUP, [40, 10, 80, 50], [0, 0, 9, 9]],
            ["a red cup", "chairs", "chairs"],
            [user(CAPTION_REQUEST), assistant("a red cup by chairs")],
        ),
    ]
    assert notes == ["1 boxes have no area and were left out."]
    with pytest.raises(InputError, match=r"line 1: an instance has no 'category', and label 1 is not in a label map"):
        convert(source, place / "again", format="odvg")


def test_refcoco_gives_a_folder_for_each_split(place: Path):
    document = json.loads((place / "annotations.json").read_text())
    document["annotations"][1]["iscrowd"] = 0
    write(place / "refcoco/instances.json", document)
    sentences = [
        {"sent": "the left thing", "raw": "the left thing", "sent_id": 1, "tokens": ["the", "left", "thing"]},
        {"sent": "the thing " * 20, "raw": "", "sent_id": 2, "tokens": []},
    ]
    refs = [
        {"ref_id": 1, "image_id": 1, "ann_id": 1, "category_id": 3, "split": "train", "sentences": sentences},
        {"ref_id": 2, "image_id": 1, "ann_id": 2, "category_id": 4, "split": "testA", "sentences": sentences[:1]},
    ]
    source = write(place / "refcoco/refs(unc).json", refs).parent
    counts, notes = convert(source, place / "out", format="refcoco", images=place / "images")
    assert (counts, notes) == ({"train": 1, "testA": 1}, ["1 sentences have over 80 characters and were left out."])
    [record] = load_records(place / "out/train")
    wanted = ("a.png", "the left thing", ["the left thing"], [CUP], ["cup", "chair", "the left thing"])
    assert shown([record], "instruction", "targets", "boxes", "present") == [wanted]
    assert len(read_dataset(place / "out/testA").records) == 1


# --- what is said ---

ANSWERS = [
    {"image_id": "1", "task": "I am thirsty", "answer": "A desk.\nTherefore the answer is: [cups, straw]"},
    {"image_id": "1", "task": "I want to swim", "answer": "Nothing here.\nTherefore the answer is: []"},
    {"image_id": "1", "task": "I want to rest", "answer": "A sofa.\nTherefore the answer is: [sofa]"},
    {"image_id": "1", "task": "I am lost", "answer": "I cannot say."},
]


def test_answers_of_detgpt_get_the_boxes_of_a_coco_file(place: Path):
    source = write(place / "coco_task_annotation.json", {"annotations": ANSWERS})
    records, notes = converted(place, source, "detgpt", annotations=place / "annotations.json")
    assert shown(records, "instruction", "answer", "boxes") == [
        ("a.png", "I am thirsty", 'A desk.\nTargets: ["cup"]', [CUP]),
        ("a.png", "I want to swim", "Nothing here.\nTargets: []", []),
    ]
    assert notes == [
        "2 of 4 wishes have no target left and were left out.",
        "2 names have no box in their picture and were dropped.",
    ]
    assert len(read_dataset(place / "out-detgpt").records) == 2


def test_answers_of_detgpt_alone_have_no_boxes(place: Path):
    Image.new("RGB", (90, 60)).save(place / "images/000000000001.jpg")
    source = write(place / "coco_task_annotation.json", {"annotations": ANSWERS})
    records, notes = converted(place, source, "detgpt")
    assert shown(records, "targets", "boxes") == [
        ("000000000001.jpg", ["cups", "straw"], None),
        ("000000000001.jpg", [], None),
        ("000000000001.jpg", ["sofa"], None),
    ]
    assert notes[-1] == "There are no boxes: --annotations takes the COCO file that has them."


def said(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def test_llava(place: Path):
    entries = [
        {"id": "1", "image": "coco/a.png", "conversations": said("<image>\nWhat is it?", "A cup.", "Sure?", "Yes.")},
        {"id": "2", "conversations": said("Hello", "Hi.")},
        {"id": "3", "image": ["a.png", "b.png"], "conversations": said("<image>\n<image>\nWhich?", "One.")},
        {"id": "4", "image": "b.png", "conversations": said("<image>\nBlue?\n<image>")},
        {"id": "5", "image": "missing.png", "conversations": said("<image>\nBlue?", "Yes.")},
    ]  # fmt: skip
    records, notes = converted(place, write(place / "llava.json", entries), "llava", images=place / "images")
    assert shown(records, "messages", "instruction") == [
        ("a.png", [user("What is it?"), assistant("A cup."), user("Sure?"), assistant("Yes.")], None),
        (None, TALK, None),
    ]
    several, missing, unusable = notes
    assert several == "1 entries have several pictures or none in a list and were left out."
    assert missing.startswith("1 records were left out because their picture is not there") and "missing.png" in missing
    assert "'messages' must go user, assistant" in unusable


LMFLOW = {
    "text_only": ([{"text": "Cups."}], [{"text": "Cups.", "messages": []}]),
    "text2text": ([{"input": "Hello", "output": "Hi."}], [{"messages": TALK}]),
    "text_to_textlist": (
        [{"input": "Hello", "output": ["Hi.", "Hey."]}],
        [{"messages": TALK}, {"messages": [user("Hello"), assistant("Hey.")]}],
    ),
    "conversation": (
        [{"conversation_id": "1", "system": "Be short.", "tools": ["call"], "messages": TALK}, {"messages": TALK}],
        [{"messages": [{"role": "system", "content": "Be short."}, *TALK]}, {"messages": TALK}],
    ),
    "paired_conversation": (
        [
            {"chosen": {"messages": TALK}, "rejected": {"messages": [TALK[0], assistant("Go.")]}},
            {"chosen": {"messages": TALK}, "rejected": {"messages": [user("Hey"), assistant("Go.")]}},
        ],
        [{"messages": TALK[:1], "chosen": "Hi.", "rejected": "Go."}],
    ),
    "image_text": (
        [{"image": "a.png", "text": "A desk."}],
        [{"messages": [user(CAPTION_REQUEST), assistant("A desk.")]}],
    ),
}


@pytest.mark.parametrize("kind", LMFLOW)
def test_lmflow(place: Path, kind: str):
    instances, expected = LMFLOW[kind]
    write(place / "data/part1.json", {"type": kind, "instances": instances})
    records, notes = converted(place, place / "data", "lmflow", images=place / "images")
    assert [{key: record[key] for key in row} for record, row in zip(records, expected, strict=True)] == expected
    expected_notes = {
        "conversation": ["part1.json: the tools of 1 conversations were left out."],
        "paired_conversation": ["part1.json: 1 pairs differ in more than the last answer and were left out."],
    }
    assert notes == expected_notes.get(kind, [])


def test_an_unknown_type_of_lmflow_is_refused_with_the_known_ones(place: Path):
    source = write(place / "x.json", {"type": "float_only", "instances": [{"value": 1}]})
    with pytest.raises(InputError, match="its type 'float_only' is none of text_only, text2text"):
        convert(source, place / "out", format="lmflow")


# --- files ---


def test_pictures_are_referred_to_or_copied(place: Path):
    os.renames(place / "images/b.png", place / "images/more/a.png")
    document = json.loads((place / "annotations.json").read_text())
    document["images"][1]["file_name"] = "more/a.png"
    source = write(place / "annotations.json", document)
    convert(source, place / "deep/referred", format="coco")
    convert(source, place / "copied", format="coco", copy=True)
    convert(source, place / "kept", format="coco", copy=True, images=place / "images")
    rows = [json.loads(line) for line in (place / "deep/referred/data.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["../../images/a.png", "../../images/more/a.png"]
    colours = {}
    for name in ("deep/referred", "copied", "kept"):
        records = load_records(place / name)
        colours[name] = [Image.open(record["image"]).convert("RGB").getpixel((0, 0)) for record in records]
    assert list(colours.values()) == [[(128, 128, 128), (0, 0, 255)]] * 3
    assert (place / "kept/images/more/a.png").is_file()


WRONG = {
    "a folder that is there": "is there already",
    "no picture": "gives no record as 'coco'. 2 records were left out",
    "broken": "no annotation file",
    "option": "takes no annotations",
    "format": "choose one of clicks",
}


def test_a_picture_of_several_records_is_copied_once(place: Path):
    captions = [{"image_id": 1, "id": number, "caption": f"Caption {number}."} for number in range(3)]
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": captions}
    records, _ = converted(place, write(place / "captions.json", document), "coco_captions", copy=True)
    assert len(records) == 3
    assert [file.name for file in (place / "out-coco_captions/images").iterdir()] == ["a.png"]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_leaves_nothing_behind(place: Path, wrong: str):
    source, options = place / "annotations.json", {"format": "coco"}
    if wrong == "a folder that is there":
        (place / "out").mkdir()
    elif wrong == "no picture":
        (place / "images").rename(place / "elsewhere")
    elif wrong == "broken":
        source = write(place / "broken.json", {"images": 3})
    elif wrong == "option":
        options = {"format": "coco", "annotations": str(source)}
    else:
        options = {"format": "voc"}
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError, match=WRONG[wrong]):
        convert(source, place / "out", **options)
    assert sorted(place.rglob("*")) == before


def test_the_command_says_what_it_wrote_and_left_out(place: Path):
    (place / "images/b.png").unlink()
    ran = CliRunner().invoke(
        app, ["data", "convert", str(place / "annotations.json"), str(place / "out"), "--format", "coco"]
    )
    assert ran.exit_code == 0, ran.output
    assert "1 records were left out because their picture is not there" in ran.stderr
    assert f"wrote 1 records to {place / 'out'}" in ran.stderr
