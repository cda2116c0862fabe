"""Teach a reasoner to answer wishes and conversations: `stage: instruct`, the second stage of the paper.

    detgpt-finetune run qwen3-vl-2b-lora train=data/kitchen output=runs/kitchen

Records as `detgpt-finetune data` makes them. The projector trains in full, the language model as `language` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from datasets import Dataset

from detgpt.reasoners.chat import is_bare
from finetune.callbacks import LisaSettings
from finetune.data.records import load_records
from finetune.encoding import RecordEncoder
from finetune.stages.reasoner import PartsConfig, Paths, ReasonerConfig, sft, train
from finetune.tuning import Group, Tune


class TalkConfig(ReasonerConfig):
    """Settings of a stage that learns from conversations.

    packing: several examples in a row of a batch. by_length: batches of examples whose texts are of like length.
    """

    packing: bool = False
    by_length: bool = False


class Config(TalkConfig, PartsConfig):
    stage: Literal["instruct"] = "instruct"


def run(config: Config) -> None:
    learning_rate = 2e-4 if config.how[Group.LANGUAGE] == "lora" else 2e-5
    train_talks(config, config.how, lisa=config.layers, quantized=config.quantized, learning_rate=learning_rate)


def train_talks(
    config: TalkConfig,
    how: Mapping[Group, Tune],
    *,
    learning_rate: float,
    lisa: LisaSettings | None = None,
    quantized: tuple[Group, ...] = (),
) -> None:
    """Train on records with `instruction` or `messages`, which are encoded as they are drawn."""

    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        encoder = RecordEncoder(processor, bare=is_bare(model.config), max_length=config.max_length)
        return load_records(paths).with_transform(encoder)

    train(
        config,
        how,
        prepare,
        build=partial(sft, packing=config.packing),
        lisa=lisa,
        quantized=quantized,
        by_length=config.by_length,
        defaults={"learning_rate": learning_rate},
    )
