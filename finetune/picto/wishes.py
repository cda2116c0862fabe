"""Wishes about new scenes of the built-in world, with what fits them: to align on, and to see what came of it.

    stage: picto.wishes
    seed: 11              # of the scenes, which no training and no split shows
    scenes: 400
    output: build/wishes

There are no plain attributes and no descriptions among them: what a model can do of those is for `picto.exam` to ask.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune import rundir
from finetune.picto.splits import Split, write_split
from finetune.recipe import StageConfig

KINDS = ("need", "need", "category", "direct", "exclusion")


class Config(StageConfig):
    """scenes: how many, with three wishes each."""

    stage: Literal["picto.wishes"]
    scenes: int = Field(default=400, ge=1)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config, {})
    write_split(Split(config.seed, kinds=KINDS), config.output, config.scenes)
    rundir.finish(config.output, {})
