"""LMFlow's data: {"type": ..., "instances": [...]}, in one file or in all .json files of a folder.

    text_only            {"text": ...}                                   plain text
    text2text            {"input": ..., "output": ...}                   a conversation of one turn
    text_to_textlist     {"input": ..., "output": [...]}                 one such conversation for each output
    conversation         {"system": ..., "messages": [...]}              a conversation
    paired_conversation  {"chosen": {"messages": [...]}, "rejected": …}  a preference about the last answer
    image_text           {"image": ..., "text": ...}                     a picture and its caption

A file that is a list is in LLaVA's format, as LMFlow's multi-modal data is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.coco import find_image
from detgpt.evaluation.readers import Source
from finetune.data.convert import Converted, caption_messages
from finetune.data.convert.llava import convert_conversations
from finetune.data.records import Row

USES = frozenset({"images"})


def convert(source: Source) -> Converted:
    files = sorted(source.path.glob("*.json")) if source.path.is_dir() else [source.path]
    if not files:
        raise InputError(f"{source.path} has no .json file: give a file or a folder of LMFlow's data")
    all_of_them = Converted({"": []})
    for file in files:
        of_file = _convert_file(file, source.images or file.parent)
        all_of_them.parts[""] += of_file.parts[""]
        all_of_them.notes += of_file.notes
    return all_of_them


def _convert_file(file: Path, folder: Path) -> Converted:
    document = fields.read_json(file, "LMFlow's data is {'type': ..., 'instances': [...]}")
    if isinstance(document, list):
        return convert_conversations(document, folder, file)
    kind = document.get("type") if isinstance(document, dict) else None
    if kind not in READERS or not isinstance(document.get("instances"), list):
        raise InputError(f"{file}: its type {kind!r} is none of {', '.join(READERS)}, or it has no list of instances")
    rows: list[Row] = []
    lost = with_tools = 0
    for number, instance in enumerate(document["instances"]):
        where = f"{file}, instance {number}"
        if not isinstance(instance, dict):
            raise InputError(f"{where}: an instance is an object, got {str(instance)[:60]!r}")
        found = list(READERS[kind](instance, folder, where))
        rows += found
        lost += not found
        with_tools += bool(instance.get("tools"))
    return Converted.of(
        rows,
        f"{file.name}: {lost} pairs differ in more than the last answer and were left out." if lost else "",
        f"{file.name}: the tools of {with_tools} conversations were left out." if with_tools else "",
    )


def _text_only(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    yield {"text": fields.text(instance, "text", where)}


def _text2text(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    yield _turn(fields.text(instance, "input", where), fields.text(instance, "output", where))


def _text_to_textlist(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    asked = fields.text(instance, "input", where)
    for answer in fields.names(instance, "output", where):
        yield _turn(asked, answer)


def _conversation(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    yield {"messages": _messages(instance, where)}


def _paired_conversation(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    """Nothing where the two conversations differ before their last answers."""
    chosen, rejected = (_messages(instance.get(key), where) for key in ("chosen", "rejected"))
    if chosen[:-1] == rejected[:-1]:
        yield {"messages": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _image_text(instance: Row, folder: Path, where: str) -> Iterator[Row]:
    image = find_image(folder, fields.text(instance, "image", where))
    yield {"image": str(image), "messages": caption_messages(fields.text(instance, "text", where))}


READERS: dict[str, Callable[[Row, Path, str], Iterator[Row]]] = {
    "text_only": _text_only,
    "text2text": _text2text,
    "text_to_textlist": _text_to_textlist,
    "conversation": _conversation,
    "paired_conversation": _paired_conversation,
    "image_text": _image_text,
}


def _turn(asked: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _messages(conversation: Any, where: str) -> list[dict[str, str]]:
    """The conversation with its system prompt in front; older files have the list of messages alone."""
    parts = conversation if isinstance(conversation, dict) else {"messages": conversation}
    messages = parts.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise InputError(f"{where}: a conversation has a list of 'messages' with 'role' and 'content'")
    system = [{"role": "system", "content": parts["system"]}] if parts.get("system") else []
    return system + [
        {"role": fields.text(turn, "role", where), "content": fields.text(turn, "content", where)} for turn in messages
    ]
