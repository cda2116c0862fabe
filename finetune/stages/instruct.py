"""Teach a reasoner to answer wishes and conversations: `stage: instruct`, the second stage of the paper.

    detgpt-finetune run qwen3-vl-2b-lora train=data/kitchen output=runs/kitchen

Records as `detgpt-finetune data` makes them. The projector trains in full, the language model as `language` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from datasets import Dataset

from detgpt.reasoners.chat import is_bare
from finetune.callbacks import LisaSettings
from finetune.data.records import load_records
from finetune.encoding import RecordEncoder
from finetune.stages.reasoner import Paths, ReasonerConfig, train
from finetune.tuning import Group, Tune

TUNE: dict[str, Tune] = {"qlora": "lora", "lisa": "full"}  # how the language model's weights are trained then


class TalkConfig(ReasonerConfig):
    """Settings of a stage that learns from conversations.

    packing: several examples in a row of a batch. by_length: batches of examples whose texts are of like length.
    """

    packing: bool = False
    by_length: bool = False


class Config(TalkConfig):
    """vision, projector, language: how each part is trained.

    language: "qlora" is "lora" on 4-bit weights (a GPU); "lisa" trains in full, a few layers at a time.
    """

    stage: Literal["instruct"] = "instruct"
    vision: Tune = "frozen"
    projector: Tune = "full"
    language: Tune | Literal["qlora", "lisa"] = "lora"


def run(config: Config) -> None:
    language = TUNE.get(config.language) or cast(Tune, config.language)
    train_talks(
        config,
        {Group.VISION: config.vision, Group.PROJECTOR: config.projector, Group.LANGUAGE: language},
        lisa=config.lisa if config.language == "lisa" else None,
        quantized=(Group.LANGUAGE,) if config.language == "qlora" else (),
        learning_rate=2e-4 if language == "lora" else 2e-5,
    )


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
        lisa=lisa,
        quantized=quantized,
        packing=config.packing,
        by_length=config.by_length,
        defaults={"learning_rate": learning_rate},
    )
