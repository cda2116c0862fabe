"""Conversations about scenes: wishes, follow-ups and counting; and about things at all. `stage: picto.talks`.

    stage: picto.talks
    seed: 13              # of the scenes, which no other set shows
    scenes: 2000
    output: build/talks

The stage writes a conversation about each scene, and some without a picture: what the built-in model was taught with,
in small. `picto.lessons` draws the real ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from detgpt import terminal
from finetune import rundir
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wish, Wishes, WishSampler, answer, as_typed, in_a_talk, seen
from finetune.picto.questions import counting, fact
from finetune.picto.world import scene_for
from finetune.recipe import StageConfig

NOTHING_FITS = 0.32  # share of wishes that nothing fulfils: more than people ask, for "no" is the hardest to learn
COUNTING = 0.12  # share of exchanges
PLAIN = ("attribute", "category", "direct", "exclusion")  # also said in a talk, that "Hello, …" does not mean a need
FACTS = 0.15  # records without a picture, per record with one; each asks FACTS_EACH questions
FACTS_EACH = 8


class Config(StageConfig):
    """scenes: how many, with a conversation each."""

    stage: Literal["picto.talks"]
    scenes: int = Field(default=2000, ge=1)


@dataclass(frozen=True)
class Exchange:
    """One wish about a scene and its answer."""

    wish: str
    answer: str


class Conversations:
    """Draws conversations about scenes."""

    def __init__(self, wishes: Wishes):
        self.knowledge = wishes.knowledge
        self.sampler = WishSampler(wishes, nothing_fits=NOTHING_FITS)

    def caption(self, rng: np.random.Generator, place: str, present: Mapping[str, int]) -> list[Exchange]:
        """Everything in a scene; `present` are the names that an answer may say, in reading order, and their counts."""
        wish = self.sampler.draw(rng, list(present), "everything")
        return [Exchange(as_typed(rng, wish.text), answer(place, list(present), wish))]

    def talk(self, rng: np.random.Generator, place: str, present: Mapping[str, int]) -> list[Exchange]:
        """Two to five exchanges; each answer says anew what is in the picture, for it marks there what fits."""
        names = list(present)
        exchanges: list[Exchange] = []
        wish: Wish | None = None
        for turn in range(int(rng.integers(2, 6))):
            if rng.random() < COUNTING:
                wish = None
                question = counting(rng, self.knowledge, present)
                said = question.answer if turn else f"{seen(place, names)} {question.answer}"
                exchanges.append(Exchange(as_typed(rng, question.text), said))
                continue
            narrower = self.sampler.follow_up(rng, wish, names) if wish and rng.random() < 0.3 else None
            wish = narrower or self.sampler.draw(rng, names)
            said = in_a_talk(rng, wish.text) if wish.kind in PLAIN and rng.random() < 0.4 else wish.text
            exchanges.append(Exchange(as_typed(rng, said), answer(place, names, wish)))
        return exchanges

    def facts(self, rng: np.random.Generator) -> list[Exchange]:
        """Questions that need no picture."""
        questions = [fact(rng, self.knowledge) for _ in range(FACTS_EACH)]
        return [Exchange(as_typed(rng, question.text), question.answer) for question in questions]


def messages(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    said = ((("user", exchange.wish), ("assistant", exchange.answer)) for exchange in exchanges)
    return [{"role": role, "content": text} for turns in said for role, text in turns]


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config, {})
    (config.output / "images").mkdir(exist_ok=True)
    with terminal.replacing(config.output / "data.jsonl") as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in _records(config.output, config.seed, config.scenes))
    rundir.finish(config.output, {})


def _records(folder: Path, seed: int, scenes: int) -> Iterator[dict]:
    conversations = Conversations(Wishes(load_knowledge()))
    for index in range(scenes):
        rng = np.random.default_rng((seed, index, 6))
        scene = scene_for(seed, index)
        image = f"images/{index:05d}.webp"
        scene.image.save(folder / image, quality=92, method=2)
        counts = Counter(thing.name for thing in scene.objects)
        present = {name: counts[name] for name in scene.names}
        yield {"image": image, "messages": messages(conversations.talk(rng, scene.place, present))}
        if rng.random() < FACTS:
            yield {"messages": messages(conversations.facts(rng))}
