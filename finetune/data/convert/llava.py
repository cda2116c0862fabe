"""LLaVA's JSON: a list of conversations, most of them about a picture.

[{"id": "1", "image": "coco/train2017/000000000042.jpg", "conversations": [
    {"from": "human", "value": "<image>\\nWhat is on the desk?"}, {"from": "gpt", "value": "A cup."}]}]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import find_image
from detgpt.evaluation.readers import Source
from finetune.data.convert import Converted
from finetune.data.records import Row

USES = frozenset({"images"})
HINT = "LLaVA's data is a list of objects with 'conversations' of 'from' and 'value'"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_TOKEN = "<image>"


def convert(source: Source) -> Converted:
    document = fields.read_json(source.path, HINT)
    return convert_conversations(document, source.images or source.path.parent, source.path)


def convert_conversations(document: Any, folder: Path, file: Path) -> Converted:
    """The conversations of a document in this format. Raises `InputError` that names the entry."""
    if not isinstance(document, list):
        raise InputError(f"{file} is something else: {HINT}")
    rows, several = [], 0
    for number, entry in enumerate(document):
        where = f"{file}, entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise InputError(f"{where}: {HINT}")
        if isinstance(entry.get("image"), list) and len(entry["image"]) != 1:
            several += 1
        else:
            rows.append(_row(entry, folder, where))
    return Converted.of(
        rows, f"{several} entries have several pictures or none in a list and were left out." * bool(several)
    )


def _row(entry: dict[str, Any], folder: Path, where: str) -> Row:
    messages = [_message(turn, where) for turn in entry["conversations"]]
    image = entry["image"][0] if isinstance(entry.get("image"), list) else entry.get("image")
    if image is None:
        return {"messages": messages}
    return {"image": str(find_image(folder, fields.text({"image": image}, "image", where))), "messages": messages}


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        raise InputError(f"{where}: a turn is from {', '.join(ROLES)} and has a 'value', got {str(turn)[:100]}")
    return {"role": ROLES[turn["from"]], "content": turn["value"].replace(IMAGE_TOKEN, "").strip()}
