"""A samples file: wishes, a model's answers to them, and what each is worth, one wish a line.

    {"record": 7, "where": "data.jsonl, line 8", "instruction": "I am thirsty", "image": "images/3.png",
     "answers": ["…", "…"], "rewards": [1.0, 0.67]}

`record` counts in the data that was drawn from; `rewards` comes when the answers are scored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from detgpt import terminal
from detgpt.evaluation.readers.folder import DATA_FILE
from finetune.data.records import Row
from finetune.preference.sampling import distinct_2

FALL = 0.2  # of diversity, beyond which there is a warning


class Sampled(TypedDict):
    """A wish, the answers to it, and what each of them is worth."""

    record: int
    where: str
    instruction: str
    image: str
    answers: list[str]
    rewards: list[float]


def measured(samples: Sequence[Sampled]) -> dict[str, float]:
    """reward: mean of each wish's first answer, which nobody chose, so that it is what the model is worth.
    best_reward: mean of each wish's best. distinct_2: how varied all answers are.
    """
    return {
        "reward": fmean(sampled["rewards"][0] for sampled in samples),
        "best_reward": fmean(max(sampled["rewards"]) for sampled in samples),
        "distinct_2": distinct_2(list(chain.from_iterable(sampled["answers"] for sampled in samples))),
    }


def fallen(first: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A warning where answers are so much less varied than at first that the model may be gaming its reward."""
    before, after = first["distinct_2"], now["distinct_2"]
    if after >= (1 - FALL) * before:
        return None
    return (
        f"distinct-2 fell from {before:.3f} to {after:.3f}, by more than {FALL:.0%}: the model may learn a phrase, "
        "not the task. Look at its answers; fewer iterations, a lower learning rate or a higher "
        "sampling.temperature keep them varied"
    )


def record_of(sampled: Sampled, **said: str) -> Row:
    """The record of the wish, with what is to be learned about it: `answer`, or `chosen` and `rejected`."""
    return {"image": sampled["image"], "instruction": sampled["instruction"], **said}


def write_records(folder: Path, rows: Iterable[Row]) -> None:
    """Write records for `finetune.data.records`, whose images, if they have any, stay where they are."""
    moved = ({**row, "image": row.get("image") and os.path.relpath(row["image"], folder)} for row in rows)
    write_lines(folder / DATA_FILE, moved)


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with terminal.replacing(file) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(file: Path) -> list[Any]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
