"""Thumbs as visitors meet them: a real Chromium on the real server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_app_browser import KITCHEN, Open, ask, browser, expect, launch, visit  # noqa: F401  (fixtures)

import detgpt
from detgpt.images import load_image


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "clicks"


@pytest.fixture(scope="module")
def server(tiny_pair_folder: Path, clicks: Path) -> Iterator[str]:
    page = launch.serve([str(tiny_pair_folder)], device="cpu", port=0, wait=False, feedback=clicks)
    yield page.local_url
    page.close()


def kept(clicks: Path, count: int) -> list[dict[str, Any]]:
    """The clicks in the folder, when there are so many."""
    file, end = clicks / "clicks.jsonl", time.monotonic() + 60
    while len(lines := file.read_text().splitlines()) < count and time.monotonic() < end:
        time.sleep(0.1)
    assert len(lines) == count
    return [json.loads(line) for line in lines]


def test_thumbs_are_stored_changed_and_taken_back(
    visit: Open,  # noqa: F811
    tiny_pair_folder: Path,
    clicks: Path,
) -> None:
    chat = detgpt.DetGPT.from_pretrained(tiny_pair_folder, device="cpu").chat(KITCHEN)
    drink, swim = chat.ask("drink").answer, chat.ask("swim").answer
    page = visit()
    expect(page.get_by_text("A thumb under an answer stores it here")).to_be_visible()
    ask(page, "drink")
    page.get_by_role("button", name="Like", exact=True).click()
    ask(page, "swim")
    expect(page.get_by_role("button", name="Liked", exact=True)).to_have_count(1)  # the first answer's, still
    page.get_by_role("button", name="Dislike", exact=True).nth(1).click()
    page.get_by_role("button", name="Liked", exact=True).click()
    up, down, back = kept(clicks, 3)
    assert load_image(clicks / up.pop("image")).tobytes() == load_image(KITCHEN).tobytes()
    assert re.fullmatch(r"[0-9a-f]{32}", up["id"]) and down["id"] != up["id"] == back["id"]
    assert up == {
        "id": up["id"],
        "instruction": "drink",
        "history": [],
        "answer": drink,
        "model": up["model"],
        "thumb": "up",
        "time": up["time"],
    }
    assert (down["instruction"], down["answer"], down["thumb"]) == ("swim", swim, "down")
    assert down["history"] == [{"instruction": "drink", "answer": drink}]
    assert back["thumb"] is None
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat")).to_be_hidden()
    ask(page, "swim")
    expect(page.get_by_role("button", name="Disliked", exact=True)).to_have_count(0)
    page.get_by_role("button", name="Like", exact=True).click()
    *_, fresh = kept(clicks, 4)
    assert (fresh["instruction"], fresh["history"], fresh["thumb"]) == ("swim", [], "up")
    assert len(list((clicks / "images").iterdir())) == 1


def test_names_are_not_rated(visit: Open, clicks: Path) -> None:  # noqa: F811
    before = (clicks / "clicks.jsonl").read_text()
    page = visit()
    page.get_by_label("Name the things").check()
    ask(page, "cup")
    page.get_by_role("button", name="Like", exact=True).click()
    expect(page.get_by_text("Only answers to wishes are stored")).to_be_visible()
    assert (clicks / "clicks.jsonl").read_text() == before


def test_a_click_that_cannot_be_stored_is_told(visit: Open, clicks: Path) -> None:  # noqa: F811
    page = visit()
    ask(page, "drink")
    file = clicks / "clicks.jsonl"
    aside = file.rename(clicks / "aside")
    file.mkdir()
    page.get_by_role("button", name="Like", exact=True).click()
    expect(page.get_by_text("cannot store clicks in")).to_be_visible()
    file.rmdir()
    aside.rename(file)


def test_without_the_option_there_are_no_thumbs(tiny_pair_folder: Path, browser: Any) -> None:  # noqa: F811
    plain = launch.serve([str(tiny_pair_folder)], device="cpu", port=0, wait=False)
    page = browser.new_page()
    page.goto(plain.local_url)
    ask(page, "drink")
    expect(page.get_by_text("A thumb under an answer")).to_have_count(0)
    expect(page.get_by_role("button", name="Like", exact=True)).to_have_count(0)
    page.close()
    plain.close()
