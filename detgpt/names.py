"""The names of targets: what of a piece of an answer is the name, and which names can be used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

MAX_NAME_LENGTH = 80  # characters
EDGES = " \t\r\n\f\v\u00a0\u3000.,;:!?。，、；：！？*_`\"'“”„‘’「」『』«»[]{}【】［］"
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_BARE_ARTICLE = re.compile(r"(?:and|or|&|an?|the)\s+(?=\S)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[\d.]+%?")
_PLACEHOLDERS = {"object_names", "object names", "object_name"}
NOTHING = re.compile(
    r"(?:none|nothing|n/a|null|无|没有|なし"
    r"|no (?:(?:suitable|matching|such|relevant|related) )?(?:objects?|items?|targets?))"
    r"(?=$|[^\w\s/-]"
    r"|\s(?:of|in|on|at|here|that|this|to|is|are|can|fits?|match|matches|visible|found|suitable)\b)"
    r"|there (?:is|are) (?:no|none|nothing)\b",
    re.IGNORECASE,
)


def read_name(text: str, start: int, end: int, *, quoted: bool) -> tuple[str, tuple[int, int]]:
    """(name, its span in `text`) of the characters [start, end); the name is "" where there is none."""
    start, end = _core(text, start, end, _ARTICLE if quoted else _BARE_ARTICLE)
    raw = text[start:end]
    if not quoted:
        return ("" if _NUMBER.fullmatch(raw) else _collapse(raw)), (start, end)
    return (clean(_unescape(raw)) if "\\" in raw else _collapse(raw)), (start, end)


def clean(name: str) -> str:
    """A name without decoration, punctuation and articles at its edges, on one line."""
    start, end = _core(name, 0, len(name))
    return _collapse(name[start:end])


def is_usable(name: str) -> bool:
    """Whether a cleaned name can be a target: words, of a bearable length, and none for "nothing"."""
    return (
        0 < len(name) <= MAX_NAME_LENGTH
        and any(char.isalnum() for char in name)
        and name.casefold() not in _PLACEHOLDERS
        and not NOTHING.match(name)
    )


def distinct(named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Of pairs of a name and something of it the first of each name, ignoring case."""
    first: dict[str, tuple[str, T]] = {}
    for name, extra in named:
        first.setdefault(name.casefold(), (name, extra))
    return list(first.values())


def _core(text: str, start: int, end: int, article: re.Pattern[str] = _ARTICLE) -> tuple[int, int]:
    """`[start, end)` without decoration, punctuation and articles at its edges."""
    while start < end and (text[end - 1] in EDGES or text[end - 1] == "\\" or text[end - 1].isspace()):
        end -= 1
    while start < end:
        leading = article.match(text, start, end)
        if leading:
            start = leading.end()
        elif text[start] in EDGES or text[start].isspace():
            start += 1
        else:
            break
    return start, end


def _collapse(name: str) -> str:
    return " ".join(name.split())


def _unescape(raw: str) -> str:
    try:
        return str(json.loads(f'"{raw}"', strict=False))
    except ValueError:  # not JSON: the backslashes are the model's own
        return raw
