"""Training data as a folder with `data.jsonl` and pictures: the format of `detgpt eval`, with more optional keys.

    load_records("data/kitchen")                     # a 🤗 Dataset
    load_records(["data/kitchen", "data/chat"])      # one after the other

A line is one record, a JSON object. It may have a picture and truth about it, and it says one of four things:

    {"image": "1.jpg", "instruction": "I am thirsty", "targets": ["cup"], "boxes": [[10, 20, 60, 90]],
     "labels": ["cup"], "present": ["cup", "chair"], "reasoning": "A desk. A cup holds water."}      a wish
    {"image": "1.jpg", "messages": [{"role": "user", "content": "What is this?"}, ...]}              a conversation
    {"text": "Cups are made of clay."}                                                               plain text
    {"image": "1.jpg", "boxes": [[10, 20, 60, 90]], "labels": ["cup"]}                               boxes alone

The answer to a wish is `answer`, the whole text; else it is made of `reasoning` and `targets`. A wish, or a
conversation that ends with the user, may have the answers `chosen` and `rejected` instead. `image` is a path, seen
from the folder; only what has boxes needs one. The keys of the truth are explained in
`detgpt.evaluation.readers.folder`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.answer import format_answer
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.readers.folder import DATA_FILE
from detgpt.evaluation.readers.folder import read_record as read_measurable

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]
Paths = str | Path | Sequence[str | Path]

TEXTS = ("image", "instruction", "reasoning", "answer", "chosen", "rejected", "text", "kind", "where")
NAMES = ("targets", "labels", "present", "ignored_labels")
BOXES = ("boxes", "ignored")
HINT = f"training data is a folder with {DATA_FILE}, JSON lines in UTF-8"
MAY_BE_EMPTY = ("kind", "reasoning")
KEYS = {*TEXTS, *NAMES, *BOXES, "messages", "synonyms", "segmentations"} - {"where"}  # that a line may have
SAYS = "'instruction', 'messages' or 'text'"


def load_records(path: Paths) -> Dataset:
    """The records at `path` (a folder, its data.jsonl, or several of them) in order.

    Columns, None where a record has no such thing:
        image: path of the picture. where: file and line.
        messages: what is said, [{"role": "user" | "assistant" | "system", "content": text}]; the picture belongs to
            the first user's turn. With `chosen` and `rejected` it ends before the answer; it is [] for plain text
            and for boxes alone.
        instruction: the wish, where the record is one: what a model is asked is then worded as at inference, while
            the messages of a conversation go as they are.
        targets: names of what fits the wish, [] for nothing. reasoning, answer, chosen, rejected, text, kind: texts.
        boxes: xyxy in pixels, one of `labels` each; ignored, ignored_labels likewise. present: names.

    Raises `InputError`, which names file and line, for a record that is wrong or whose picture is not there.
    """
    from datasets import Dataset

    return Dataset.from_list(list(read_records(path)), features=features())


def features() -> Features:
    """The columns' types, the same whatever the records have."""
    from datasets import Features, List, Value

    text = Value("string")
    columns: dict[str, Any] = dict.fromkeys(TEXTS, text) | dict.fromkeys(NAMES, List(text))
    columns |= dict.fromkeys(BOXES, List(List(Value("float64"))))
    return Features(columns | {"messages": List({"role": text, "content": text})})


def read_records(path: Paths) -> Iterator[Row]:
    """The same records as plain dicts, one after the other, without 🤗 datasets."""
    for file in data_files(path):
        for where, row in fields.read_rows(file, HINT):
            record = read_record(row, file.parent, where)
            if record["image"] is not None and not Path(record["image"]).is_file():
                raise InputError(f"{where}: there is no image {record['image']}")
            yield record


def read_record(row: Row, folder: Path, where: str) -> Row:
    """The record of one line, checked, with all columns. Raises `InputError` that starts with `where`."""
    record: Row = dict.fromkeys((*TEXTS, *NAMES, *BOXES)) | {"messages": [], "where": where}
    for key in TEXTS[:-1]:
        if row.get(key) is not None and not (key in MAY_BE_EMPTY and row[key] == ""):
            record[key] = fields.text(row, key, where)
    said = [key for key in ("instruction", "messages", "text") if row.get(key) is not None]
    if len(said) > 1 or not (said or row.get("boxes") is not None):
        raise InputError(f"{where}: a record has one of {SAYS}, or boxes alone; this one has {said or 'none'}")
    if record["image"] is not None:
        record["image"] = str(folder / record["image"])
    return record | _truth(row, folder, where) | _conversation(record, row, where)


def data_files(path: Paths) -> list[Path]:
    """The data.jsonl of each of the places. Raises `InputError` for a place that has none."""
    places = [path] if isinstance(path, (str, Path)) else path
    return [_data_file(Path(place)) for place in places]


def fingerprint(path: Paths) -> str:
    """A SHA-256 of the records and of the bytes of all their pictures; where they lie and when they were written
    does not matter. Raises `InputError` for what cannot be read.
    """
    digest = hashlib.sha256()
    for file in data_files(path):
        rows = list(fields.read_rows(file, HINT))
        images = [row["image"] for _, row in rows if isinstance(row.get("image"), str)]
        digest.update(files_digest(file, [(image, file.parent / image) for image in dict.fromkeys(images)]))
    return digest.hexdigest()


def files_digest(file: Path, pictures: Iterable[tuple[str, Path]]) -> bytes:
    """The SHA-256 of a data file and of its (name, place) pictures. Raises `InputError`."""
    digest = hashlib.sha256()
    for name, place in (("", file), *pictures):
        try:
            content = place.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot read {place} ({error.strerror})") from error
        digest.update(hashlib.sha256(name.encode() + b"\0" + content).digest())
    return digest.digest()


def _data_file(place: Path) -> Path:
    file = place / DATA_FILE if place.is_dir() else place
    if file.is_file() and file.suffix == ".jsonl":
        return file
    splits = sorted(inner.parent.name for inner in place.glob(f"*/{DATA_FILE}"))
    hint = f"choose one of its parts {', '.join(splits)}" if splits else f"give a folder with {DATA_FILE}"
    raise InputError(f"{place} is no training data: {hint}, or make one with `detgpt-finetune data convert`")


def _truth(row: Row, folder: Path, where: str) -> Row:
    """Names and boxes; a wish with boxes is held to what evaluation demands."""
    if row.get("boxes") is None:
        names = {key: list(fields.names(row, key, where)) for key in NAMES if row.get(key) is not None}
        return {key: values for key, values in names.items() if key in ("targets", "present")}
    if "instruction" in row:
        measurable = read_measurable(row, folder, where)
        boxes, labels = measurable.boxes.tolist(), list(measurable.labels)
        ignored, ignored_labels = measurable.ignored.tolist(), list(measurable.ignored_labels)
    else:
        fields.text(row, "image", where)
        boxes, labels = fields.boxes(row, "boxes", where), list(fields.names(row, "labels", where))
        ignored = fields.boxes(row, "ignored", where, default=[])
        ignored_labels = list(fields.names(row, "ignored_labels", where, default=[]))
        for these, their_labels in ((boxes, labels), (ignored, ignored_labels)):
            if len(these) != len(their_labels):
                raise InputError(f"{where}: {len(these)} boxes but {len(their_labels)} labels; give each box one")
    present = fields.names(row, "present", where, default=list(dict.fromkeys(labels)))
    truth = {"boxes": boxes, "labels": labels, "ignored": ignored, "ignored_labels": ignored_labels}
    targets = {"targets": list(fields.names(row, "targets", where))} if "targets" in row else {}
    return truth | targets | {"present": list(present)}


def _conversation(record: Row, row: Row, where: str) -> Row:
    """The messages, and the answer to a wish where it was not written out."""
    is_pair = record["chosen"] is not None and record["rejected"] is not None
    if not is_pair and (record["chosen"] is not None or record["rejected"] is not None):
        raise InputError(f"{where}: an answer that is 'chosen' needs one that is 'rejected', and the reverse")
    if row.get("messages") is not None:
        return {"messages": _messages(row["messages"], ends_with="user" if is_pair else "assistant", where=where)}
    if record["instruction"] is None:
        return {}
    asked = [{"role": "user", "content": record["instruction"]}]
    if is_pair:
        if record["answer"] is not None:
            raise InputError(f"{where}: give an 'answer', or 'chosen' and 'rejected', not both")
        return {"messages": asked}
    answer = record["answer"]
    if answer is None:
        names = fields.names(row, "targets", where)
        try:
            answer = format_answer(record["reasoning"] or "", names)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return {"answer": answer, "messages": [*asked, {"role": "assistant", "content": answer}]}


def _messages(value: Any, ends_with: str, where: str) -> list[dict[str, str]]:
    """User and assistant in turn, after a system's message if there is one."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    messages = [
        {"role": fields.text(turn, "role", where), "content": fields.text(turn, "content", where)} for turn in value
    ]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] != ends_with or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise InputError(
            f"{where}: 'messages' must go user, assistant, user, … and end with the {ends_with}; the roles are {roles}"
        )
    return messages
