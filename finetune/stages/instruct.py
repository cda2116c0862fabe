"""Teach a reasoner to answer wishes and conversations: `stage: instruct`, the second stage of the paper.

    detgpt-finetune run qwen3-vl-2b-lora train=data/kitchen output=runs/kitchen

Records as `detgpt-finetune data` makes them. The projector trains in full, the language model as `language` says.
"""

from __future__ import annotations

from typing import Any, Literal

from datasets import Dataset

from detgpt.reasoners.chat import is_bare
from finetune.data.records import load_records
from finetune.encoding import RecordEncoder
from finetune.stages.reasoner import Paths, ReasonerConfig, train
from finetune.tuning import Group, Tune


class Config(ReasonerConfig):
    """vision, projector, language: how each part is trained. language "qlora" is "lora" on 4-bit weights (a GPU)."""

    stage: Literal["instruct"] = "instruct"
    vision: Tune = "frozen"
    projector: Tune = "full"
    language: Tune | Literal["qlora"] = "lora"


def run(config: Config) -> None:
    language: Tune = "lora" if config.language == "qlora" else config.language
    train(
        config,
        {Group.VISION: config.vision, Group.PROJECTOR: config.projector, Group.LANGUAGE: language},
        examples(config),
        quantized=(Group.LANGUAGE,) if config.language == "qlora" else (),
        defaults={"learning_rate": 2e-4 if language == "lora" else 2e-5},
    )


def examples(config: ReasonerConfig) -> Any:
    """What makes examples of records, as they are drawn."""

    def prepare(model: Any, processor: Any, paths: Paths) -> Dataset:
        encoder = RecordEncoder(processor, bare=is_bare(model.config), max_length=config.max_length)
        return load_records(paths).with_transform(encoder)

    return prepare
