"""Teach a reasoner which of its own answers are the better ones: `stage: iterative_dpo`.

    detgpt-finetune run iterative-dpo-picto train=data/kitchen output=runs/aligned

In each iteration the model answers every wish several times, a reward makes pairs of a better and a worse answer, and
`dpo` learns them, against the model that the iteration began with (Xiong et al. 2023, arXiv:2312.11456).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from finetune.data.records import Row
from finetune.preference import dpo
from finetune.preference.iterations import IterationConfig, iterate, of_iteration
from finetune.preference.pairs import Pairing, pairs
from finetune.preference.samples import Sampled


class Config(IterationConfig, dpo.PreferenceConfig):
    """Settings of the stage: those of `dpo`, and of what it learns from. pairing: see `finetune.preference.pairs`."""

    stage: Literal["iterative_dpo"] = "iterative_dpo"
    pairing: Pairing = "max_min"


def run(config: Config) -> None:
    def choose(samples: Sequence[Sampled], seed: int) -> tuple[list[Row], dict[str, float]]:
        rows = pairs(samples, config.pairing, seed=seed)
        return rows, {"pairs": float(len(rows))}

    def learn(model: str, data: Path, output: Path) -> None:
        dpo.run(of_iteration(dpo.Config, config, model, train=data, output=output))

    iterate(config, choose, learn)
