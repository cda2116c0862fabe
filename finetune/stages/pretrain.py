"""Go on with a language model's pre-training on plain text: `stage: pretrain`.

    detgpt-finetune run pretrain.yaml train=data/manuals output=runs/manuals

Records with `text`, in a folder with `data.jsonl`. The texts are put one after the other, each with its end token, and
cut into rows of `max_length` tokens, so that nothing is padding; every token is learned. Of a vision-language model the
language model trains.
"""

from __future__ import annotations

from typing import Any, Literal

from datasets import Dataset
from trl import pack_dataset

from detgpt.errors import InputError
from finetune.data.records import load_records
from finetune.stages.reasoner import Paths, ReasonerConfig, train
from finetune.tuning import Group, Tune


class Config(ReasonerConfig):
    """language: how it is trained. max_length: tokens of a row; unset: what the model reads at most, 4096 at most."""

    stage: Literal["pretrain"] = "pretrain"
    language: Tune | Literal["lisa"] = "full"


def run(config: Config) -> None:
    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        tokenizer = getattr(processor, "tokenizer", processor)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 4096)
        return rows(load_records(paths), tokenizer, config.max_length or min(longest, 4096))

    lisa = config.language == "lisa"
    language: Tune = "full" if config.language == "lisa" else config.language
    how: dict[Group, Tune] = {Group.VISION: "frozen", Group.PROJECTOR: "frozen", Group.LANGUAGE: language}
    learning_rate = 1e-5 if language == "full" else 1e-4
    train(config, how, prepare, lisa=config.lisa if lisa else None, defaults={"learning_rate": learning_rate})


def rows(records: Dataset, tokenizer: Any, length: int) -> Dataset:
    """The texts of `records` one after the other, as rows of `length` tokens, all of which are learned.

    Raises `InputError` where there is no text.
    """
    records = records.filter(lambda text: bool(text), input_columns="text")
    if len(records) == 0:
        raise InputError("there is no record with 'text': pre-training needs plain text")

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [[*text, tokenizer.eos_token_id] for text in tokenizer(batch["text"])["input_ids"]]
        return {"input_ids": ids, "labels": ids}

    return pack_dataset(records.map(tokens, batched=True, remove_columns=records.column_names), length, "wrapped")
