"""What is wrong with training data, before hours are spent on it; and what is in it.

report = check(["data/train", "data/val"], names={"cup", "chair"})
report.problems["a picture in several parts"]      # where
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detgpt.answer import parse_answer
from detgpt.errors import ImageError, InputError
from detgpt.evaluation import fields
from detgpt.images import image_key, load_image
from finetune.data.records import HINT, KEYS, Row, data_files, read_record

# Each problem, and whether it is an error; the others are worth a look.
PROBLEMS = {
    "an unusable record": True,
    "a picture that cannot be read": True,
    "a box without area": True,
    "a box outside its picture": True,
    "an unknown name": True,
    "an answer that does not name the targets": True,
    "a picture in several parts": True,
    "a record in several parts": True,
    "a record that is there twice": False,
    "a wish without boxes": False,
    "a box under 4 pixels wide or high": False,
    "an unknown key": False,
}
TOLERANCE = 1.0  # pixels that a box may reach over the edge: annotators' tools round
LEAST_SIDE = 4.0
SMALL, LARGE = 32**2, 96**2  # COCO's limits, pixels of area


@dataclass
class Part:
    """What one folder of data holds. kinds: records by what they say. pictures: (width, height) by content."""

    name: str
    records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    nothing_fits: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    box_sizes: Counter[str] = field(default_factory=Counter)
    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: dict[str, dict[tuple[str, ...], str]] = field(default_factory=lambda: {"pictures": {}, "records": {}})


@dataclass
class Report:
    """problems: for each kind of them, where. records: the readable ones with boxes, for looking at."""

    parts: list[Part] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=lambda: {problem: [] for problem in PROBLEMS})
    records: list[Row] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(len(places) for problem, places in self.problems.items() if PROBLEMS[problem])


def check(paths: Sequence[str | Path], names: Collection[str] | None = None) -> Report:
    """Look at every record and every picture of the folders `paths`, each one part (train, val, ...) of the data.

    names: those that labels, targets and present may have; any, unless given.
    Raises `InputError` for a place that is no training data at all.
    """
    checking = _Checking(Report(), None if names is None else {name.casefold() for name in names})
    short = [Path(path).resolve().name for path in paths]
    for path, name, file in zip(paths, short, data_files(paths), strict=True):
        part = Part(name if short.count(name) == 1 else str(path))
        checking.report.parts.append(part)
        for where, line in fields.read_lines(file, HINT):
            checking.check_line(part, where, line, file.parent)
    _find_leaks(checking.report)
    return checking.report


@dataclass
class _Checking:
    report: Report
    names: set[str] | None
    looked_at: dict[str, tuple[str, tuple[int, int]] | None] = field(default_factory=dict)  # by path

    def check_line(self, part: Part, where: str, line: str, folder: Path) -> None:
        part.records += 1
        try:
            row = fields.row_of(line, where)
            flat = [box for key in ("boxes", "ignored") for box in _boxes(row.get(key)) if not fields.is_box(box)]
            self._found("a box without area", where, *flat)
            record = None if flat else read_record(row, folder, where)
        except InputError as error:
            self._found("an unusable record", where, str(error).removeprefix(f"{where}: "))
            return
        self._found("an unknown key", where, *(key for key in row if key not in KEYS))
        if record is None:
            return
        look = self._look(record, where) if record["image"] else None
        if look:
            part.pictures[look[0]] = look[1]
            part.seen["pictures"].setdefault((look[0],), where)
            self._check_boxes(record, look[1], where)
        self._check_names(record, where)
        self._check_repeats(part, record, look[0] if look else str(record["image"]), where)
        self._count(part, record)
        if record["boxes"] is not None and look:
            self.report.records.append(record)

    def _found(self, problem: str, where: str, *details: Any) -> None:
        self.report.problems[problem] += [f"{where}: {detail}" for detail in details]

    def _look(self, record: Row, where: str) -> tuple[str, tuple[int, int]] | None:
        """The picture's content and size; each file is read once."""
        path = record["image"]
        if path not in self.looked_at:
            try:
                image = load_image(path)
                self.looked_at[path] = image_key(image), image.size
            except ImageError as error:
                self.looked_at[path] = None
                self._found("a picture that cannot be read", where, error)
        return self.looked_at[path]

    def _check_boxes(self, record: Row, image_wh: tuple[int, int], where: str) -> None:
        width, height = image_wh
        for box in (record["boxes"] or []) + (record["ignored"] or []):
            x0, y0, x1, y1 = box
            if min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE:
                self._found("a box outside its picture", where, f"{box} in {width} x {height}")
            elif min(x1 - x0, y1 - y0) < LEAST_SIDE:
                self._found("a box under 4 pixels wide or high", where, box)

    def _check_names(self, record: Row, where: str) -> None:
        if self.names is not None:
            said = dict.fromkeys(name for key in ("targets", "labels", "present") for name in record[key] or ())
            strangers = [name for name in said if name.casefold() not in self.names]
            self._found("an unknown name", where, *map(repr, strangers))
        targets = record["targets"]
        if targets is None:
            return
        if targets and record["boxes"] is None:
            self._found("a wish without boxes", where, targets)
        if record["answer"] is not None:
            named = parse_answer(record["answer"]).names
            if {name.casefold() for name in named} != {name.casefold() for name in targets}:
                detail = f"it names {list(named)}, the targets are {targets}"
                self._found("an answer that does not name the targets", where, detail)

    def _check_repeats(self, part: Part, record: Row, picture: str, where: str) -> None:
        said = record["text"] or "\n".join(
            turn["content"] for turn in record["messages"] if turn["role"] != "assistant"
        )
        answers = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        # Several captions of one picture answer the same request; several answers to one wish contradict each other.
        told = () if record["instruction"] else (*answers, str(record["chosen"]), str(record["rejected"]))
        key = (picture, " ".join(said.casefold().split()), *told)
        first = part.seen["records"].setdefault(key, where)
        if first != where:
            self._found("a record that is there twice", where, f"as {first}")

    def _count(self, part: Part, record: Row) -> None:
        part.kinds[_kind(record)] += 1
        part.nothing_fits += record["targets"] == []
        part.labels.update(record["labels"] or [])
        for x0, y0, x1, y1 in record["boxes"] or []:
            area = (x1 - x0) * (y1 - y0)
            part.box_sizes["small" if area < SMALL else "medium" if area < LARGE else "large"] += 1


def _boxes(value: Any) -> list[list[float]]:
    """What are four numbers in a list; whatever else is no box is for the reader of records to say."""
    rows = value if isinstance(value, list) else []
    return [box for box in rows if isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(record: Row) -> str:
    if record["chosen"] is not None:
        return "preference"
    if record["instruction"] is not None:
        return "wish"
    if record["messages"]:
        return "conversation"
    return "text" if record["text"] is not None else "boxes"


def _find_leaks(report: Report) -> None:
    """Pictures, and wishes about them, that an earlier part has as well."""
    for seen, problem in (
        ("pictures", "a picture in several parts"),
        ("records", "a record in several parts"),
    ):
        first: dict[tuple[str, ...], str] = {}
        for part in report.parts:
            for key, where in part.seen[seen].items():
                if key in first:
                    report.problems[problem].append(f"{where}: as {first[key]}")
            first = part.seen[seen] | first
