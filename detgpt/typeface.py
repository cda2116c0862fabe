"""Text on pictures: a font for any letters, measured, shortened and broken into lines.

Pillow's own font has ASCII and a few signs; other letters are looked for in the system's fonts. What no font has
is spelled without accents, or replaced.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile

from PIL import Image, ImageDraw, ImageFont

from detgpt.errors import InputError

# Punctuation that Pillow's own font lacks and reasoning is full of.
PLAIN = str.maketrans("\u2010\u2011\u2012\u2013\u2014\u2212\u2022", "------\u00b7")

# Searched for letters that Pillow's own font lacks; Noto and DejaVu on Linux, the rest on macOS and Windows.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "segoeui.ttf",
    "msyh.ttc",
    "YuGothR.ttc",
    "malgun.ttf",
)


@dataclass(frozen=True)
class Face:
    """A font at a size, which measures, shortens, breaks and writes one line of text."""

    font: ImageFont.FreeTypeFont

    def width(self, text: str) -> int:
        return -int(-self.font.getlength(text) // 1)

    def fit(self, text: str, room: int) -> str:
        """The text, cut with an ellipsis where it is wider than `room` pixels."""
        if self._fitting(text, room) == len(text):
            return text
        return text[: self._fitting(text, room - self.width("…"))].rstrip() + "…"

    def wrap(self, text: str, room: int, most: int) -> list[str]:
        """Lines of at most `room` pixels, `most` of them, broken between words where there are any."""
        lines = [""]
        for word in text[: room * most].split():  # a letter is a pixel wide at least
            joined = f"{lines[-1]} {word}".lstrip()
            if self.width(joined) <= room:
                lines[-1] = joined
                continue
            lines += [word] if lines[-1] else []
            lines[-1] = word
            while (cut := max(1, self._fitting(lines[-1], room))) < len(lines[-1]):
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
            if len(lines) > most:
                return [*lines[: most - 1], self.fit(f"{lines[most - 1]} …", room)]
        return lines if lines[0] else []

    def write(self, canvas: Image.Image, x: int, middle: int, text: str, colour: str) -> None:
        """Write with capitals centred on the row `middle`: the eye centres on them, not on descenders."""
        cap_height = -self.font.getbbox("H", anchor="ls")[1]
        baseline = middle + round(cap_height / 2)
        ImageDraw.Draw(canvas).text((x, baseline), text, fill=colour, font=self.font, anchor="ls")

    def _fitting(self, text: str, room: int) -> int:
        """How many leading characters fit into `room`, one by one: measuring whole texts again is slow."""
        ends = accumulate(_advance(self.font, char) for char in text)
        return sum(1 for _ in takewhile(lambda end: end <= room, ends))


@lru_cache(maxsize=8192)
def _advance(font: ImageFont.FreeTypeFont, char: str) -> float:
    return font.getlength(char)


def legible(text: str, size: int, font: str | None, instead: str = "") -> tuple[str, Face]:
    """The text as it can be written, and the font that writes most of it.

    Letters that no font here has lose their accents or become "?"; where nothing is left, `instead` stands.
    """
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    # Control and format characters and lone surrogates have no picture, and some stop the font engine.
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char)[0] != "C")
    text = " ".join(text.split())
    best = font
    if not all(_has(font, char) for char in text):
        best = max((font, *_system_fonts()), key=lambda name: sum(_has(name, char) for char in text))
    written = "".join(_nearest(best, char) for char in text)
    if text and not written.strip("? ") and text != written:
        written, best = instead, font
    return written, Face(_load(best, size))


def _nearest(font: str | None, char: str) -> str:
    plain = unicodedata.normalize("NFKD", char)[0]
    return next((letter for letter in (char, plain) if _has(font, letter)), "?")


@lru_cache(maxsize=8192)
def _has(font: str | None, char: str) -> bool:
    """Whether the font draws this letter as anything but its sign for missing ones."""
    if char.isspace():
        return True
    face = _load(font, 16)
    drawn, missing = face.getmask(char), face.getmask("\U0010ffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


@lru_cache(maxsize=64)
def _load(font: str | None, size: int) -> ImageFont.FreeTypeFont:
    if font is not None:
        return ImageFont.truetype(font, size)
    bundled = ImageFont.load_default(size)
    if not isinstance(bundled, ImageFont.FreeTypeFont):
        raise InputError("this Pillow was built without FreeType: pip install --force-reinstall pillow")
    return bundled


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    found = []
    for name in SYSTEM_FONTS:
        try:
            found.append(str(ImageFont.truetype(name, 16).path))
        except OSError:
            continue  # not installed
    return tuple(found)
