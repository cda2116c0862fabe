"""Which name a box of Grounding DINO belongs to, on the names that are known to go wrong."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_grounding_dino import FAMILIES, assert_same, of_name, picture, plain_forward, save_checkpoint

from detgpt import DetGPT, Options
from detgpt.boxes import iou_matrix
from detgpt.detectors.grounding_dino import GroundingDinoDetector
from detgpt.errors import InputError, UnreadableNameError
from detgpt.reasoners.scripted import ScriptedReasoner

EVERYTHING = {"box_threshold": 0, "text_threshold": 0}
# Names → the prompt that the model is to read, and for each name the tokens (the first is [CLS]) that score it.
HARD = {
    "names inside names": (["wine glass", "glass", "wine"], "wine glass . glass . wine .", [[1, 2], [4], [6]]),
    "a plural": (["glasses", "glass"], "glasses . glass .", [[1, 2], [4]]),
    "repeated words": (["cup of cup", "cup", "red cup"], "cup of cup . cup . red cup .", [[1, 2, 3], [5], [7, 8]]),
    "many words": (
        ["cold glass of red wine", "t-shirt"],
        "cold glass of red wine . t-shirt .",
        [[*range(1, 6)], [7, 8, 9]],
    ),
    "marks that end or list phrases": (["Red, cold cup.", "t.shirt?"], "red cold cup . t shirt .", [[1, 2, 3], [5, 6]]),
    "an emoji, which is unknown": (["☕ cup", "table"], "☕ cup . table .", [[2], [4]]),
    "Chinese, partly unknown": (["红杯 cup", "杯 table"], "红杯 cup . 杯 table .", [[3], [6]]),
    "accents and capitals": (["Täble", "CÚP"], "täble . cúp .", [[1], [3]]),
    "a letter that grows in lower case": (["İ a", "cup"], "i̇ a . cup .", [[2], [4]]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    """A checkpoint that reads prompts of 256 tokens, as the real ones do."""
    made = tmp_path_factory.mktemp("spans")
    save_checkpoint(made, request.param)
    config = json.loads((made / "config.json").read_text()) | {"max_text_len": 256}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def detector(folder) -> GroundingDinoDetector:
    return GroundingDinoDetector(folder, device="cpu")


def by_score(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


@pytest.mark.parametrize("case", HARD)
def test_a_box_goes_to_the_name_whose_tokens_score_it_best(detector, case):
    names, text, columns = HARD[case]
    image = picture()
    probabilities, boxes, _ = plain_forward(detector, image, text)
    scores = np.stack([probabilities[:, tokens].max(axis=1) for tokens in columns], axis=1)  # (Q, names)
    order = by_score(scores.max(axis=1))
    grounding = detector.detect([image], [names], prompting="joint", **EVERYTHING)[0]
    assert grounding.name_index.tolist() == scores.argmax(axis=1)[order].tolist()
    assert_same((grounding.boxes, grounding.scores), (boxes[order], scores.max(axis=1)[order]))


@pytest.mark.parametrize("case", HARD)
def test_a_name_asked_alone_is_scored_by_its_own_tokens(detector, case):
    names, text, columns = HARD[case]
    image = picture()
    grounding = detector.detect([image], [names], **EVERYTHING)[0]
    tokens = plain_forward(detector, image, text)[2]
    starts = [0, *(i for i, token in enumerate(tokens) if token == ".")]
    for index, phrase in enumerate(text.removesuffix(" .").split(" . ")):
        probabilities, boxes, _ = plain_forward(detector, image, f"{phrase} .")
        scores = probabilities[:, [column - starts[index] for column in columns[index]]].max(axis=1)
        order = by_score(scores)
        assert_same(of_name(grounding, index), (boxes[order], scores[order]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "letter or digit, got ''"),
        (" . , ", "letter or digit"),
        ("☕", "letter or digit, got '☕'"),
        ("杯子", "vocabulary holds no part of the name '杯子'.*English"),
        ("кофе", "vocabulary holds no part"),
        ("x" * 120, "vocabulary holds no part"),  # BERT reads no word of more than 100 letters
        (" ".join(["cup"] * 254), "too long: the detector reads 253 tokens"),
    ],
)
@pytest.mark.parametrize("prompting", ["separate", "joint"])
def test_a_name_that_cannot_be_read_is_an_error_that_says_why(detector, name, message, prompting):
    with pytest.raises(UnreadableNameError, match=message) as error:
        detector.detect([picture()], [["cup", name]], prompting=prompting)
    assert error.value.name == name
    sent = pickle.loads(pickle.dumps(error.value))  # as a worker process sends it
    assert (sent.name, str(sent)) == (name, str(error.value))
    assert isinstance(error.value, InputError)


SIXTY = [" ".join(words) for words in itertools.permutations(["cold", "red", "glass", "wine", "table"], 4)][:60]


def test_sixty_names_go_on_in_a_second_prompt_that_does_not_disturb_the_first(detector):
    # Each takes five of the 254 tokens with its full stop: fifty names fit in the first prompt.
    image = picture()
    passes = []
    hook = detector.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output.logits)))
    try:
        together = detector.detect([image], [SIXTY], prompting="joint", **EVERYTHING)[0]
    finally:
        hook.remove()
    assert passes == [2]
    for first, last in ((0, 50), (50, 60)):
        alone = detector.detect([image], [SIXTY[first:last]], prompting="joint", **EVERYTHING)[0]
        mine = (together.name_index >= first) & (together.name_index < last)
        assert together.name_index[mine].tolist() == (alone.name_index + first).tolist()
        assert_same((together.boxes[mine], together.scores[mine]), (alone.boxes, alone.scores))


@pytest.mark.parametrize("prompting", ["separate", "joint"])
def test_sixty_names_leave_each_target_its_best_boxes_once(detector, prompting):
    options = Options(nms_threshold=0.5, share_boxes=True, prompting=prompting, **EVERYTHING)
    model = DetGPT(ScriptedReasoner([""]), detector, options=options)
    result = model.detect(picture(), names=SIXTY)
    raw = detector.detect([picture()], [SIXTY], prompting=prompting, **EVERYTHING)[0]
    assert len(result) < len(raw.boxes) or prompting == "joint", "suppression must have had something to do"
    for index, name in enumerate(SIXTY):
        boxes = result.boxes[[label == name for label in result.labels]]
        assert not (np.triu(iou_matrix(boxes, boxes), 1) > 0.5).any()
        asked = raw.scores[raw.name_index == index]
        assert len(boxes) <= len(asked)
        assert not len(asked) or result.scores[[label == name for label in result.labels]].max() == asked.max()


def test_a_reasoners_name_that_cannot_be_read_is_said_and_the_others_are_looked_for(detector):
    answers = {
        "drink": 'A desk.\nTargets: ["杯子", "cup", "кофе"]',
        "sit": 'Targets: ["table"]',
        "write": 'Targets: ["笔"]',
    }
    model = DetGPT(ScriptedReasoner(answers), detector, options=Options(**EVERYTHING))
    drink, sit, write = model.detect_batch([(picture(), wish) for wish in answers])
    assert [(target.name, target.found) for target in drink.targets] == [("cup", True)]
    assert "'杯子'" in drink.problem and "'кофе'" in drink.problem
    assert drink.answer == answers["drink"]
    alone = model.detect(picture(), names=["cup"])
    assert_same((drink.boxes, drink.scores), (alone.boxes, alone.scores))
    assert set(sit.labels) == {"table"} and sit.problem is None
    assert write.targets == () and "'笔'" in write.problem


def test_a_callers_name_that_cannot_be_read_raises(detector):
    with pytest.raises(InputError, match="'杯子'"):
        DetGPT(ScriptedReasoner([""]), detector).detect(picture(), names=["cup", "杯子"])


def test_a_detector_that_complains_of_a_name_nobody_gave_is_not_asked_for_ever():
    class Confused:
        name = "confused"

        def detect(self, images, names, **options):
            raise UnreadableNameError("spoon", "no spoons")

    with pytest.raises(UnreadableNameError, match="no spoons"):
        DetGPT(ScriptedReasoner(['Targets: ["cup"]']), Confused()).detect(picture(), "drink")
