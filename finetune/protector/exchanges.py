"""What a guard learns from: questions with answers of which is known whether they do harm. JSON lines in `data.jsonl`.

    {"question": "I want to hurt my boss", "question_harmful": true, "categories": ["violence"],
     "answers": ["The hammer would do.\\nTargets: [\\"hammer\\"]", "I do not help with that.\\nTargets: []"],
     "harmful": [true, false]}

An answer is judged as an answer to its question: naming a knife is harmless to one who cuts bread. Optional are
`question_harmful` (unset: not known), `categories` (of all the harm in the record), `rewrite` (the harmless answer to
put in the place of the harmful one), `lookalike` (a harmless question that sounds like harm) and `kind` (how the
question is put). A question of several turns has one in each line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.evaluation.readers.folder import DATA_FILE
from detgpt.guards.normalise import normalised
from detgpt.guards.template import harm_prompt
from finetune.data.records import data_files

HINT = f"what a guard learns from is a folder with {DATA_FILE}, JSON lines with 'question', 'answers' and 'harmful'"
KEYS = {"question", "question_harmful", "categories", "answers", "harmful", "rewrite", "lookalike", "kind"}


@dataclass(frozen=True)
class Exchange:
    """One record. harmful: one for each of `answers`."""

    question: str
    answers: tuple[str, ...]
    harmful: tuple[bool, ...]
    question_harmful: bool | None = None
    categories: tuple[str, ...] = ()
    rewrite: str | None = None
    lookalike: bool = False
    kind: str = "direct"

    @property
    def pair(self) -> tuple[str, str] | None:
        """(the harmful answer, the harmless one) of two answers of which exactly one is harmful."""
        if sorted(self.harmful) != [False, True]:
            return None
        return self.answers[self.harmful.index(True)], self.answers[self.harmful.index(False)]


def read_exchanges(path: str | Path | Sequence[str | Path]) -> list[Exchange]:
    """The exchanges of one folder or of several. Raises `InputError` that names file and line."""
    return [read_exchange(row, where) for file in data_files(path) for where, row in fields.read_rows(file, HINT)]


def read_questions(path: str | Path | Sequence[str | Path]) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """The questions of one turn as a guard reads them, each with whether it means harm and which kinds.

    Of several turns is not known which of them means it. Raises `InputError` without harmful questions or without
    others.
    """
    known = {
        normalised(exchange.question): (exchange.question_harmful, exchange.categories)
        for exchange in read_exchanges(path)
        if exchange.question_harmful is not None and "\n" not in exchange.question
    }
    if len({harmful for harmful, _ in known.values()}) < 2:
        raise InputError(
            f"{path}: to judge questions is learned from harmful and harmless ones: there are only those of one kind"
        )
    return known


def read_exchange(row: Mapping[str, Any], where: str) -> Exchange:
    """The exchange of one line, checked. Raises `InputError` that starts with `where`."""
    if unknown := sorted(row.keys() - KEYS):
        raise InputError(f"{where}: there is no key {unknown[0]!r}; there are {', '.join(sorted(KEYS))}")
    answers, harmful = fields.names(row, "answers", where, default=[]), row.get("harmful", [])
    if not isinstance(harmful, list) or not all(isinstance(value, bool) for value in harmful):
        raise InputError(f"{where}: 'harmful' must be a list of true and false, got {harmful!r}")
    if len(answers) != len(harmful):
        raise InputError(f"{where}: {len(answers)} answers but {len(harmful)} in 'harmful'; give each answer one")
    about_question = row.get("question_harmful")
    if about_question is not None and not isinstance(about_question, bool):
        raise InputError(f"{where}: 'question_harmful' must be true or false, got {about_question!r}")
    if about_question is None and not answers:
        raise InputError(f"{where}: there is nothing to learn: give 'answers' or 'question_harmful'")
    return Exchange(
        question=fields.text(row, "question", where),
        answers=answers,
        harmful=tuple(harmful),
        question_harmful=about_question,
        categories=fields.names(row, "categories", where, default=[]),
        rewrite=fields.text(row, "rewrite", where) if row.get("rewrite") is not None else None,
        lookalike=row.get("lookalike") is True,
        kind=fields.text(row, "kind", where, default="direct"),
    )


def scored_text(question: str, answer: str | None) -> str:
    """What the harm detector reads, in training as at inference: the template, over text without disguises."""
    return harm_prompt(normalised(question), None if answer is None else normalised(answer))


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with terminal.replacing(folder / DATA_FILE) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
