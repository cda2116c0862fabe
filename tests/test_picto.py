"""The built-in model on its committed evaluation splits: it looks, it reasons, it grounds.

The bars lie a margin below what `detgpt eval` measures on the whole splits (see the model card).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detgpt import DetGPT
from detgpt.evaluation import evaluate
from finetune.picto.knowledge import load_knowledge
from finetune.picto.scenes import make_scene
from finetune.picto.splits import FOLDER as SPLITS

WEIGHTS = Path("weights/picto")


@pytest.fixture(scope="module")
def model() -> DetGPT:
    return DetGPT.from_pretrained("picto")


@pytest.fixture(scope="module")
def seen(model):
    return evaluate(model, SPLITS / "seen", limit=90)


@pytest.fixture(scope="module")
def paraphrases(model):
    return evaluate(model, SPLITS / "paraphrases", limit=90)


def test_it_is_small_and_of_the_classes_that_big_checkpoints_use(model):
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 48e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ".md", ".jinja"}
    assert type(model.reasoner._model).__name__ == "LlavaForConditionalGeneration"
    assert type(model.detector.model).__name__ == "GroundingDinoForObjectDetection"


def test_it_answers_wishes_about_new_scenes(seen):
    assert seen["end_to_end"]["f1_50"] >= 0.79
    assert seen["reasoner"]["f1"] >= 0.88


def test_it_understands_ways_of_speaking_that_it_never_met(paraphrases):
    assert paraphrases["end_to_end"]["f1_50"] >= 0.75


def test_it_combines_what_it_learned_one_by_one(model):
    """Held-out needs, such as a cold drink or a red fruit."""
    assert evaluate(model, SPLITS / "needs", limit=90)["reasoner"]["f1"] >= 0.68


def test_it_boxes_nothing_when_nothing_fits(seen):
    assert seen["end_to_end"]["rejection"] >= 0.93
    assert seen["reasoner"]["rejection"] >= 0.92


def test_it_looks_before_it_names(seen):
    """A model that names every drink for "thirsty", whatever stands there, would name mostly what is not there."""
    assert seen["reasoner"]["hallucination"] <= 0.05


def test_its_answers_can_be_read(seen, paraphrases):
    assert seen["reasoner"]["parse_failure"] <= 0.02
    assert paraphrases["reasoner"]["parse_failure"] <= 0.02


def test_its_detector_finds_what_it_is_told_to_find(seen):
    assert seen["detector"]["ap50"] >= 0.88


def test_wrong_weights_fail_these_tests(model):
    """The bars mean something: the same reasoner with its projector scrambled does not pass them."""
    blind = DetGPT.from_pretrained("picto")
    projector = blind.reasoner._model.model.multi_modal_projector
    projector.linear_2.weight.data = projector.linear_2.weight.data.flip(0)
    result = evaluate(blind, SPLITS / "seen", limit=24)
    assert result["end_to_end"]["f1_50"] < 0.5


def test_the_same_wish_looks_at_the_picture(model):
    """ "I am thirsty" names what stands there, not what could."""
    knowledge = load_knowledge()
    drinks = knowledge.fitting(knowledge.needs["thirst"].rule)
    answers = set()
    for index in range(12):
        scene = make_scene((31, index), (400, 300), knowledge.classes)
        named = {t.name for t in model.detect(scene.image, "I am thirsty").targets}
        answers.add(frozenset(named))
        assert not named - drinks or named & set(scene.names)
    assert len(answers) > 1


def test_boxes_are_in_the_pixels_of_the_picture_given(model):
    """The same picture at a third of its size gives the same boxes, a third as large."""
    differences = []
    for seed in range(6):
        scene = make_scene((31, seed), (1200, 900), load_knowledge().classes)
        large, small = (
            model.detect(image, names=scene.names, box_threshold=0.5)
            for image in (scene.image, scene.image.resize((400, 300)))
        )
        for label in set(small.labels) & set(large.labels):
            if small.labels.count(label) == large.labels.count(label) == 1:
                a, b = (result.boxes[result.labels.index(label)] for result in (small, large))
                differences.append(np.abs(3 * a - b).max())
    assert len(differences) >= 5
    assert np.median(differences) < 10
    assert max(differences) < 60


def test_confidence_is_a_probability(model):
    result = model.detect("examples/kitchen.png", "I am thirsty")
    assert result.targets
    assert all(t.confidence is not None and 0 < t.confidence <= 1 for t in result.targets)
