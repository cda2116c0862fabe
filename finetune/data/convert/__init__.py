"""Other people's formats become ours. One file here is one format, and its name is the `--format`.

    convert("export.json", "data/kitchen", format="labelstudio", images="pictures/")

A format's file has `USES` (which of annotations and images it takes) and `convert(source)`, which gives records as
`finetune.data.records` has them, `image` being the picture's path as it lies now. A format of other records says with
`CHECK` who reads them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.folder import DATA_FILE
from finetune.data.records import Row, read_record

FORMATS = tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))
CAPTION_REQUEST = "Describe the image in one sentence."


@dataclass
class Converted:
    """Records, by the part of the data that they belong to ("" where it has no parts), and notes in sentences."""

    parts: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, rows: list[Row], *notes: str) -> Converted:
        return cls({"": rows}, [note for note in notes if note])


def convert(
    path: str | Path,
    output: str | Path,
    *,
    format: str,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    copy: bool = False,
) -> tuple[dict[str, int], list[str]]:
    """Write what is at `path` into the new folder `output`; returns the number of records in each part, and notes.

    images: the folder of the pictures. annotations: a COCO file with the boxes, for formats without.
    copy: copy the pictures into `output`; else the records say where they lie now.

    A record that is unusable or whose picture is missing is left out, and a note says so. Raises `InputError` for an
    unknown format, wrong data, nothing left, or an `output` that is there already; nothing is then left behind.
    """
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}: choose one of {', '.join(FORMATS)}")
    places = {"annotations": annotations, "images": images}
    given = {name: Path(place) for name, place in places.items() if place is not None}
    source = Source(Path(path), annotations=given.get("annotations"), images=given.get("images"))
    if not source.path.exists():
        raise InputError(f"there is no {path}: give the file or folder to convert")
    module = import_module(f"{__name__}.{format}")
    if unused := sorted(given.keys() - module.USES):
        raise InputError(f"the format {format!r} takes no {' and no '.join(unused)}: leave it out")
    converted: Converted = module.convert(source)
    notes = list(converted.notes)
    counts = {}
    with new_folder(Path(output)) as folder:
        for part, rows in converted.parts.items():
            check = getattr(module, "CHECK", _check)
            writer = _Writer(folder / part, Path(output) / part, source.images, copy, check)
            counts[part] = writer.write(rows)
            notes += [f"{part}: {note}" if part else note for note in writer.notes()]
        if not any(counts.values()):
            raise InputError(f"{path} gives no record as {format!r}. {' '.join(notes)}".strip())
    return counts, notes


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary neighbour of `output`, which takes its place when all is well and is removed otherwise."""
    if output.exists():
        raise InputError(f"{output} is there already: choose a new folder")
    partial = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}. Choose another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def caption_messages(caption: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": CAPTION_REQUEST}, {"role": "assistant", "content": caption.strip()}]


def _check(row: Row, where: str) -> None:
    read_record(row, Path(), where)


class _Writer:
    """Writes records into `folder`, which will be `final` in the end."""

    def __init__(
        self, folder: Path, final: Path, images: Path | None, copy: bool, check: Callable[[Row, str], Any]
    ) -> None:
        self._folder, self._final, self._images, self._copy, self._check = folder, final, images, copy, check
        self._copies: dict[Path, str] = {}
        self._missing: Counter[str] = Counter()
        self._unusable: Counter[str] = Counter()

    def write(self, rows: list[Row]) -> int:
        self._folder.mkdir(exist_ok=True)
        kept = 0
        with (self._folder / DATA_FILE).open("w", encoding="utf-8") as lines:
            for number, row in enumerate(rows, start=1):
                image = row.get("image")
                if image is not None and not Path(image).is_file():
                    self._missing[str(image)] += 1
                    continue
                try:
                    self._check(row, f"record {number}")
                except InputError as error:
                    self._unusable[str(error)] += 1
                    continue
                placed: dict[str, Any] = row if image is None else row | {"image": self._place(Path(image))}
                lines.write(json.dumps(placed, ensure_ascii=False) + "\n")
                kept += 1
        return kept

    def notes(self) -> list[str]:
        causes = {"their picture is not there": self._missing, "they are no usable records": self._unusable}
        return [
            f"{sum(found.values())} records were left out because {why}; the first: {next(iter(found))}."
            for why, found in causes.items()
            if found
        ]

    def _place(self, image: Path) -> str:
        """The picture's path as the record says it."""
        if not self._copy:
            return Path(os.path.relpath(image.resolve(), self._final.resolve())).as_posix()
        if image not in self._copies:
            inside = self._images is not None and image.is_relative_to(self._images)
            name = image.relative_to(self._images or "") if inside else Path(image.name)
            if f"images/{name.as_posix()}" in self._copies.values():  # of two folders, the same name
                name = name.with_stem(f"{name.stem}-{len(self._copies)}")
            target = self._folder / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
            self._copies[image] = f"images/{name.as_posix()}"
        return self._copies[image]
