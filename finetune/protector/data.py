"""The built-in set of a guard (`stage: protector.data`): exchanges of the pictogram world, harmful and not.

    stage: protector.data
    output: build/guard/data
    harmful: 8000           # exchanges of the training about harm; as many are about none
    alone: 0                # questions of the training without an answer; every other one means harm

    train, validation, test     exchanges that share no text and no question
    questions                   the `alone`: for n-grams, network and encoder, which read no answers
    strangers                   the same by an author of whom training has nothing
    categories                  kinds of harm that no training knows, with harmless exchanges, by that author

Half of the harmless exchanges sound like harm. In every folder `data.jsonl` as `finetune.protector.exchanges` has it.
The same seed gives the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from detgpt import terminal
from detgpt.answer import format_answer
from detgpt.guards.template import conversation
from finetune import rundir
from finetune.picto.language import as_typed
from finetune.picto.places import PLACES
from finetune.protector.answers import (
    LEFT_OUT,
    Look,
    declined,
    helpful,
    look,
    nothing_fits,
    reasoned,
    rewritten,
    volunteered,
)
from finetune.protector.exchanges import write_rows
from finetune.protector.texts import LANGUAGES, Asked, Part, Texts, pick
from finetune.recipe import StageConfig

Row = dict[str, Any]
PARTS: dict[str, Part] = {
    "train": "train",
    "validation": "validation",
    "test": "test",
    "strangers": "strangers",
    "categories": "strangers",
}
NUMBER = {name: i for i, name in enumerate(PARTS)}  # its own random numbers for each folder
TRIES = 50  # draws of a question that is new
FOREIGN = 0.3  # share of harmless wishes that are not chosen to sound like harm; of all it is half of that


class Config(StageConfig):
    """harmful: exchanges about harm in `train`. alone: questions beside it. measured: as `harmful`, elsewhere."""

    stage: Literal["protector.data"]
    harmful: int = Field(default=8000, ge=20)
    alone: int = Field(default=0, ge=0)
    measured: int = Field(default=1200, ge=20)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config, {})
    taken: set[str] = set()
    for folder in PARTS:
        count = config.harmful if folder == "train" else config.measured
        write_rows(config.output / folder, exchanges(folder, 2 * count, config.seed, taken))
        terminal.note(f"wrote {2 * count} exchanges to {config.output / folder}")
    if config.alone:
        write_rows(config.output / "questions", questions(config.alone, config.seed, taken))
        terminal.note(f"wrote {config.alone} questions to {config.output / 'questions'}")
    rundir.finish(config.output, {})


def exchanges(folder: str, count: int, seed: int, taken: set[str]) -> list[Row]:
    """`count` exchanges for a folder of PARTS, every other one about harm; no question is in `taken`, which grows."""
    texts, part = Texts(), PARTS[folder]
    categories = texts.held_out if folder == "categories" else texts.trained
    rows = []
    for i in range(count):
        rng = np.random.default_rng((seed, NUMBER[folder], i))
        category = categories[(i // 2) % len(categories)] if i % 2 == 0 else None
        row = _new(lambda rng=rng, category=category: _exchange(texts, rng, category, part), taken)  # type: ignore[misc]
        rows.append(row)
    return rows


def questions(count: int, seed: int, taken: set[str]) -> list[Row]:
    """`count` questions for training that have no answer, likewise."""
    rows = exchanges("train", count, seed + 1, taken)
    return [
        {
            "question": row["question"],
            "question_harmful": row["question_harmful"],
            "categories": row["categories"] if row["question_harmful"] else [],
            "kind": row["kind"],
        }
        for row in rows
    ]


def _new(draw: Callable[[], Row], taken: set[str]) -> Row:
    """The first row that is drawn whose question is not yet `taken`. Raises `RuntimeError` where there is none."""
    for _ in range(TRIES):
        row = draw()
        key = row["question"].lower().strip(".!? ")
        if key not in taken:
            taken.add(key)
            return row
    raise RuntimeError(f"the lists have no more wishes like {row['question']!r}: add some, or ask for fewer exchanges")


def _exchange(texts: Texts, rng: np.random.Generator, category: str | None, part: Part) -> Row:
    if category is None:
        return _harmless(texts, rng, part)
    return _harmful(texts, rng, category, part)


def _harmful(texts: Texts, rng: np.random.Generator, category: str, part: Part) -> Row:
    """A harmful wish with an answer that complies and one that does not; now and then two of a kind."""
    about = texts.categories[category]
    if category in texts.trained and rng.random() < FOREIGN / 2:
        asked = texts.foreign(rng, pick(rng, LANGUAGES), category, part)
    else:
        asked = texts.harm(rng, category, part)
    at = look(rng, about["things"])
    things = [name for name in at.names if name in about["things"]]
    complies = helpful(rng, at, things, asked.purpose, part)
    if rng.random() < 0.3:  # the way that an answer is put tells nothing
        complies = reasoned(rng, at, things, texts.of_the_world(rng, at.names, part))
    declines = declined(rng, at, about["refusal"], part)
    kind = rng.random()
    if kind < 0.8:
        answers, harmful = [complies, declines], [True, False]
    elif kind < 0.9:
        answers, harmful = [complies, helpful(rng, at, things[:1], about["purpose"], part)], [True, True]
    else:
        answers, harmful = [declines, declined(rng, at, about["refusal"], part)], [False, False]
    row = _row(texts, rng, asked, part, answers, harmful)
    if harmful == [True, False]:
        return row | {"rewrite": rewritten(complies, at, about["refusal"])}
    return row | {"rewrite": format_answer(about["refusal"], [])} if harmful[0] else row


def _harmless(texts: Texts, rng: np.random.Generator, part: Part) -> Row:
    """A wish that means no harm with an answer to it, and in a quarter of them one that brings harm in."""
    lookalike = rng.random() < 0.5
    if lookalike:
        asked = texts.lookalike(rng, part)
    elif rng.random() < FOREIGN:
        asked = texts.foreign(rng, pick(rng, LANGUAGES), None, part)
    elif rng.random() < 0.6:
        return _ordinary(texts, rng, part)
    else:
        asked = texts.everyday(rng, part)
    at = look(rng)
    things = [str(name) for name in at.names if rng.random() < 0.4] or [pick(rng, at.names)]
    kind = rng.random()
    if kind < 0.15:
        answer = nothing_fits(rng, at)
    elif kind < 0.6:
        answer = helpful(rng, at, things, asked.purpose, part)
    else:
        answer = reasoned(rng, at, things, texts.of_the_world(rng, at.names, part))
    row = _row(texts, rng, asked, part, [answer], [False]) | {"lookalike": lookalike}
    if rng.random() < 0.25:
        harm = texts.harm(rng, pick(rng, texts.trained), part)
        thing = pick(rng, texts.categories[str(harm.category)]["things"])
        harmful = volunteered(rng, at, thing, harm, part)
        row["answers"].append(harmful)
        row["harmful"].append(True)
        row |= {"categories": [harm.category], "rewrite": rewritten(harmful, at, LEFT_OUT)}
    return row


def _ordinary(texts: Texts, rng: np.random.Generator, part: Part) -> Row:
    """A wish that the built-in reasoner was made for and what it says, right or wrong; of some only the beginning."""
    at = Look(pick(rng, list(PLACES)), tuple(texts.some_things(rng)))
    wish = texts.of_the_world(rng, at.names, part)
    fitting = [name for name in at.names if name in wish.fits]
    if rng.random() < 0.2:
        fitting = [str(name) for name in at.names if rng.random() < 0.3]
    answer = reasoned(rng, at, fitting, wish)
    if rng.random() < 0.2:
        answer = "".join(answer.partition(".")[:2])
    return _row(texts, rng, Asked(as_typed(rng, wish.text), ""), part, [answer], [False]) | {"lookalike": False}


def _row(
    texts: Texts, rng: np.random.Generator, asked: Asked, part: Part, answers: list[str], harmful: list[bool]
) -> Row:
    """The wish in one of the ways to put it: harmless ones in each as often, so that the way tells nothing."""
    kind = str(rng.choice(["direct", "direct", "direct", "role-play", "suffix", "talk"]))
    wish = texts.among_others(rng, asked.text) if part == "train" else asked.text
    return {
        "question": _put(texts, rng, kind, wish, part),
        "question_harmful": asked.category is not None,
        "categories": [asked.category] if asked.category else [],
        "answers": answers,
        "harmful": harmful,
        "kind": kind,
    }


def _put(texts: Texts, rng: np.random.Generator, kind: str, wish: str, part: Part) -> str:
    """A wish as it is, in a role, with a suffix, or among harmless wishes of a talk."""
    if kind == "role-play":
        return texts.role(rng, wish, part)
    if kind == "suffix":
        return texts.suffix(rng, wish, part)
    if kind == "talk":
        turns = [pick(rng, (texts.lookalike, texts.everyday))(rng, part).text for _ in range(rng.integers(1, 3))]
        turns.insert(int(rng.integers(len(turns) + 1)), wish)
        return conversation(turns)
    return wish
