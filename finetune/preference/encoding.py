"""Two answers to the same question as a model reads them: what DPO and a reward model learn from.

    {"image": "1.jpg", "instruction": "I am thirsty", "chosen": "...", "rejected": "..."}     a line of the records

Both conversations are encoded as any other (`finetune.encoding`), with the words that the model is asked with at
inference; only the answers in question count, not those of earlier turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset

from detgpt.errors import InputError
from finetune.batching import IGNORED, Batch, Padded
from finetune.data.records import Paths, load_records
from finetune.encoding import Encoded, RecordEncoder

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


def load_preferences(path: Paths) -> Dataset:
    """The records at `path`. Raises `InputError`, naming the line, unless all have `chosen` and `rejected`."""
    records = load_records(path)
    for chosen, where in zip(records["chosen"], records["where"], strict=True):
        if chosen is None:
            raise InputError(f"{where}: a preference has an answer that is 'chosen' and one that is 'rejected'")
    return records


def asked(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a record without the answer that they may end with. Raises `InputError` where none is left."""
    messages = list(record["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise InputError(f"{record['where']}: there is nothing asked: a record has 'instruction' or 'messages'")
    return messages


def answered(record: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The record with `answer` to what is asked."""
    return {**record, "messages": [*asked(record), {"role": "assistant", "content": answer}]}


class PairEncoder:
    """Encodes preferences as they are drawn: `load_preferences(…).with_transform(PairEncoder(…))`.

    An example is {"chosen": …, "rejected": …}, each as `finetune.encoding.encode` gives it, with `labels` only on the
    answer in question.
    """

    def __init__(self, processor: Any, *, bare: bool, max_length: int | None = None) -> None:
        self._encoder = RecordEncoder(processor, bare=bare, max_length=max_length)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[Side, list[Encoded]]:
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {side: [self.encode(record, record[side]) for record in records] for side in SIDES}

    def encode(self, record: Mapping[str, Any], answer: str) -> Encoded:
        encoded = self._encoder.encode(answered(record, answer))
        return {**encoded, "labels": _of_last_answer(encoded["labels"])}


class PairCollator:
    """B pairs as a batch of 2·B rows padded on the right: the chosen conversations, then the rejected ones."""

    def __init__(self, pad_token_id: int) -> None:
        self._padded = Padded(pad_token_id)

    def __call__(self, pairs: Sequence[Mapping[Side, Encoded]]) -> Batch:
        return self._padded([pair[side] for side in SIDES for pair in pairs])


def _of_last_answer(labels: torch.Tensor) -> torch.Tensor:
    """Labels (L,) without those of earlier answers."""
    learned = labels != IGNORED
    last = int(learned.nonzero()[-1])
    before = (~learned[:last]).nonzero()
    only = labels.clone()
    only[: int(before[-1]) + 1 if len(before) else 0] = IGNORED
    return only
