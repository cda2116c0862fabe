"""JSON and JSON lines from a file that somebody else wrote, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from detgpt.errors import InputError

MAX_PIXEL = 1e6  # also keeps out infinity and, by comparing false, NaN


def read_text(file: Path, hint: str, encodings: Collection[str] = ("utf-8",)) -> str:
    """The file's text in the first of `encodings` that fits; `hint` tells what the file should be."""
    failure: Exception | None = None
    for encoding in encodings:
        try:
            return file.read_text(encoding=encoding)
        except (OSError, UnicodeDecodeError) as error:
            failure = error
    raise InputError(f"cannot read {file} ({failure}): {hint}") from failure


def read_json(file: Path, hint: str, encodings: Collection[str] = ("utf-8",)) -> Any:
    try:
        return json.loads(read_text(file, hint, encodings))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not JSON ({error}): {hint}") from error


def read_rows(file: Path, hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not empty."""
    for where, line in read_lines(file, hint):
        yield where, row_of(line, where)


def read_lines(file: Path, hint: str) -> list[tuple[str, str]]:
    """(where, text) of each line that is not empty; there must be one."""
    lines = [(n, line) for n, line in enumerate(read_text(file, hint).split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{file} holds no record: write one JSON object a line")
    return [(f"{file}, line {number}", line) for number, line in lines]


def row_of(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record is a JSON object, got {line[:60]!r}")
    return row


def text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text under `key`; it may be empty or missing only where there is a `default`."""
    value = row.get(key, default)
    if not isinstance(value, str) or not (value.strip() or default is not None):
        raise InputError(f"{where}: {key!r} must be a text, got {value!r}")
    return value


def names(row: Mapping[str, Any], key: str, where: str, default: list[str] | None = None) -> tuple[str, ...]:
    value = row.get(key, default)
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise InputError(f"{where}: {key!r} must be a list of names, got {value!r}")
    return tuple(value)


def synonyms(row: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    value = row.get("synonyms", {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: 'synonyms' must map targets to lists of names, got {value!r}")
    return {target: names(value, target, where) for target in value}


def boxes(row: Mapping[str, Any], key: str, where: str, default: list[Any] | None = None) -> list[list[float]]:
    value = row.get(key, default)
    if not isinstance(value, list) or not all(map(is_box, value)):
        raise InputError(f"{where}: {key!r} must hold [x0, y0, x1, y1] with x0 < x1 and y0 < y1 in pixels")
    return value


def is_box(box: Any) -> bool:
    """Whether `box` is a list [x0, y0, x1, y1] of finite numbers with an area."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and abs(value) < MAX_PIXEL for value in box)
        and box[0] < box[2]
        and box[1] < box[3]
    )
