"""A COCO export of Roboflow: train/, valid/ and test/, each with `_annotations.coco.json` and its pictures beside it.

The export's category 0 is often a dummy, the project's own name, which no box has; only categories with boxes count.
SOURCE is the folder of the export, or of one part.
"""

from __future__ import annotations

from detgpt.errors import InputError
from detgpt.evaluation.readers import Source
from finetune.data.convert import Converted, coco

USES = frozenset[str]()
ANNOTATIONS = "_annotations.coco.json"


def convert(source: Source) -> Converted:
    files = sorted(source.path.glob(f"*/{ANNOTATIONS}"))
    if (source.path / ANNOTATIONS).is_file():
        return coco.convert(Source(source.path / ANNOTATIONS, images=source.path))
    if not files:
        raise InputError(f"{source.path} has no {ANNOTATIONS}, nor has a folder in it: give the folder of the export")
    converted = Converted()
    for file in files:
        of_part = coco.convert(Source(file, images=file.parent))
        converted.parts[file.parent.name] = of_part.parts[""]
        converted.notes += [f"{file.parent.name}: {note}" for note in of_part.notes]
    return converted
