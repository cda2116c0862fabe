"""Teach a reasoner by the best of its own answers: `stage: raft`.

    detgpt-finetune run raft-picto train=data/kitchen output=runs/aligned

Reward ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767): in each iteration the model answers every wish several
times, a reward says which answers are the best, and those are learned as `instruct` learns. The published recipe draws
8 answers at a temperature of 0.85 and learns them once, at a constant rate of 2e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from pydantic import Field

from finetune.data.records import Row, read_records
from finetune.preference.iterations import IterationConfig, iterate, of_iteration
from finetune.preference.samples import Sampled, record_of
from finetune.stages import instruct
from finetune.stages.instruct import TalkConfig
from finetune.stages.reasoner import PartsConfig, Paths

TRAINER = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}


class Config(IterationConfig, TalkConfig, PartsConfig):
    """Settings of the stage: those of `instruct`, and of what it learns from.

    select: "local" keeps the best answer to each wish, "top" the best `keep` of all answers to all wishes.
    replay: folders of other records, which are learned beside the chosen answers lest what they teach be forgotten:
    `replay_ratio` of them for each answer, drawn anew in each iteration.
    """

    stage: Literal["raft"] = "raft"
    select: Literal["local", "top"] = "local"
    keep: float = Field(default=0.125, gt=0, le=1)
    replay: Paths | None = None
    replay_ratio: float = Field(default=1.0, gt=0)


def run(config: Config) -> None:
    others = [*read_records(config.replay)] if config.replay is not None else []

    def choose(samples: Sequence[Sampled], seed: int) -> tuple[list[Row], dict[str, float]]:
        chosen = best(samples) if config.select == "local" else top(samples, config.keep)
        if not chosen:
            return [], {}
        rows = [record_of(sampled, answer=sampled["answers"][i]) for sampled, i in chosen]
        old = replayed(others, round(config.replay_ratio * len(rows)), seed)
        return [*rows, *old], {"selected_reward": fmean(sampled["rewards"][i] for sampled, i in chosen)}

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


def replayed(others: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` of the records `others`, none again before all have come."""
    if not others:
        return []
    chance = np.random.default_rng(seed)
    rounds = range(-(-count // len(others)))
    order = chain.from_iterable(chance.permutation(len(others)).tolist() for _ in rounds)
    return [_said(others[i]) for i in islice(order, count)]


def _said(record: Row) -> Row:
    """What was written down of a record: the messages of a wish are made of it."""
    keys = ("image", "messages", "text") if record["instruction"] is None else ("image", "instruction", "answer")
    return {key: record[key] for key in keys if record[key]}


def _worded(sampled: Sampled) -> list[tuple[Sampled, int]]:
    return [(sampled, i) for i, answer in enumerate(sampled["answers"]) if answer.strip()]


def _reward(answer: tuple[Sampled, int]) -> float:
    sampled, i = answer
    return sampled["rewards"][i]
