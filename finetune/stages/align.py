"""Teach the projector to speak the language model's language: `stage: align`, the first stage of the paper.

    detgpt-finetune run align.yaml train=data/captions output=runs/align

Pictures and their captions, as conversations of one turn; nothing but the projector trains.
"""

from __future__ import annotations

from typing import Literal

from finetune.stages.instruct import examples
from finetune.stages.reasoner import ReasonerConfig, train
from finetune.tuning import Group, Tune


class Config(ReasonerConfig):
    stage: Literal["align"] = "align"


def run(config: Config) -> None:
    how: dict[Group, Tune] = {Group.VISION: "frozen", Group.PROJECTOR: "full", Group.LANGUAGE: "frozen"}
    train(config, how, examples(config), defaults={"learning_rate": 1e-3})
