"""The newcomer's sample is what it says it is, and wishes come from boxes and a YAML file without a writer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from detgpt import DetGPT, InputError
from detgpt.answer import format_answer, parse_answer
from detgpt.evaluation import evaluate, read_dataset
from detgpt.evaluation.coco import read_annotations
from finetune.data.wishes import read_needs, write_wishes
from finetune.picto import domain
from finetune.picto.knowledge import load_knowledge

SAMPLE = Path(__file__).parent.parent / "examples" / "finetune"
NEEDS = SAMPLE / "needs.yaml"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def wishes_of(part: str, output: Path, needs: Path = NEEDS, **options) -> list[dict]:
    count = write_wishes(SAMPLE / part / "annotations.json", SAMPLE / part / "images", needs, output, **options)
    written = rows(output)
    assert len(written) == count
    return written


# ------------------------------------------------------------------------------------------------- the sample


def test_the_script_makes_the_sample_that_is_shipped(tmp_path):
    seed, count = domain.PARTS["val"]
    domain.write_part(tmp_path, seed, count)
    assert (tmp_path / "annotations.json").read_text() == (SAMPLE / "val" / "annotations.json").read_text()
    for file in sorted((tmp_path / "images").iterdir()):
        ours, shipped = (
            np.asarray(Image.open(path), np.int16) for path in (file, SAMPLE / "val" / "images" / file.name)
        )
        assert np.abs(ours - shipped).mean() < 1  # another version of the encoder may round otherwise
    write_wishes(tmp_path / "annotations.json", tmp_path / "images", NEEDS, tmp_path, held_out=True)
    assert rows(tmp_path) == rows(SAMPLE / "val")


def test_it_is_small_and_its_things_are_new():
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file()) < 1_500_000
    assert len(list(SAMPLE.rglob("*.webp"))) == 60
    known = {name for thing in load_knowledge().classes.values() for name in thing.names}
    assert not known & set(domain.NAMES)


def test_every_thing_is_often_there_and_captions_name_what_is_boxed():
    for part, least in (("train", 15), ("val", 4)):
        pictures = read_annotations(SAMPLE / part / "annotations.json").pictures
        for name in domain.NAMES:
            assert sum(name in picture.present for picture in pictures) >= least, (part, name)
        for picture in pictures:
            width, height = Image.open(SAMPLE / part / "images" / picture.file_name).size
            assert all(
                0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in (t.box for t in picture.things)
            )
    by_id = {picture.id: picture for picture in read_annotations(SAMPLE / "train" / "annotations.json").pictures}
    captions = json.loads((SAMPLE / "train" / "captions.json").read_text())["annotations"]
    assert len(captions) == domain.CAPTIONS
    for row in captions:
        assert {name for name in domain.NAMES if name in row["caption"]} == set(by_id[row["image_id"]].present)


def test_its_validation_asks_in_words_that_training_never_sees(tmp_path):
    trained = {row["instruction"] for row in wishes_of("train", tmp_path, wishes=99, absent=99)}
    asked = {row["instruction"] for row in rows(SAMPLE / "val")}
    assert len(asked) > 15 and not asked & trained
    assert {row["kind"] for row in rows(SAMPLE / "val")} == {"need", "direct", "absent"}


def test_the_built_in_model_cannot_do_it_yet():
    result = evaluate(DetGPT.from_pretrained("picto", device="cpu"), SAMPLE / "val", limit=8)
    assert result["n"] == 8
    assert result["reasoner"]["f1"] < 0.1


# ------------------------------------------------------------------------------------------------- the wishes


def test_wishes_fit_what_the_file_says_and_can_be_trained_on(tmp_path):
    needs = yaml.safe_load(NEEDS.read_text())
    fits = {text: key for key, need in needs["needs"].items() for text in need["says"]}
    written = wishes_of("train", tmp_path)
    read_dataset(tmp_path)  # targets, boxes and labels agree, and the pictures are where the lines say
    assert all((tmp_path / row["image"]).is_file() for row in written)
    for row in written:
        if key := fits.get(row["instruction"]):
            assert set(row["targets"]) == {n for n in row["present"] if key in needs["classes"][n]}
            assert needs["needs"][key]["fact"] in row["reasoning"][0].lower() + row["reasoning"].lower()
        assert (row["kind"] == "absent") == (not row["targets"])
        answer = parse_answer(format_answer(row["reasoning"], row["targets"]))
        assert (list(answer.names), answer.reasoning) == (row["targets"], row["reasoning"])


def test_the_numbers_asked_for_are_those_that_come(tmp_path):
    written = wishes_of("val", tmp_path, wishes=2, absent=3)
    assert sum(row["kind"] == "absent" for row in written) == 3 * 15 and len(written) == 5 * 15
    assert wishes_of("val", tmp_path, wishes=2, absent=3) == written
    assert wishes_of("val", tmp_path, wishes=2, absent=3, seed=1) != written
    assert not any(row["kind"] == "absent" for row in wishes_of("val", tmp_path, absent=0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: n["classes"].pop("violin"), r"says nothing of \['violin'\].*add them to 'classes'"),
        (lambda n: n["needs"].pop("bow"), r"'violin' fits \['bow'\], which 'needs' does not explain"),
        (lambda n: n["needs"]["bow"].pop("fact"), r"needs.bow.fact: Field required"),
        (lambda n: n["needs"]["bow"].update(say="x"), r"needs.bow.say: Extra inputs are not permitted"),
        (lambda n: n.clear(), r"classes: Field required"),
    ],
    ids=["class left out", "need left out", "no fact", "misspelt", "empty"],
)
def test_a_wrong_needs_file_is_named_and_nothing_is_written(change, says, tmp_path):
    needs = yaml.safe_load(NEEDS.read_text())
    change(needs)
    (tmp_path / "needs.yaml").write_text(yaml.safe_dump(needs))
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}/needs.yaml.*{says}"):
        wishes_of("train", tmp_path / "out", tmp_path / "needs.yaml")
    assert not (tmp_path / "out").exists()


def test_no_yaml_and_no_file_are_told(tmp_path):
    (tmp_path / "needs.yaml").write_text("classes: [")
    with pytest.raises(InputError, match="is no YAML"):
        read_needs(tmp_path / "needs.yaml")
    with pytest.raises(InputError, match="needs are a YAML file"):
        read_needs(tmp_path / "missing.yaml")


def test_a_crowd_has_no_box_of_its_own_and_is_never_asked_for(tmp_path):
    document = json.loads((SAMPLE / "val" / "annotations.json").read_text())
    for thing in document["annotations"]:
        thing["iscrowd"] = 1
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    write_wishes(tmp_path / "annotations.json", SAMPLE / "val" / "images", NEEDS, tmp_path / "out")
    assert {row["kind"] for row in rows(tmp_path / "out")} == {"absent"}
    for row in rows(tmp_path / "out"):
        assert not any(
            f" {name}?" in row["instruction"] or f" {name}." in row["instruction"] for name in row["present"]
        )
