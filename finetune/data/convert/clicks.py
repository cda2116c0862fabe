"""Clicks of the web page, `detgpt demo --feedback FOLDER`: preferences between answers to the same wish.

SOURCE is the folder, or its clicks.jsonl (`detgpt.web.feedback`). Of several clicks on one answer the last counts; an
answer that was given and clicked on more than once is good if more thumbs were up than down. Each good answer makes a
pair with each bad one to the same wish about the same picture.

A wish that followed others is left out: what it means, and so which answer is good, hangs on those.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import product
from typing import Any

from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.readers import Source
from detgpt.web.feedback import CLICKS_FILE
from finetune.data.convert import Converted
from finetune.data.records import Row

USES = frozenset[str]()
HINT = f"clicks are a folder with {CLICKS_FILE}, which `detgpt demo --feedback FOLDER` writes"
VOTES = {"up": 1, "down": -1}


def convert(source: Source) -> Converted:
    file = source.path / CLICKS_FILE if source.path.is_dir() else source.path
    last = {row["id"]: row for row in (_checked(row, where) for where, row in fields.read_rows(file, HINT))}
    clicks = [row for row in last.values() if row["thumb"]]
    alone = [row for row in clicks if not row["history"]]
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in alone:
        votes[row["image"], row["instruction"]][row["answer"]] += VOTES[row["thumb"]]
    rows: list[Row] = []
    disputed = single = 0
    for (image, instruction), answers in votes.items():
        good, bad = ([answer for answer, sum_ in answers.items() if sum_ * sign > 0] for sign in (1, -1))
        pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in product(good, bad)]
        rows += [{"image": str(file.parent / image), "instruction": instruction, **pair} for pair in pairs]
        disputed += len(answers) - len(good) - len(bad)
        single += 0 if pairs else len(good) + len(bad)
    followed = len(clicks) - len(alone)
    return Converted.of(
        rows,
        f"{single} answers have no other to their wish with the opposite thumb and were left out." * bool(single),
        f"{disputed} answers have as many thumbs up as down and were left out." * bool(disputed),
        f"{followed} clicks are on wishes that followed others and were left out." * bool(followed),
    )


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("id", "image", "instruction", "answer"):
        fields.text(row, key, where)
    if row.get("thumb") not in (*VOTES, None):
        raise InputError(f'{where}: \'thumb\' must be "up", "down" or null, got {row["thumb"]!r}')
    if not isinstance(row.get("history", []), list):
        raise InputError(f"{where}: 'history' must be a list of turns, got {row['history']!r}")
    return {"history": [], "thumb": None, **row}
