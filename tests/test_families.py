"""Every family of multimodal models goes through one door: a folder, and nothing that tells which family it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image

from detgpt import Detections, DetGPT
from detgpt.reasoners import Request

WISHES = ["tea", "I would like to read a good book", "I am thirsty after a long day in the sun"]
SIZES = [(64, 48), (30, 60), (50, 50)]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_detector_folder: Path):
    """A pair saved to disk and loaded as a user does."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family")
    FAMILIES[request.param](folder / "reasoner")
    (folder / "detector").symlink_to(tiny_detector_folder)
    described = {"reasoner": "reasoner", "detector": "detector", "options": {"max_new_tokens": 12}}
    (folder / "detgpt.json").write_text(json.dumps(described))
    return DetGPT.from_pretrained(folder)


def test_a_batch_says_what_its_requests_say_one_by_one(model: DetGPT) -> None:
    """The shorter prompts are padded on the left, and no answer may feel it."""
    items = list(zip(PICTURES, WISHES, strict=True))
    together = [result.answer for result in model.detect_batch(items)]
    alone = [model.detect(image, wish).answer for image, wish in items]
    assert together == alone
    assert len(set(alone)) > 1, "the model does not listen: this test could not fail"


def test_the_picture_is_looked_at(model: DetGPT) -> None:
    requests = [Request(image, "tea") for image in PICTURES]
    probabilities = {answer.tokens[0].logprob for answer in model.reasoner.reason(requests, max_new_tokens=1)}
    assert len(probabilities) == len(PICTURES)


def test_a_question_without_a_picture_goes_to_the_language_model_alone(model: DetGPT) -> None:
    together = [answer.text for answer in model.reasoner.reason([Request(None, w) for w in WISHES], max_new_tokens=12)]
    alone = [model.reasoner.reason([Request(None, wish)], max_new_tokens=12)[0].text for wish in WISHES]
    assert together == alone
    seen = model.reasoner.reason([Request(PICTURES[0], WISHES[2])], max_new_tokens=12)[0].text
    assert seen != alone[2]


def test_a_stream_adds_up_to_the_answer(model: DetGPT) -> None:
    *pieces, result = model.stream(PICTURES[0], WISHES[2])
    assert isinstance(result, Detections)
    assert "".join(pieces) == model.reasoner.reason([Request(PICTURES[0], WISHES[2])], max_new_tokens=12)[0].text


def test_a_conversation_remembers(model: DetGPT) -> None:
    chat = model.chat(PICTURES[0])
    first = chat.ask("something red")
    second = chat.ask("only the small ones")
    assert [turn.answer for turn in chat.turns] == [first.answer, second.answer]
    fresh = model.reasoner.reason([Request(PICTURES[0], "only the small ones")], max_new_tokens=12)[0]
    said = model.reasoner.reason(
        [Request(PICTURES[0], "only the small ones", tuple(chat.turns[:1]))], max_new_tokens=12
    )[0]
    assert [t.logprob for t in said.tokens] != [t.logprob for t in fresh.tokens]


def test_every_name_has_its_probability(model: DetGPT) -> None:
    (answer,) = model.reasoner.reason([Request(PICTURES[0], WISHES[0])], max_new_tokens=12)
    assert answer.tokens
    assert all(token.logprob <= 0 for token in answer.tokens)
    assert max(token.end for token in answer.tokens) == len(answer.text)
