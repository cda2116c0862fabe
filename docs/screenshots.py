"""Take the pictures of the web page that the documents show: docs/images/app-*.png.

    python docs/screenshots.py

Needs `pip install 'detgpt[demo]' playwright` and a Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from detgpt.web.launch import serve

IMAGES = Path(__file__).parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
WAIT = 300_000  # milliseconds


def main() -> None:
    page = serve(["picto", "small", "base", "large"], device="cpu", port=0, wait=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, size, scheme in (
            ("desktop", DESKTOP, "light"),
            ("desktop-dark", DESKTOP, "dark"),
            ("phone", PHONE, "light"),
            ("phone-dark", PHONE, "dark"),
        ):
            visitor = _visitor(browser, page.local_url, size, scheme)
            _ask(visitor, "I am thirsty")
            _take(visitor, name)
            if name == "desktop":
                _ask(visitor, "I want to read")
                visitor.get_by_role("button", name="Take it with you").click()
                visitor.wait_for_timeout(800)
                _take(visitor, "conversation", full_page=True)
                _video(visitor)
                _take(visitor, "video")
        browser.close()
    page.close()


def _visitor(browser: Browser, url: str, size: dict[str, int], scheme: str) -> Page:
    settings: dict = {"viewport": size, "color_scheme": scheme, "reduced_motion": "reduce"}
    visitor = browser.new_context(**settings).new_page()
    visitor.set_default_timeout(WAIT)
    visitor.goto(url)
    visitor.wait_for_function("document.fonts.status === 'loaded' && document.querySelector('#stage img')?.complete")
    return visitor


def _ask(visitor: Page, wish: str) -> None:
    answers = visitor.locator("#chat .bot")
    before = answers.count()
    visitor.locator("#wish textarea").fill(wish)
    visitor.locator("#detect").click()
    expect(answers).to_have_count(before + 1, timeout=WAIT)
    expect(visitor.locator("#detect")).to_have_text("Detect", timeout=WAIT)
    visitor.mouse.move(0, 0)
    visitor.wait_for_timeout(800)  # for the transitions


def _video(visitor: Page) -> None:
    visitor.get_by_role("tab", name="Video").click()
    visitor.locator("#clip-detect").click()
    expect(visitor.locator("#clip-result video")).to_be_visible(timeout=WAIT)
    visitor.wait_for_function("document.querySelector('#clip-result video').readyState > 3")
    visitor.locator("#clip-result video").evaluate("video => { video.pause(); video.currentTime = 4.5; }")
    visitor.mouse.move(0, 0)
    visitor.wait_for_timeout(1500)


def _take(visitor: Page, name: str, full_page: bool = False) -> None:
    path = IMAGES / f"app-{name}.png"
    visitor.evaluate("window.scrollTo(0, 0)")
    visitor.screenshot(path=path, full_page=full_page)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=2)  # a palette makes it a third as large
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
