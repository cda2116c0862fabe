"""What the built-in reasoner learns from, written down (`stage: picto.lessons`).

Two sets of records over the scenes of a world, without copies of the pictures: `captions/` (everything in a scene, in
reading order) and `conversations/` (wishes and their answers, with follow-ups and counting, and questions about things
at all, without a picture). And `reasoner/`: a fresh model on the tower, whose tokenizer knows the words of these
lessons.

An answer names what the tower can tell and no more: made to name what it cannot see, a reasoner learns to guess, and
its guesses follow the wish.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from safetensors.torch import load_model

from finetune import rundir
from finetune.picto.dense import pixels
from finetune.picto.fresh import write_reasoner, write_with_tower
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes
from finetune.picto.talks import FACTS, Conversations, Exchange, messages
from finetune.picto.tower import WEIGHTS, DenseTower, look_at
from finetune.picto.world import Picture, World
from finetune.recipe import StageConfig


class Config(StageConfig):
    """world: a folder of `picto.world`. tower: a folder of `picto.tower`. rounds: conversations about each scene.

    captions: how many scenes have a caption, all if not said.
    start: folder of a trained reasoner of the same shape, which gets the tower in the place of a fresh one.
    recognised: least score of the tower for a thing that an answer names.
    """

    stage: Literal["picto.lessons"]
    world: Path
    tower: Path
    rounds: int = 1
    captions: int | None = None
    start: Path | None = None
    recognised: float = Field(default=0.35, ge=0, le=1)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config)
    knowledge = load_knowledge()
    world, conversations = World(config.world), Conversations(Wishes(knowledge))
    names = list(knowledge.classes)
    tower = DenseTower(len(names)).eval()
    load_model(tower, str(config.tower / WEIGHTS))
    scores, _ = look_at(tower, world)
    readable = [
        _readable(picture, row > config.recognised, names) for picture, row in zip(world.pictures, scores, strict=True)
    ]

    def record(folder: Path, index: int, exchanges: Sequence[Exchange]) -> dict:
        return {"image": os.path.relpath(world.pictures[index].file, folder), "messages": messages(exchanges)}

    def captions(folder: Path) -> Iterator[dict]:
        for i, picture in enumerate(world.pictures[: config.captions]):
            rng = np.random.default_rng((config.seed, i, 5))
            yield record(folder, i, conversations.caption(rng, picture.place, readable[i]))

    def talks(folder: Path) -> Iterator[dict]:
        for turn in range(config.rounds):
            for i, picture in enumerate(world.pictures):
                rng = np.random.default_rng((config.seed, i, turn, 6))
                yield record(folder, i, conversations.talk(rng, picture.place, readable[i]))
                if rng.random() < FACTS:
                    yield {"messages": messages(conversations.facts(rng))}

    _write(config.output / "captions", captions(config.output / "captions"))
    _write(config.output / "conversations", talks(config.output / "conversations"))
    eyes = tower.tower.state_dict()
    if config.start is not None:
        start = config.start
        rundir.write_folder(config.output / "reasoner", lambda place: write_with_tower(place, start, eyes))
    else:
        some = pixels(np.stack([world[i]["image"] for i in range(min(len(world), 256))]))
        texts = _texts(config.output / "conversations")
        rundir.write_folder(config.output / "reasoner", lambda place: write_reasoner(place, texts, eyes, some))
    rundir.finish(config.output, {})


def _readable(picture: Picture, recognised: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """The names of what the tower tells, (C,) bool, in reading order, and how often each thing is there."""
    counts = Counter(int(c) for c in picture.classes)
    present = picture.classes_in_reading_order()
    return {names[c]: counts[c] for c in [c for c in present if recognised[c]] or present}


def _write(folder: Path, records: Iterator[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".data.jsonl"
    with partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.replace(folder / "data.jsonl")


def _texts(folder: Path) -> Iterator[str]:
    """Every need as it is said, and what the conversations say."""
    for need in load_knowledge().needs.values():
        yield from need.says
    with (folder / "data.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield from (message["content"] for message in json.loads(line)["messages"])
