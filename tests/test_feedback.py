"""Thumbs up and down: how clicks are kept, and that a model learns from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.reasoners import Turn
from detgpt.web.feedback import Answer, Clicks, Thumb
from finetune.cli import app
from finetune.data.convert import convert
from finetune.data.records import load_records

DESK, PARK = (Image.effect_noise((40, 32), spread).convert("RGB") for spread in (60, 90))
CUP, NOTHING, PAN = ('A desk.\nTargets: ["cup"]', "A desk.\nTargets: []", 'A desk.\nTargets: ["pan"]')


def answer(text: str, wish: str = "drink", history: tuple[Turn, ...] = ()) -> Answer:
    return Answer(Turn(wish, text), history, "picto")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clicks.jsonl").read_text(encoding="utf-8").splitlines()]


def clicked(folder: Path, *clicks: tuple[Image.Image, Answer, Thumb | None]) -> Path:
    kept = Clicks(folder)
    for click in clicks:
        kept.add(*click)
    return folder


# --- the folder ---


def test_a_click_keeps_picture_wish_answer_and_nothing_of_who_clicked(tmp_path: Path) -> None:
    turn = Turn("I am cold", "No coat.\nTargets: []")
    clicked(tmp_path / "clicks", (DESK, answer("café\n\ud800", history=(turn,)), "down"))
    [row] = rows(tmp_path / "clicks")
    assert row.pop("id") and row.pop("time").endswith("+00:00")
    image = row.pop("image")
    assert row == {
        "instruction": "drink",
        "history": [{"instruction": "I am cold", "answer": "No coat.\nTargets: []"}],
        "answer": "café\n\ud800",
        "model": "picto",
        "thumb": "down",
    }
    assert load_image(tmp_path / "clicks" / image).tobytes() == DESK.tobytes()


def test_many_visitors_click_at_once(tmp_path: Path) -> None:
    kept = Clicks(tmp_path)
    # Large enough that writing one takes a while, in which others want to.
    pictures = [Image.effect_noise((900, 700), spread).convert("RGB") for spread in (50, 60, 70, 80)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: kept.add(pictures[i % 4], answer("x" * 20_000, f"wish {i}"), "up"), range(200)))
    assert {row["instruction"] for row in rows(tmp_path)} == {f"wish {i}" for i in range(200)}
    assert len(rows(tmp_path)) == 200
    files = [file.relative_to(tmp_path).as_posix() for file in (tmp_path / "images").iterdir()]
    assert sorted(files) == sorted({row["image"] for row in rows(tmp_path)}) and len(files) == 4


def test_clicks_of_another_day_stay(tmp_path: Path) -> None:
    clicked(tmp_path, (DESK, answer(CUP), "up"))
    clicked(tmp_path, (DESK, answer(PAN), "down"))
    assert [row["thumb"] for row in rows(tmp_path)] == ["up", "down"]


def test_a_folder_that_cannot_be_written_to_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot store clicks in .*file.*Choose another folder"):
        Clicks(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    kept = Clicks(tmp_path)
    (tmp_path / "clicks.jsonl").unlink()
    (tmp_path / "clicks.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot store clicks in .*No space left"):
        kept.add(DESK, answer(CUP), "up")


# --- from clicks to preferences ---


def converted(folder: Path) -> tuple[set[tuple[Any, ...]], list[str]]:
    _, notes = convert(folder, folder.with_name("out"), format="clicks")
    records = load_records(folder.with_name("out"))
    assert len(records) == len({json.dumps(record) for record in records})
    pixels = {picture.tobytes(): name for name, picture in (("desk", DESK), ("park", PARK))}
    return {
        (pixels[load_image(record["image"]).tobytes()], record["instruction"], record["chosen"], record["rejected"])
        for record in records
    }, notes


def test_every_good_answer_meets_every_bad_one_to_the_same_wish(tmp_path: Path) -> None:
    folder = clicked(
        tmp_path / "clicks",
        (DESK, answer(CUP), "up"),
        (DESK, answer(CUP), "up"),  # by another visitor
        (DESK, answer(NOTHING), "down"),
        (DESK, answer(PAN), "down"),
        (PARK, answer(NOTHING), "up"),
        (PARK, answer(CUP), "down"),
        (PARK, answer(PAN, "cook"), "up"),  # nobody disliked another
    )
    pairs, notes = converted(folder)
    assert pairs == {
        ("desk", "drink", CUP, NOTHING),
        ("desk", "drink", CUP, PAN),
        ("park", "drink", NOTHING, CUP),
    }
    assert notes == ["1 answers have no other to their wish with the opposite thumb and were left out."]


def votes(text: str, thumbs: Iterable[Thumb]) -> list[tuple[Image.Image, Answer, Thumb]]:
    return [(DESK, answer(text), thumb) for thumb in thumbs]


def test_most_thumbs_count_and_of_one_visitor_the_last(tmp_path: Path) -> None:
    unsure, regretted = answer(NOTHING), answer("Oh.")
    folder = clicked(
        tmp_path / "clicks",
        *votes(CUP, ["up", "down", "up"]),
        *votes(PAN, ["up", "down"]),
        (DESK, unsure, "up"),
        (DESK, unsure, "down"),
        (DESK, regretted, "down"),
        (DESK, regretted, None),
    )
    pairs, notes = converted(folder)
    assert pairs == {("desk", "drink", CUP, NOTHING)}
    assert notes == ["1 answers have as many thumbs up as down and were left out."]


def test_a_wish_that_followed_others_is_left_out(tmp_path: Path) -> None:
    after = (Turn("I am cold", NOTHING),)
    folder = clicked(
        tmp_path / "clicks",
        (DESK, answer(CUP), "up"),
        (DESK, answer(NOTHING), "down"),
        (DESK, answer(PAN, history=after), "down"),
    )
    pairs, notes = converted(folder)
    assert pairs == {("desk", "drink", CUP, NOTHING)}
    assert notes == ["1 clicks are on wishes that followed others and were left out."]


def test_clicks_without_any_pair_leave_nothing_behind(tmp_path: Path) -> None:
    folder = clicked(tmp_path / "clicks", (DESK, answer(CUP), "up"))
    ran = CliRunner().invoke(app, ["data", "convert", str(folder), str(tmp_path / "out"), "--format", "clicks"])
    assert ran.exit_code == 1 and not (tmp_path / "out").exists()
    assert "gives no record as 'clicks'. 1 answers have no other to their wish" in ran.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "image": "a.png", "instruction": "drink"}, "line 1: 'answer' must be a text"),
        ({"id": "1", "image": "a.png", "instruction": "drink", "answer": "a", "thumb": 1}, "line 1: 'thumb' must be"),
    ],
)
def test_what_is_no_click_is_told_by_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "clicks.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        convert(tmp_path, tmp_path / "out", format="clicks")


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_model_learns_from_clicks(tmp_path: Path, tiny_reasoner_folder: Path, stage: str) -> None:
    from test_finetune_stages import recipe, trainer

    from finetune.recipe import run_recipe

    folder = clicked(tmp_path / "clicks", (DESK, answer(CUP), "up"), (DESK, answer(NOTHING), "down"))
    convert(folder, tmp_path / "preferences", format="clicks")
    settings = {"stage": stage, "model": tiny_reasoner_folder, "train": tmp_path / "preferences"}
    run_recipe(recipe(tmp_path, **settings, output=tmp_path / "run", trainer=trainer(max_steps=1)))
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]
    assert len(list((tmp_path / "run").glob("re*/model.safetensors"))) == 1  # reasoner/ or reward/
