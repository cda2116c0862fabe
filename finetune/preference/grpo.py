"""Teach a reasoner by group-relative rewards: `stage: grpo` (Shao et al. 2024, arXiv:2402.03300).

    detgpt-finetune run grpo-picto train=data/wishes output=runs/rewarded

An answer counts by how far its reward is above the mean of the answers to the same wish.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from finetune.preference import online


class Config(online.OnlineConfig):
    arguments: ClassVar[type[TrainingArguments]] = GRPOConfig

    stage: Literal["grpo"] = "grpo"


def run(config: Config) -> None:
    online.run(config, GRPOTrainer)
