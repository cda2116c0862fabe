"""N-grams beside a detector: they tell harm by which words meet, and a folder says how much they count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detgpt.errors import InputError, ModelError
from detgpt.guards.ngrams import NGRAMS_FILE, NGrams, features
from detgpt.guards.parts import HarmDetector, Questions
from detgpt.guards.protector import Protector
from finetune.protector.ngrams import fit
from tests.tiny_guards import HARM, save_guard

# No single word tells them apart, only which two meet.
HARMFUL = [
    f"{how} {verb} {thing} now" for how in ("I", "let me") for verb, thing in [("kick", "dogs"), ("burn", "homes")]
]
HARMLESS = [
    f"{how} {verb} {thing} now" for how in ("I", "let me") for verb, thing in [("kick", "balls"), ("burn", "logs")]
]
HARMLESS += [
    f"{how} {verb} {thing} now" for how in ("I", "let me") for verb, thing in [("walk", "dogs"), ("paint", "homes")]
]


def learned(texts: list[str], **settings: Any) -> NGrams:
    kinds = [["arson" if "burn" in text else "cruelty"] if text in HARMFUL else [] for text in texts]
    return fit(texts, np.array([text in HARMFUL for text in texts]), kinds, **settings)


@pytest.fixture(scope="module")
def ngrams() -> NGrams:
    return learned([*HARMFUL, *HARMLESS] * 3)


@pytest.fixture
def folder(tmp_path: Path, ngrams: NGrams) -> Path:
    save_guard(tmp_path, detoxifier=False)
    ngrams.save(tmp_path / "questions")
    return describe(tmp_path, {"folder": "questions", "alone": [1.0, 0.0], "answered": [0.5, 0.25, -1.0]})


def describe(folder: Path, questions: Any) -> Path:
    described = json.loads((folder / "guard.json").read_text())
    (folder / "guard.json").write_text(json.dumps(described | {"questions": questions}))
    return folder


def test_words_that_are_harmless_alone_are_harmful_together(ngrams: NGrams):
    said = ngrams.score(["we kick dogs now", "we kick balls now", "we walk dogs now"])
    assert said[0] > 0 > said[1:].max()


def test_what_is_learned_does_not_depend_on_the_order_of_the_examples(ngrams: NGrams):
    again = learned([*HARMLESS, *HARMFUL] * 3)
    assert (again.hashes == ngrams.hashes).all() and np.allclose(again.weights, ngrams.weights, atol=1e-3)


def test_the_features_that_matter_most_are_kept(ngrams: NGrams):
    few = learned([*HARMFUL, *HARMLESS] * 3, kept=8)
    assert len(few.hashes) == 8 and set(few.hashes) < set(ngrams.hashes)
    assert few.score(HARMFUL).min() > few.score(HARMLESS).max()


def test_there_must_be_harm_and_no_harm_to_learn_from():
    with pytest.raises(InputError, match="one kind"):
        learned(HARMFUL)


def test_they_say_which_kind_of_harm_it_is(ngrams: NGrams):
    assert (ngrams.kind("we kick dogs"), ngrams.kind("let us burn homes")) == ("cruelty", "arson")
    nameless = fit([*HARMFUL, *HARMLESS], np.arange(12) < 4, [[]] * 12)
    assert nameless.kind("we kick dogs") is None


def test_they_are_the_same_from_the_disk(ngrams: NGrams, tmp_path: Path):
    ngrams.save(tmp_path)
    loaded = NGrams.load(tmp_path)
    assert np.allclose(loaded.score(HARMFUL), ngrams.score(HARMFUL), atol=1e-2)
    assert len(features("")) == 0 and loaded.score([""])[0] == pytest.approx(ngrams.bias, abs=1e-5)


def test_they_judge_a_question_alone_and_have_a_say_in_an_answer(folder: Path, ngrams: NGrams):
    asked = "I kick dogs now"
    detector = HarmDetector(folder / "detector", list(HARM), torch.device("cpu"))
    both = HarmDetector(
        folder / "detector",
        list(HARM),
        torch.device("cpu"),
        questions=Questions.load(folder, json.loads((folder / "guard.json").read_text())["questions"]),
    )
    said = float(NGrams.load(folder / "questions").score([asked])[0])
    ((alone, _), (answered, kind)) = both.score([(asked, None), (asked, "stab")])
    ((plain, plain_kind),) = detector.score([(asked, "stab")])
    assert alone == pytest.approx(sigmoid(said), abs=1e-5)
    assert answered == pytest.approx(sigmoid(0.5 * np.log(plain / (1 - plain)) + 0.25 * said - 1), abs=1e-4)
    assert kind == "cruelty" and plain_kind in HARM


def test_the_guard_of_a_folder_has_them(folder: Path):
    guard = Protector(folder)
    assert guard.check("I kick dogs now").action == "refused"  # of which the detector knows no word
    assert guard.check("I kick balls now").action == "pass"


@pytest.mark.parametrize(
    ("questions", "says"),
    [
        ({}, "'folder', two numbers 'alone' and three 'answered'"),
        ({"folder": "questions", "alone": [1.0], "answered": [1, 0, 0]}, "two numbers 'alone'"),
        ({"folder": "questions", "alone": ["much", 0], "answered": [1, 0, 0]}, "two numbers 'alone'"),
        ({"folder": "nowhere", "alone": [1, 0], "answered": [1, 0, 0]}, "nowhere"),
    ],
)
def test_a_folder_that_describes_them_wrong_is_named(folder: Path, questions: Any, says: str):
    with pytest.raises(ModelError, match=says):
        Protector(describe(folder, questions))


def test_damaged_ones_are_named(folder: Path, ngrams: NGrams):
    replace(ngrams, hashes=ngrams.hashes[::-1]).save(folder / "questions")
    with pytest.raises(ModelError, match="ascending"):
        Protector(folder)
    (folder / "questions" / NGRAMS_FILE).write_bytes(b"none")
    with pytest.raises(ModelError, match=NGRAMS_FILE):
        Protector(folder)


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))
