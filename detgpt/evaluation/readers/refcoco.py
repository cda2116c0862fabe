"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them: `refs(unc).p` and `instances.json`.

    detgpt eval "refcoco/refs(unc).p" --split testA --images train2014

The path is the refs file, or the folder if it holds only one; `instances.json` lies beside it unless
--annotations says otherwise. The pictures lie in --images, else where the authors' `refer` tool has them
(`../images/mscoco/images/train2014`), else in `images/`. --split is val, testA, testB, test or train; val
unless given. Every sentence is a wish of its own, as in the published Acc@0.5; its truth is the one box.

The refs are a pickle, a format that can run any code when it is read. It is read here by an unpickler that
knows plain values only (lists, dicts, texts, numbers) and refuses everything else, so nothing is ever called.
The same list as JSON, `refs(unc).json`, is read as well.

A phrase such as "the man on the left" tells which one of several is meant, so its category is not what a
reasoner should name: names are not judged, boxes are.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import Annotations, read_annotations
from detgpt.evaluation.data import Dataset, Record
from detgpt.evaluation.readers.coco import image_folder

if TYPE_CHECKING:
    from detgpt.evaluation.readers import Source

USES = frozenset({"annotations", "images", "split"})
DEFAULT_SPLIT = "val"
MAX_BYTES = 500_000_000  # the largest published file has about 60 MB


def recognises(path: Path) -> bool:
    return bool(_refs_files(path))


def read(source: Source) -> Dataset:
    refs, annotations, folder, file = open_refs(source)
    split = source.split or DEFAULT_SPLIT
    splits = sorted({str(ref.get("split")) for ref in refs})
    if split not in splits:
        raise InputError(f"{file} has no split {split!r}: choose one of {', '.join(splits)}")
    records = tuple(records_of([ref for ref in refs if ref.get("split") == split], annotations, folder, file))
    note = "" if source.split else f"{file.name}: read split {split} of {', '.join(splits)}."
    return Dataset(records, (*annotations.notes, *([note] if note else [])))


def open_refs(source: Source) -> tuple[list[dict[str, Any]], Annotations, Path, Path]:
    """The refs of all splits, the annotation, the folder of the pictures, and the file of the refs."""
    files = _refs_files(source.path)
    if len(files) != 1:
        there = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{source.path} must hold one refs(...).p or refs(...).json, but holds {there}: give the file")
    file = files[0]
    published = file.parent.parent / "images/mscoco/images/train2014"
    folder = source.images or (published if published.is_dir() else image_folder(file.parent))
    return _read_refs(file), read_annotations(source.annotations or file.parent / "instances.json"), folder, file


def records_of(refs: list[dict[str, Any]], annotations: Annotations, folder: Path, file: Path) -> Iterator[Record]:
    """Each sentence of `refs` as a wish for its one box."""
    for ref in refs:
        where = f"{file}, ref {ref.get('ref_id')!r}"
        picture = annotations.picture(ref.get("image_id"), where)
        things = [thing for thing in picture.things if thing.id == ref.get("ann_id")]
        sentences = ref.get("sentences")
        if len(things) != 1:
            raise InputError(f"{where}: picture {picture.id!r} has no annotation {ref.get('ann_id')!r} with a box")
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise InputError(f"{where}: 'sentences' must be a list of objects")
        for sentence in sentences:
            phrase = fields.text(sentence, "sent", where)
            yield picture.record_of(things, folder, phrase, (things[0].label,), where, named=False)


def _refs_files(path: Path) -> list[Path]:
    candidates = [path] if path.is_file() else sorted(path.glob("refs(*"))
    return [file for file in candidates if file.name.startswith("refs(") and file.suffix in (".p", ".json")]


def _read_refs(file: Path) -> list[dict[str, Any]]:
    hint = "refs(...).p of RefCOCO is a list of objects with ref_id, image_id, ann_id, split and sentences"
    refs = fields.read_json(file, hint) if file.suffix == ".json" else _read_pickle(file)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise InputError(f"{file} holds something else: {hint}")
    return refs


def _read_pickle(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"{file} has over {MAX_BYTES:,} bytes, more than any refs file")
        # Written by Python 2, whose texts are bytes.
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8", errors="replace").load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(
            f"{file} cannot be read as plain values ({error!r}). If you trust it, write it as JSON beside it:\n"
            "python -c 'import json, pickle, sys; "
            'json.dump(pickle.load(open(sys.argv[1], "rb")), open(sys.argv[2], "w"))\' '
            f"'{file.name}' '{file.with_suffix('.json').name}'"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, texts and numbers. Classes and functions come in by `find_class` only, which refuses."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")
