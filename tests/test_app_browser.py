"""The page as its visitors meet it: a real Chromium on the real server with the built-in model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import detgpt

REPOSITORY = Path(__file__).parents[1]
KITCHEN = REPOSITORY / "examples" / "kitchen.png"
WAIT = 90_000  # milliseconds; a busy machine takes its time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "av", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
if MISSING and os.environ.get("CI"):
    raise RuntimeError(f"the browser tests need {', '.join(MISSING)}; install them, in CI nothing is skipped")
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}", allow_module_level=True)

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from detgpt.web import launch  # noqa: E402

expect.set_options(timeout=WAIT)

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(tiny_pair_folder: Path) -> Iterator[str]:
    """The page with the built-in model and, at choice, the tiny pair, whose answers are known."""
    page = launch.serve(["picto", str(tiny_pair_folder)], device="cpu", port=0, wait=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: str) -> Iterator[Open]:
    """A new visitor's page; at the end, no page may have complained or asked anybody but the server."""
    contexts, complaints = [], []

    def note(request: Any) -> None:
        if not request.url.startswith((server, "data:", "blob:")):
            complaints.append(f"asked {request.url}")

    def open_page(**settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(server)
        expect(page.get_by_alt_text("kitchen.png")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Page, wish: str) -> None:
    """Ask in the field, and wait for the answer."""
    field, before = page.locator("#wish textarea"), page.locator("#chat .bot").count()
    field.fill(wish)
    field.press("Enter")
    expect(page.locator("#chat .bot")).to_have_count(before + 1)
    expect(page.locator("#detect")).to_have_text("Detect")
    expect(field).to_have_value("")


def open_part(page: Page, title: str, tab: int = 0) -> None:
    """Open it as a person does: Gradio sets what has just appeared once more in the next frame."""
    page.locator(".tabitem").nth(tab).get_by_role("button", name=title).click()
    page.evaluate("""() => new Promise((done) => {
        requestAnimationFrame(() => requestAnimationFrame(() => requestIdleCallback(() => done())));
    })""")


def choose_tiny(page: Page, folder: Path) -> None:
    open_part(page, "Advanced")
    page.locator("#model").get_by_label(str(folder)).check()
    expect(page.locator("#least input[type=number]")).to_have_value("0")  # its own threshold


def test_one_click_answers_the_wish_that_waits_there(visit: Open) -> None:
    page = visit()
    expect(page).to_have_title("DetGPT")
    expect(page.get_by_label("What do you need?")).to_have_value("I am thirsty")
    page.get_by_role("button", name="Detect").click()
    expect(page.locator(".box").first).to_be_visible()
    result = detgpt.detect(KITCHEN, "I am thirsty")
    expect(page.locator("#chat")).to_contain_text(result.reasoning)
    expect(page.locator(".box")).to_have_count(len(result))
    tags = page.locator(".tag").all_inner_texts()
    assert sorted(tags) == sorted(f"{label} {score:.2f}" for _, score, label in result)
    box = page.locator(".box", has_text=result.labels[0]).first.bounding_box()
    picture = page.locator(".picture").bounding_box()
    assert box and picture
    scale = picture["width"] / 960
    x0, y0, *_ = result.boxes[0].tolist()
    assert abs(box["x"] - picture["x"] - x0 * scale) < 2 and abs(box["y"] - picture["y"] - y0 * scale) < 2


def test_a_target_lights_up_its_boxes_with_mouse_and_keyboard(visit: Open) -> None:
    page = visit()
    page.get_by_label("Name the things").check()
    expect(page.get_by_label("What should be found?")).to_be_visible()
    ask(page, "coffee, soda")
    coffee = page.get_by_role("button", name="coffee")
    boxes = {name: page.locator(".box", has_text=name).first for name in ("coffee", "soda")}
    page.mouse.move(0, 0)
    coffee.hover()
    expect(boxes["coffee"]).to_have_css("opacity", "1")
    expect(boxes["soda"]).to_have_css("opacity", "0.15")
    page.mouse.move(0, 0)
    expect(boxes["soda"]).to_have_css("opacity", "1")
    coffee.focus()
    page.keyboard.press("Enter")
    expect(coffee).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(boxes["soda"]).to_have_css("opacity", "0.15")  # kept
    coffee.focus()
    page.keyboard.press("Escape")
    expect(coffee).to_have_attribute("aria-pressed", "false")
    expect(boxes["soda"]).to_have_css("opacity", "1")


def test_a_follow_up_knows_the_wish_before_it(visit: Open) -> None:
    page = visit()
    ask(page, "I am thirsty")
    page.get_by_role("button", name="I want to read").click()  # a suggestion asks by itself
    expect(page.locator("#chat .bot")).to_have_count(2)
    expect(page.locator("#detect")).to_have_text("Detect")
    chat = detgpt.DetGPT.from_pretrained("picto", device="cpu").chat(KITCHEN)
    chat.ask("I am thirsty")
    expected = chat.ask("I want to read")
    expect(page.locator("#chat .bot").nth(1)).to_contain_text(expected.reasoning)
    expect(page.locator(".box")).to_have_count(len(expected))
    open_part(page, "Take it with you")
    expect(page.locator("#code")).to_contain_text('result = chat.ask("I want to read")')
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat")).to_be_hidden()
    expect(page.locator(".box")).to_have_count(0)
    ask(page, "I want to read")
    alone = detgpt.detect(KITCHEN, "I want to read")
    expect(page.locator("#chat .bot")).to_contain_text(alone.reasoning)


def test_a_threshold_moves_the_boxes_at_once(visit: Open) -> None:
    page = visit()
    page.get_by_label("Name the things").check()
    ask(page, "coffee, soda, beer, strawberry")
    open_part(page, "Advanced")
    names = ["coffee", "soda", "beer", "strawberry"]
    counts = set()
    for least in (0.05, 0.5, 0.95):
        page.locator("#least input[type=number]").fill(str(least))
        page.keyboard.press("Enter")
        expected = detgpt.detect(KITCHEN, names=names, box_threshold=least)
        expect(page.locator(".box")).to_have_count(len(expected))
        counts.add(len(expected))
    assert len(counts) > 1
    open_part(page, "Take it with you")
    expect(page.locator("#code")).to_contain_text("box_threshold=0.95")


def test_nothing_fits_is_a_friendly_answer(visit: Open, tiny_pair_folder: Path) -> None:
    page = visit()
    choose_tiny(page, tiny_pair_folder)
    ask(page, "swim")
    expect(page.locator("#chat .bot")).to_contain_text("Only a desk.")
    expect(page.locator("#chat .bot")).to_contain_text("Nothing here fits.")
    expect(page.locator(".box")).to_have_count(0)


def test_another_model_starts_anew(visit: Open, tiny_pair_folder: Path) -> None:
    page = visit()
    ask(page, "I am thirsty")
    choose_tiny(page, tiny_pair_folder)
    expect(page.locator("#chat")).to_be_hidden()
    ask(page, "drink")
    expect(page.locator("#chat .bot")).to_contain_text("A desk.")
    expect(page.locator(".box").first).to_be_attached()


def test_an_empty_field_is_asked_for(visit: Open) -> None:
    page = visit()
    page.locator("#wish textarea").fill(" ")
    page.get_by_role("button", name="Detect").click()
    expect(page.get_by_text("Write it into the field")).to_be_visible()
    expect(page.locator("#detect")).to_be_enabled()


def test_bad_uploads_are_refused_and_a_good_one_is_taken(visit: Open, tmp_path: Path) -> None:
    page = visit()
    ask(page, "I am thirsty")
    page.get_by_role("button", name="Your own").click()
    field = page.locator("#upload input[type=file]")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(KITCHEN.read_bytes()[:90_000])
    Image.new("RGB", (20_000, 40)).save(tmp_path / "wide.png")
    for name, says in (
        ("text.png", "'text.png' is text, not an image"),
        ("cut.png", "'cut.png' is damaged, cut short"),
        ("wide.png", "'wide.png' is 20,000 x 40 pixels"),
    ):
        field.set_input_files(tmp_path / name)
        expect(page.get_by_text(says)).to_be_visible()
        expect(page.get_by_text("Drop Image Here")).to_be_visible()  # ready for another try
        expect(page.get_by_text("Traceback")).to_have_count(0)
    page.get_by_role("button", name="Back to the picture").click()
    expect(page.locator(".box").first).to_be_visible()  # nothing is lost
    page.get_by_role("button", name="Your own").click()
    Image.open(KITCHEN).convert("RGB").save(tmp_path / "my kitchen.jpg", quality=95)
    field.set_input_files(tmp_path / "my kitchen.jpg")
    expect(page.get_by_alt_text("my kitchen.jpg")).to_be_visible()
    expect(page.locator("#chat")).to_be_hidden()  # another picture, another conversation
    expect(page.get_by_text("knows drawn pictograms, not photographs")).to_be_visible()
    ask(page, "I am thirsty")
    expect(page.locator(".box").first).to_be_visible()
    open_part(page, "Take it with you")
    expect(page.locator("#code")).to_contain_text('detgpt.detect("my kitchen.jpg", "I am thirsty")')


def test_two_visitors_do_not_meet(visit: Open) -> None:
    first, second = visit(), visit()
    second.get_by_role("button", name="Example: park").click()
    expect(second.get_by_alt_text("park.png")).to_be_visible()
    for page, names in ((first, "coffee, soda"), (second, "umbrella")):
        page.get_by_label("Name the things").check()
        expect(page.get_by_label("What should be found?")).to_be_visible()
        page.locator("#wish textarea").fill(names)
    first.locator("#wish textarea").press("Enter")
    second.locator("#wish textarea").press("Enter")
    for page, names in ((second, {"umbrella"}), (first, {"coffee", "soda"})):
        expect(page.locator(".targets")).to_be_visible()
        labels = {re.sub(r" [\d.]+$", "", tag) for tag in page.locator(".tag").all_inner_texts()}
        assert labels == names
        expect(page.locator("#chat .user")).to_have_count(1)


def test_png_and_json_can_be_saved(visit: Open, tmp_path: Path) -> None:
    page = visit()
    ask(page, "I am thirsty")
    open_part(page, "Take it with you")
    saved = {}
    for kind in ("PNG", "JSON"):
        with page.expect_download(timeout=WAIT) as download:
            page.get_by_role("button", name=f"Save {kind}").click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    assert {path.name for path in saved.values()} == {"kitchen-detgpt.png", "kitchen-detgpt.json"}
    result = detgpt.detect(KITCHEN, "I am thirsty")
    assert json.loads(saved["JSON"].read_text()) == result.to_dict()
    with Image.open(saved["PNG"]) as picture:
        assert picture.convert("RGB").tobytes() == result.draw().tobytes()


def test_the_page_fits_a_phone_in_the_dark(visit: Open) -> None:
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True, is_mobile=True)
    ask(page, "I am thirsty")
    for title in ("Take it with you", "Advanced"):
        open_part(page, title)
    expect(page.locator("#least")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    red, green, blue = page.evaluate(
        "getComputedStyle(document.querySelector('.gradio-container')).backgroundColor.match(/\\d+/g).slice(0, 3)"
    )
    assert max(int(red), int(green), int(blue)) < 50


def test_everything_to_touch_has_a_name(visit: Open) -> None:
    page = visit()
    ask(page, "I am thirsty")
    for title in ("Take it with you", "Advanced"):
        open_part(page, title)
    nameless = page.evaluate("""() => {
        const text = (part) => part.textContent.trim();
        const named = (part) => text(part) || part.getAttribute("aria-label") || part.title
            || part.getAttribute("aria-labelledby") || [...(part.labels ?? [])].some(text);
        return [...document.querySelectorAll("button, input, textarea, select, a")]
            .filter((part) => part.checkVisibility() && !named(part)).map((part) => part.outerHTML);
    }""")
    assert nameless == []
    assert page.locator("img:visible:not([alt])").count() == 0


def test_the_keyboard_alone_is_enough(visit: Open) -> None:
    page = visit()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").strip() == "Detect":
            break
    page.keyboard.press("Enter")
    expect(page.locator(".box").first).to_be_visible()


def test_a_clip_gets_its_boxes(visit: Open) -> None:
    page = visit()
    page.get_by_role("tab", name="Video").click()
    video = page.get_by_role("tabpanel").filter(has=page.locator("#clip"))
    open_part(page, "Advanced", tab=1)
    video.get_by_label("number input for Frames a second").fill("1")
    page.keyboard.press("Enter")
    page.locator("#clip-detect").click()
    expect(page.locator("#clip-progress progress")).to_be_visible()
    expect(page.locator("#clip-result video")).to_be_visible(timeout=2 * WAIT)
    page.wait_for_function("document.querySelector('#clip-result video').readyState > 1", timeout=WAIT)
    assert page.locator("#clip-result video").evaluate("video => video.duration") == pytest.approx(6, abs=0.5)
    expect(page.locator("#clip-story")).to_contain_text("0.0 s: ")
    expect(page.locator("#clip-story")).to_contain_text("3.0 s: ")  # where the second scene begins
    expect(page.locator("#clip-progress progress")).to_have_count(0)
