"""BeaverTails' JSON lines (Ji et al. 2023, arXiv:2307.04657): an answer to a question, judged safe or not.

{"prompt": "...", "response": "...", "is_safe": false, "category": {"animal_abuse": false, "violence": true, …}}

Exchanges for a guard (`finetune.protector.exchanges`). The answers to one question become pairs where exactly one of
two is harmful, for `stage: harm_detector` to rank and `stage: detoxifier` to learn from; the others stay alone. A file
or a folder of .jsonl files, each of which becomes a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.readers import Source
from finetune.data.convert import Converted
from finetune.data.records import Row
from finetune.protector.exchanges import read_exchange

USES: frozenset[str] = frozenset()
CHECK = read_exchange
HINT = "BeaverTails' data is JSON lines with 'prompt', 'response', 'is_safe' and 'category'"


def convert(source: Source) -> Converted:
    converted = judged_parts(source.path, HINT, _row)
    return Converted({part: paired(rows) for part, rows in converted.parts.items()}, converted.notes)


def judged_parts(path: Path, hint: str, read: Callable[[Mapping[str, Any], str], Row]) -> Converted:
    """What `read` makes of each line of a file, or of those of each .jsonl file of a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no .jsonl file: {hint}")
    rows = {file: [read(row, where) for where, row in fields.read_rows(file, hint)] for file in files}
    return Converted({file.stem if path.is_dir() else "": of_file for file, of_file in rows.items()})


def paired(rows: list[Row]) -> list[Row]:
    """Rows of one answer as rows of two where the same question has a harmful one and a harmless one."""
    by_question: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        by_question.setdefault(row["question"], ([], []))[row["harmful"][0]].append(row)
    return [_together(*rows) for sides in by_question.values() for rows in zip_longest(*sides)]


def _together(safe: Row | None, harmful: Row | None) -> Row:
    if safe is None or harmful is None:
        return safe or harmful or {}
    return harmful | {key: [*harmful[key], *safe[key]] for key in ("answers", "harmful")}


def _row(entry: Mapping[str, Any], where: str) -> Row:
    return {
        "question": fields.text(entry, "prompt", where),
        "answers": [fields.text(entry, "response", where)],
        "harmful": [not boolean(entry, "is_safe", where)],
        "categories": sorted(kinds(entry.get("category", {}), where)),
    }


def kinds(about: Any, where: str) -> set[str]:
    """The names of the kinds of harm that are true of an answer."""
    if not isinstance(about, dict) or not all(isinstance(value, bool) for value in about.values()):
        raise InputError(f"{where}: the categories of harm map names to true and false, got {str(about)[:80]}")
    return {name for name, true in about.items() if true}


def boolean(entry: Mapping[str, Any], key: str, where: str) -> bool:
    value = entry.get(key)
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key!r} must be true or false, got {value!r}")
    return value
