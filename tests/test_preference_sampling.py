"""Answers by chance, from the tiny model that knows a few by heart and from the built-in one."""

from pathlib import Path

import pytest
import torch

from detgpt.answer import answer_is_complete
from detgpt.errors import InputError
from detgpt.images import load_image
from detgpt.models import resolve
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.data.records import load_records
from finetune.loading import Checkpoint, load
from finetune.preference.sampling import distinct_2, sample

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/needs"


@pytest.fixture(scope="module")
def picto():
    return load(Checkpoint(model="picto"), "float32")


@pytest.fixture(scope="module")
def wishes():
    return list(load_records(SPLIT).select(range(7)))


def test_several_answers_to_each_wish_that_differ_by_the_seed_alone(picto, wishes):
    model, processor = picto
    model.train()
    decoding = model.generation_config
    state = torch.random.get_rng_state()
    answers = sample(model, processor, wishes, count=3, temperature=1.5, batch_size=3, seed=1)
    assert [len(row) for row in answers] == [3] * 7
    assert len({answer for row in answers for answer in row}) > 10
    assert model.training and model.generation_config is decoding and torch.equal(state, torch.random.get_rng_state())
    assert sample(model, processor, wishes, count=3, temperature=1.5, batch_size=3, seed=1) == answers
    assert sample(model, processor, wishes, count=3, temperature=1.5, batch_size=3, seed=2) != answers


def test_the_likeliest_answer_is_what_a_user_gets_whatever_the_batch(picto, wishes):
    model, processor = picto
    reasoner = HuggingFaceReasoner(resolve("picto").reasoner, device=str(model.device))
    requests = [Request(load_image(wish["image"]), wish["instruction"]) for wish in wishes]
    usual = [[answer.text] for answer in reasoner.reason(requests)]
    for batch_size in (1, 4):
        assert sample(model, processor, wishes, count=1, temperature=0, batch_size=batch_size) == usual
    # Of the likeliest tokens alone, chance has nothing to choose from.
    assert sample(model, processor, wishes, count=2, top_p=1e-9) == [row * 2 for row in usual]


def test_an_answer_ends_with_its_line_or_where_there_is_no_more_room(picto, wishes):
    model, processor = picto
    long = [text for row in sample(model, processor, wishes, count=4) for text in row]
    assert all(answer_is_complete(text) and text.endswith("]") for text in long)
    short = [text for row in sample(model, processor, wishes, count=1, max_new_tokens=4) for text in row]
    assert not any(map(answer_is_complete, short))


def test_chance_has_all_words_to_choose_from(tiny_reasoner_folder, wishes):
    """transformers takes the 50 likeliest unless told otherwise."""
    model, processor = load(Checkpoint(model=str(tiny_reasoner_folder)), "float32")
    answers = sample(model, processor, wishes[:1], count=400, temperature=1e4, max_new_tokens=1)
    assert len(set(answers[0])) > 50


def test_what_cannot_be_asked_is_refused(picto, wishes):
    with pytest.raises(InputError, match="count=2 answers at temperature=0 would all be the same"):
        sample(*picto, wishes, count=2, temperature=0)
    for lacking in ("instruction", "image"):
        with pytest.raises(InputError, match=r"data\.jsonl, line 1: only a wish about an image"):
            sample(*picto, [{**wishes[0], lacking: None}], count=1)


def test_distinct_pairs_of_words():
    assert distinct_2(["a cup of tea", "a cup of milk"]) == 4 / 6  # "a cup", "cup of" twice
    assert distinct_2(["tea tea tea"]) == 1 / 2
    assert distinct_2(["tea", ""]) == 0
