"""`detgpt-finetune data check`: what is wrong with training data, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_finetune_data import CUP, NOTHING, SEEN, TALK, WISH, write
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.check import check


def problems(*paths: Path, **options: Any) -> dict[str, list[str]]:
    return {problem: places for problem, places in check(paths, **options).problems.items() if places}


def other(box: list[float]) -> dict[str, Any]:
    return {**WISH, "instruction": "another", "boxes": [box]}


@pytest.mark.parametrize(
    ("row", "problem", "told"),
    [
        ({"image": "a.png"}, "an unusable record", "a record has one of"),
        ({**WISH, "boxes": [], "labels": []}, "an unusable record", "every target needs a box"),
        ({**WISH, "boxes": "all"}, "an unusable record", "'boxes' must hold"),
        ({**WISH, "image": "c.png"}, "a picture that cannot be read", "c.png"),
        ({**WISH, "image": "broken.png"}, "a picture that cannot be read", "broken.png"),
        (other([30, 10, 30, 30]), "a box without area", "[30, 10, 30, 30]"),
        (other([10, 10, 92, 30]), "a box outside its picture", "in 90 x 60"),
        (other([-2, 10, 30, 30]), "a box outside its picture", "-2"),
        (other([10, 10, 30, 12]), "a box under 4 pixels wide or high", "12.0"),
        ({**WISH, "answer": '["chair"]'}, "an answer that does not name the targets", "it names ['chair']"),
        ({"image": "a.png", "instruction": "sit", "targets": ["sofa"]}, "a wish without boxes", "sofa"),
        ({**WISH, "anwser": "[cup]"}, "an unknown key", "anwser"),
    ],
)
def test_each_problem_is_found_and_placed(tmp_path: Path, row: dict[str, Any], problem: str, told: str):
    write(tmp_path, {**NOTHING, "image": "b.png"}, row)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    [(found, [place])] = problems(tmp_path).items()
    assert found == problem
    assert place.startswith(f"{tmp_path / 'data.jsonl'}, line 2: ") and told in place


def test_what_is_right_has_no_problem(tmp_path: Path):
    rows = [WISH, NOTHING, other([9.5, 0, 90.9, 60.5]), {"image": "a.png", "messages": TALK}, {"text": "plain"}]
    rows += [{"messages": TALK}, {"image": "b.png", "boxes": [CUP], "labels": ["cup"]}]
    assert problems(write(tmp_path, *rows)) == {}
    assert problems(SEEN) == {}


def test_a_line_that_is_no_json_does_not_hide_the_rest(tmp_path: Path):
    file = write(tmp_path, WISH, WISH) / "data.jsonl"
    file.write_text("{broken\n" + file.read_text())
    assert {problem: len(places) for problem, places in problems(tmp_path).items()} == {
        "an unusable record": 1,
        "a record that is there twice": 1,
    }


def test_names_are_held_against_those_that_are_known(tmp_path: Path):
    write(tmp_path, WISH)
    assert problems(tmp_path, names={"Cup", "chair"}) == {}
    assert problems(tmp_path, names={"cup"}) == {"an unknown name": [f"{tmp_path / 'data.jsonl'}, line 1: 'chair'"]}


def test_a_record_is_there_twice_whatever_its_answer_and_its_files_name(tmp_path: Path):
    write(tmp_path, WISH, {**WISH, "image": "copy.png", "instruction": "i am  thirsty", "reasoning": "A cup."})
    Image.open(tmp_path / "a.png").save(tmp_path / "copy.png", compress_level=0)
    assert list(problems(tmp_path)) == ["a record that is there twice"]
    assert len(check([tmp_path]).parts[0].pictures) == 1
    caption = {"image": "a.png", "messages": TALK}
    another = {"image": "a.png", "messages": [TALK[0], {"role": "assistant", "content": "Hey."}]}
    assert problems(write(tmp_path, caption, another)) == {}, "a picture may have several captions"
    assert list(problems(write(tmp_path, caption, caption))) == ["a record that is there twice"]


def test_a_picture_that_leaks_into_another_part_is_found_by_its_content(tmp_path: Path):
    write(tmp_path / "train", WISH, NOTHING)
    write(tmp_path / "val", {**WISH, "image": "copy.png"}, {**WISH, "image": "b.png"})
    Image.open(tmp_path / "train/a.png").save(tmp_path / "val/copy.png", compress_level=0)
    first = f"{tmp_path / 'val/data.jsonl'}, line 1: as {tmp_path / 'train/data.jsonl'}, line 1"
    assert problems(tmp_path / "train", tmp_path / "val") == {
        "a picture in several parts": [first],
        "a record in several parts": [first],
    }
    write(tmp_path / "val", {**WISH, "image": "a.png", "instruction": "a drink"})
    assert list(problems(tmp_path / "train", tmp_path / "val")) == ["a picture in several parts"]
    assert problems(tmp_path / "val") == {}


def test_what_the_parts_hold_is_counted(tmp_path: Path):
    box = {"image": "a.png", "boxes": [CUP, [0, 0, 40, 40]], "labels": ["cup", "chair"]}
    preference = {"messages": TALK[:1], "chosen": "Hi.", "rejected": "Go."}
    [part] = check([write(tmp_path, WISH, NOTHING, box, {"text": "plain"}, {"messages": TALK}, preference)]).parts
    assert part.kinds == {"wish": 2, "boxes": 1, "text": 1, "conversation": 1, "preference": 1}
    assert (part.records, part.nothing_fits, len(part.pictures)) == (6, 1, 1)
    assert (part.labels, part.box_sizes) == ({"cup": 2, "chair": 1}, {"small": 2, "medium": 1})


# --- the command ---


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command_fails_if_and_only_if_there_is_an_error(tmp_path: Path):
    write(tmp_path / "good", WISH, {**WISH, "anwser": ""})
    ran = run(tmp_path / "good")
    assert ran.exit_code == 0 and "0 errors, 2 warnings" in ran.stderr and "an unknown key" in ran.stdout
    write(tmp_path / "bad", WISH, other([10, 10, 200, 30]))
    ran = run(tmp_path / "bad")
    assert ran.exit_code == 1 and "1 errors, 0 warnings" in ran.stderr and "a box outside its picture" in ran.stdout
    assert run(tmp_path / "nowhere").exit_code == 1


def test_the_known_names_come_from_an_annotation_or_a_list(tmp_path: Path):
    write(tmp_path, WISH)
    (tmp_path / "classes.txt").write_text("cup\n\nchair\n")
    categories = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "chair", "synonyms": ["seat"]}]}
    (tmp_path / "coco.json").write_text(json.dumps(categories))
    assert run(tmp_path, "--classes", tmp_path / "classes.txt").exit_code == 0
    ran = run(tmp_path, "--annotations", tmp_path / "coco.json")
    assert ran.exit_code == 1 and "an unknown name" in ran.stdout


def test_the_page_shows_pictures_wishes_and_problems_and_escapes_them(tmp_path: Path):
    write(tmp_path, {**WISH, "reasoning": "A <b>desk</b>."}, NOTHING, other([10, 10, 200, 30]), {"text": "plain"})
    assert run(tmp_path, "--page", tmp_path / "page.html", "--samples", 2).exit_code == 1
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "2 of 3 records with boxes" in page and "1 case of a box outside its picture" in page
    run(tmp_path, "--page", tmp_path / "page.html", "--samples", 9)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "“I am thirsty”" in page and "A &lt;b&gt;desk&lt;/b&gt;." in page and "nothing fits" in page
    assert "<b>desk" not in page and "http" not in page.partition("</style>")[2]
