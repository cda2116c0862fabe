"""Questions beside wishes in the built-in world: their answers are right, and can be read by machines."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from detgpt.answer import parse_answer
from detgpt.evaluation.abilities import read_abilities
from finetune.picto import exam
from finetune.picto.knowledge import load_knowledge
from finetune.picto.language import Wishes
from finetune.picto.questions import counting, fact
from finetune.picto.talks import Conversations

COUNTS = {"dog": 2, "soda": 1, "cat": 1, "scissors": 1}


def test_what_is_counted_is_counted_right_and_named() -> None:
    knowledge = load_knowledge()
    fits = {c.plural: knowledge.fitting(key) for key, c in knowledge.categories.items()} | {"things": set(COUNTS)}
    totals = set()
    for seed in range(60):
        question = counting(np.random.default_rng(seed), knowledge, COUNTS)
        counted = next(
            names for plural, names in fits.items() if f" {plural} " in f" {question.text} ".replace("?", " ")
        )
        expected = {name: n for name, n in COUNTS.items() if name in counted}
        assert parse_answer(question.answer).names == tuple(expected)
        assert question.value == str(sum(expected.values()))
        totals.add(question.value)
    assert totals == {"0", "1", "3", "5"}


def test_the_sum_is_said_after_its_parts() -> None:
    said = {counting(np.random.default_rng(seed), load_knowledge(), COUNTS).answer for seed in range(60)}
    assert 'A dog twice and a cat: that makes three animals.\nTargets: ["dog", "cat"]' in said
    assert 'There is one drink.\nTargets: ["soda"]' in said


def test_facts_hold_as_often_as_not_and_are_those_of_the_knowledge() -> None:
    asked = [fact(np.random.default_rng(seed), load_knowledge()) for seed in range(300)]
    assert 0.4 < np.mean([question.value == "yes" for question in asked]) < 0.6
    for question in asked:
        assert question.answer.lower().startswith(question.value)
    true = [question for question in asked if question.value == "yes"]
    assert all(question.answer.removeprefix("Yes, ").rstrip(".") in question.text for question in true)


def test_a_talk_says_what_is_seen_with_every_wish_and_counts_now_and_then() -> None:
    conversations = Conversations(Wishes(load_knowledge()))
    talks = [conversations.talk(np.random.default_rng(seed), "kitchen", COUNTS) for seed in range(40)]
    for talk in talks:
        count = [re.search("how many|count|number of", exchange.wish.lower()) is not None for exchange in talk]
        assert [" I see " in exchange.answer for exchange in talk] == [not c or i == 0 for i, c in enumerate(count)]
    counted = [exchange for talk in talks for exchange in talk if "how many" in exchange.wish.lower()]
    assert counted and any(exchange is talk[0] for talk in talks for exchange in counted)


def test_a_greeting_does_not_tell_which_kind_of_wish_follows() -> None:
    """Said with needs only, "Hello, a green animal, please" would be answered as the need that sounds most like it."""
    conversations = Conversations(Wishes(load_knowledge()))
    talks = [conversations.talk(np.random.default_rng(seed), "kitchen", COUNTS) for seed in range(200)]
    plain = [e.wish.lower() for talk in talks for e in talk if re.match("You want (?!.*, and only)", e.answer)]
    greeted = [wish for wish in plain if wish.startswith(("hi, ", "hello, ", "hey, ", "excuse me, "))]
    assert 0.1 < len(greeted) / len(plain) < 0.4


@pytest.mark.parametrize("ability", ["captions", "counting", "attributes", "needs", "facts"])
def test_the_exam_in_the_repository_is_what_the_command_writes(ability: str) -> None:
    committed = read_abilities(exam.FOLDER)[ability].questions
    assert len(committed) >= 120
    assert all((question.image is None) == (ability == "facts") for question in committed)


def test_the_exam_comes_out_the_same_every_time() -> None:
    lines = [json.dumps(question) for question in exam.facts()]
    assert lines == (exam.FOLDER / "facts" / "data.jsonl").read_text().splitlines()
    some = exam.asked("counting", exam.how_many, "seen", exam.FOLDER, 2)
    assert [json.dumps(next(some)) for _ in range(12)] == (
        (exam.FOLDER / "counting" / "data.jsonl").read_text().splitlines()[:12]
    )
