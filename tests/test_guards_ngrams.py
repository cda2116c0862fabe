"""N-grams tell harm by which words meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detgpt.errors import InputError, ModelError
from detgpt.guards.ngrams import NGRAMS_FILE, NGrams, features
from finetune.protector.ngrams import fit

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


def test_damaged_ones_are_named(ngrams: NGrams, tmp_path: Path):
    replace(ngrams, hashes=ngrams.hashes[::-1]).save(tmp_path)
    with pytest.raises(ModelError, match="ascending"):
        NGrams.load(tmp_path)
    (tmp_path / NGRAMS_FILE).write_bytes(b"none")
    with pytest.raises(ModelError, match=NGRAMS_FILE):
        NGrams.load(tmp_path)
