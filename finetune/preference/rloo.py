"""Teach a reasoner by REINFORCE with the other answers as its baseline: `stage: rloo` (arXiv:2402.14740).

    detgpt-finetune run rloo.yaml train=data/wishes output=runs/rewarded

An answer counts by how far its reward, less what moving away from the beginning costs, is above the mean of the other
answers to the same wish (Ahmadian et al. 2024).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from transformers import TrainingArguments
from trl import RLOOConfig, RLOOTrainer

from finetune.preference import online


class Config(online.OnlineConfig):
    arguments: ClassVar[type[TrainingArguments]] = RLOOConfig

    stage: Literal["rloo"] = "rloo"


def run(config: Config) -> None:
    online.run(config, RLOOTrainer)
