"""Teach a reasoner by the best of its own answers: `stage: raft`.

    detgpt-finetune run raft-picto train=data/kitchen output=runs/aligned

Reward ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767): in each iteration the model answers every wish several
times, a reward says which answers are the best, and those are learned as `instruct` learns. The published recipe draws
8 answers at a temperature of 0.85 and learns them once, at a constant rate of 2e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field

from finetune.data.records import Row
from finetune.preference.iterations import IterationConfig, iterate, of_iteration
from finetune.preference.samples import Sampled, record_of
from finetune.stages import instruct
from finetune.stages.instruct import TalkConfig
from finetune.stages.reasoner import PartsConfig

TRAINER = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}


class Config(IterationConfig, TalkConfig, PartsConfig):
    """Settings of the stage: those of `instruct`, and of what it learns from.

    select: "local" keeps the best answer to each wish, "top" the best `keep` of all answers to all wishes.
    """

    stage: Literal["raft"] = "raft"
    select: Literal["local", "top"] = "local"
    keep: float = Field(default=0.125, gt=0, le=1)


def run(config: Config) -> None:
    def choose(samples: Sequence[Sampled], seed: int) -> tuple[list[Row], dict[str, float]]:
        chosen = best(samples) if config.select == "local" else top(samples, config.keep)
        rows = [record_of(sampled, answer=sampled["answers"][i]) for sampled, i in chosen]
        return rows, {"selected_reward": fmean(sampled["rewards"][i] for sampled, i in chosen)} if rows else {}

    def learn(model: str, data: Path, output: Path) -> None:
        trainer = {**TRAINER, **config.trainer}
        instruct.run(of_iteration(instruct.Config, config, model, train=data, output=output, trainer=trainer))

    iterate(config, choose, learn)


def best(samples: Sequence[Sampled]) -> list[tuple[Sampled, int]]:
    """The best answer to each wish, the first of those that are as good; not one without a word."""
    return [max(row, key=_reward) for sampled in samples if (row := _worded(sampled))]


def top(samples: Sequence[Sampled], keep: float) -> list[tuple[Sampled, int]]:
    """The best `keep` of all answers to all wishes, at least one."""
    every = sorted(chain.from_iterable(map(_worded, samples)), key=_reward, reverse=True)
    return every[: max(round(keep * len(every)), 1)]


def _worded(sampled: Sampled) -> list[tuple[Sampled, int]]:
    return [(sampled, i) for i, answer in enumerate(sampled["answers"]) if answer.strip()]


def _reward(answer: tuple[Sampled, int]) -> float:
    sampled, i = answer
    return sampled["rewards"][i]
