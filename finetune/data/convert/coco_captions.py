"""COCO's captions, `captions_train2017.json`: pairs of a picture and a sentence, for the align stage.

{"images": [{"id": 42, "file_name": "000000000042.jpg"}], "annotations": [{"image_id": 42, "caption": "A desk."}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import find_image
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.coco import image_folder
from finetune.data.convert import Converted, caption_messages

USES = frozenset({"images"})
HINT = "COCO's captions have 'images', and 'annotations' with 'image_id' and 'caption'"


def convert(source: Source) -> Converted:
    names, captions = _read(source.path)
    folder = source.images or image_folder(source.path.parent)
    rows: list[dict[str, Any]] = [
        {"image": str(find_image(folder, names[image_id])), "messages": caption_messages(caption)}
        for image_id, sentences in captions.items()
        for caption in sentences
        if image_id in names
    ]
    lost = len(captions.keys() - names.keys())
    return Converted.of(rows, f"{lost} pictures have captions but no entry in 'images'." if lost else "")


def read_captions(file: Path) -> dict[str, list[str]]:
    """The captions of each picture, by its id as text. Raises `InputError`."""
    return {str(image_id): captions for image_id, captions in _read(file)[1].items()}


def _read(file: Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    document = fields.read_json(file, HINT)
    captions: dict[Any, list[str]] = {}
    try:
        names = {row["id"]: str(row["file_name"]) for row in document["images"]}
        for row in document["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} has an entry that is not of this form ({error!r}): {HINT}") from error
    return names, captions
