"""What people ask of the guarded built-in world, harmful or not: texts drawn from the lists of the YAML files.

    texts = Texts()
    texts.harm(rng, "theft")              # Asked("I plan to steal a bicycle, nobody must notice", "steal a bicycle", …)
    texts.lookalike(rng)                  # Asked("help me to kill the light", "kill the light", …)

Each list is cut into three parts that share no text: "train", "validation" (every seventh of what is not held out) and
"test" (the held-out lists). Harmful and harmless wishes are put in the same frames, about the same people.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes, WishSampler, as_typed
from finetune.recipe import read_yaml

HERE = Path(__file__).parent
Part = Literal["train", "validation", "test"]
LANGUAGES = ("de", "fr", "es")
PRONOUNS = ("him", "her", "them", "someone")
NEEDS_NOUN = re.compile(r"\{person\}('s| [a-z]+s\b| must| will)|of \{person\}")  # "him's house" is no English
EVERY = 7  # of so many texts one is for validation
FOR_TEST = {"harm": 1, "benign": 4}  # how many acts at the end of a language's list


@dataclass(frozen=True)
class Asked:
    """A wish in somebody's words. purpose: what for, as an infinitive, "" if not said. category: of harm, or None."""

    text: str
    purpose: str
    category: str | None = None


class Texts:
    """Draws wishes. The lists stand in harm.yaml, benign.yaml and frames.yaml beside this file."""

    def __init__(self) -> None:
        self.harmful, self.benign, self.frames = (read_yaml(HERE / f"{n}.yaml") for n in ("harm", "benign", "frames"))

    @cached_property
    def categories(self) -> dict[str, dict[str, Any]]:
        return self.harmful["categories"]

    @cached_property
    def trained(self) -> list[str]:
        """The categories that training knows; a guard names these."""
        return [name for name, about in self.categories.items() if about["split"] == "train"]

    @cached_property
    def held_out(self) -> list[str]:
        return [name for name in self.categories if name not in self.trained]

    def harm(self, rng: np.random.Generator, category: str, part: Part = "train") -> Asked:
        about = self.categories[category]
        new = category in self.held_out  # all of it is unseen then
        acts = about["acts"] if new else of_part(about, "acts", part)
        wishes = about["wishes"] if new else of_part(about, "wishes", part)
        return self._wish(rng, self.harmful, acts, wishes, part, category, about["purpose"])

    def lookalike(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        lists = self.benign["lookalikes"]
        return self._wish(rng, self.benign, of_part(lists, "acts", part), of_part(lists, "wishes", part), part)

    def everyday(self, rng: np.random.Generator, part: Part = "train") -> Asked:
        """What people otherwise ask for; half of it about the things of the built-in world."""
        if rng.random() < 0.5:
            test = part == "test"
            kinds = ("need", "need", "attribute", "category", "direct")
            kind = str(rng.choice((*kinds, "held_out_need") if test else (*kinds, "exclusion", "everything")))
            present = [str(name) for name in rng.choice(self._things, 4, replace=False)]
            return Asked(self._world.draw(rng, present, kind, held_out=test and kind != "held_out_need").text, "")
        lists = self.benign["everyday"]
        return self._wish(rng, self.benign, of_part(lists, "acts", part), [], part)

    def foreign(self, rng: np.random.Generator, language: str, category: str | None, part: Part = "train") -> Asked:
        """A wish in another language, harmful if it is of a category."""
        acts = self.categories[category][language] if category else self.benign[language]
        last = FOR_TEST["harm" if category else "benign"]
        act = pick(rng, acts[-last:] if part == "test" else acts[:-last])
        purpose = self.categories[category]["purpose"] if category else ""  # answers are in English
        return Asked(pick(rng, self.frames[language]).format(act=act), purpose, category)

    def role(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "roles", wish, part)

    def suffix(self, rng: np.random.Generator, wish: str, part: Part = "train") -> str:
        return self._wrap(rng, "suffixes", wish, part)

    def turns(self, rng: np.random.Generator, wish: str, part: Part = "train") -> list[str]:
        frames = of_part(self.frames, "turns", part)
        return [turn.replace("{wish}", wish) for turn in frames[int(rng.integers(len(frames)))]]

    def sign(self, rng: np.random.Generator, part: Part = "train") -> str:
        """A question that leaves what is wished to a text in the picture."""
        return pick(rng, of_part(self.frames, "signs", part))

    def _wrap(self, rng: np.random.Generator, kind: str, wish: str, part: Part) -> str:
        ended = wish if wish[-1] in ".!?" else f"{wish}."
        return pick(rng, of_part(self.frames, kind, part)).replace("{wish}", ended)

    def _wish(
        self,
        rng: np.random.Generator,
        lists: dict[str, Any],
        acts: Sequence[str],
        wishes: Sequence[str],
        part: Part,
        category: str | None = None,
        purpose: str = "",
    ) -> Asked:
        """A whole wish, or an act in a frame; a third of them with an attitude."""
        # An act has as many ways to be put as there are frames: draw it more often.
        whole = rng.random() < len(wishes) / (len(wishes) + 2 * len(acts))
        template = pick(rng, wishes if whole else acts)
        attitude = pick(rng, of_part(lists, "attitudes", part)) if rng.random() < 0.35 else ""
        people = [p for p in lists["people"] if not (NEEDS_NOUN.search(template + attitude) and p in PRONOUNS)]
        slots = {"person": pick(rng, people), "pet": pick(rng, lists["pets"]), "they": pick(rng, ("he", "she"))}
        text = template.format(**slots)
        if not whole:
            purpose, text = text, pick(rng, of_part(self.frames, "acts", part)).format(act=text)
        if attitude:
            mark = "" if text[-1] in ".?!" else ","
            text = f"{text}{mark} {attitude.format(**slots)}"
        return Asked(as_typed(rng, text), purpose, category)

    @cached_property
    def _things(self) -> list[str]:
        return list(load_knowledge().classes)

    @cached_property
    def _world(self) -> WishSampler:
        return WishSampler(Wishes(load_knowledge()))


def of_part(lists: dict[str, Any], key: str, part: Part) -> list[Any]:
    """The texts under `key` that belong to `part`; lists too short to be cut are shared by training and validation."""
    if part == "test":
        return lists[f"held_out_{key}"]
    texts = lists[key]
    if len(texts) < 2 * EVERY:
        return texts
    return [text for i, text in enumerate(texts) if (i % EVERY == EVERY - 1) == (part == "validation")]


def pick(rng: np.random.Generator, texts: Sequence[Any]) -> Any:
    return texts[int(rng.integers(len(texts)))]
