"""The method: ask, parse, ground, one result. The reasoner speaks from a script, so each promise is exact; the
detector is the built-in one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

import detgpt
from detgpt import Detections, DetGPT, InputError, ModelError, Options
from detgpt.answer import RETRY_INSTRUCTION
from detgpt.models import PAIRS, resolve
from detgpt.reasoners import Request
from detgpt.reasoners.scripted import ScriptedReasoner

KITCHEN = "examples/kitchen.png"


@pytest.fixture(scope="module")
def detector():
    return DetGPT.from_pretrained("picto").detector


def scripted(detector, *answers: str, **options) -> DetGPT:
    return DetGPT(ScriptedReasoner(list(answers)), detector, options=Options(box_threshold=0.3, **options))


def test_the_result_holds_everything_a_caller_needs(detector):
    text = 'I see coffee and soda. Both can be drunk.\nTargets: ["coffee", "soda", "umbrella"]'
    result = scripted(detector, text).detect(KITCHEN, "I am thirsty")
    assert result.boxes.dtype == np.float32
    assert result.boxes.shape == (len(result.scores), 4)
    assert set(result.labels) == {"coffee", "soda"}
    assert [(t.name, t.found) for t in result.targets] == [
        ("coffee", True),
        ("soda", True),
        ("umbrella", False),
    ]
    assert result.reasoning == "I see coffee and soda. Both can be drunk."
    assert result.answer == text
    assert result.instruction == "I am thirsty"
    assert result.image_wh == Image.open(KITCHEN).size
    assert all(t.confidence is None for t in result.targets)  # a script knows no probabilities


def test_nothing_fits_is_an_answer(detector):
    result = scripted(detector, "Nothing here helps.\nTargets: []").detect(KITCHEN, "I need a submarine")
    assert result.targets == ()
    assert len(result.boxes) == 0
    assert result.problem is None
    assert result.reasoning == "Nothing here helps."


def test_a_malformed_answer_is_asked_again_once(detector):
    model = scripted(detector, "I think there is coffee.", 'Targets: ["coffee"]')
    result = model.detect(KITCHEN, "I am thirsty")
    assert [t.name for t in result.targets] == ["coffee"]
    assert result.problem is None
    assert result.reasoning == "I think there is coffee."


def test_an_answer_that_stays_malformed_is_data(detector):
    asked: list[Request] = []

    def mumble(request: Request) -> str:
        asked.append(request)
        return "Hmm, hard to say"

    result = DetGPT(ScriptedReasoner(mumble), detector).detect(KITCHEN, "I am thirsty")
    assert len(asked) == 2
    assert asked[1].instruction == RETRY_INSTRUCTION
    assert asked[1].history[-1].answer == "Hmm, hard to say"
    assert result.targets == ()
    assert len(result.boxes) == 0  # the detector is never asked for nothing
    assert result.problem
    assert result.answer == "Hmm, hard to say"


def test_names_need_no_reasoner(detector):
    def never(request: Request) -> str:
        raise AssertionError("the reasoner was asked")

    result = DetGPT(ScriptedReasoner(never), detector).detect(KITCHEN, names=["coffee", " soda ", "coffee"])
    assert [t.name for t in result.targets] == ["coffee", "soda"]
    assert result.instruction is None
    assert {"coffee", "soda"} == set(result.labels)


def test_a_name_finds_the_same_boxes_whatever_else_is_asked(detector):
    model = scripted(detector, "", share_boxes=True)
    alone = model.detect(KITCHEN, names=["coffee"])
    among = model.detect(KITCHEN, names=["soda", "coffee", "strawberry", "pizza", "frying pan"])
    mine = [i for i, label in enumerate(among.labels) if label == "coffee"]
    assert len(alone) >= 1
    assert np.allclose(alone.boxes, among.boxes[mine], atol=0.05)
    assert np.allclose(alone.scores, among.scores[mine], atol=1e-4)


def test_one_thing_gets_one_name_unless_boxes_may_be_shared(detector):
    names = ["frying pan", "pan"]  # two names of one thing
    one = scripted(detector, "").detect(KITCHEN, names=names)
    both = scripted(detector, "", share_boxes=True).detect(KITCHEN, names=names)
    assert len(set(both.labels)) == 2
    assert len(one) < len(both)


def test_a_batch_gives_what_single_calls_give(detector):
    wishes = {
        "I am thirsty": 'Targets: ["coffee", "soda"]',
        "something to eat": 'Targets: ["pizza"]',
        "a submarine": "Targets: []",
    }
    model = DetGPT(ScriptedReasoner(wishes), detector)
    items = [(KITCHEN, "I am thirsty"), ("examples/park.png", "a submarine"), (KITCHEN, "something to eat")]
    for batched, (image, wish) in zip(model.detect_batch(items), items, strict=True):
        single = model.detect(image, wish)
        assert batched.labels == single.labels
        assert np.allclose(batched.boxes, single.boxes, atol=0.1)
    assert model.detect_batch([]) == []


def test_a_stream_writes_the_reasoning_then_gives_the_result(detector):
    text = 'Coffee it is.\nTargets: ["coffee"]'
    *pieces, result = scripted(detector, text).stream(KITCHEN, "I am tired")
    assert "".join(pieces) == text
    assert isinstance(result, Detections)
    assert result.labels[0] == "coffee"


def test_a_chat_remembers_its_turns(detector):
    seen: list[Request] = []

    def answer(request: Request) -> str:
        seen.append(request)
        return 'Targets: ["coffee"]' if request.history else 'Targets: ["coffee", "soda"]'

    chat = DetGPT(ScriptedReasoner(answer), detector).chat(KITCHEN)
    assert {t.name for t in chat.ask("I am thirsty").targets} == {"coffee", "soda"}
    assert {t.name for t in chat.ask("only hot ones").targets} == {"coffee"}
    assert [turn.instruction for turn in seen[1].history] == ["I am thirsty"]
    assert [turn.instruction for turn in chat.turns] == ["I am thirsty", "only hot ones"]


def test_a_model_may_be_called_from_several_threads():
    model = DetGPT.from_pretrained("picto")
    expected = model.detect(KITCHEN, "I am thirsty")
    results: list[Detections] = []
    threads = [threading.Thread(target=lambda: results.append(model.detect(KITCHEN, "I am thirsty"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(r.labels == expected.labels and np.allclose(r.boxes, expected.boxes, atol=0.1) for r in results)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "nothing to look for"),
        ({"instruction": "a cup", "names": ["cup"]}, "one of the two"),
        ({"instruction": "   "}, "instruction"),
        ({"names": []}, "names"),
        ({"names": ["cup", ""]}, "names"),
        ({"names": "cup"}, "list"),
        ({"instruction": "a cup", "box_threshold": 1.5}, r"box_threshold.*\[0, 1\]"),
        ({"instruction": "a cup", "nms_threshold": -1}, "nms_threshold"),
        ({"instruction": "a cup", "prompting": "sideways"}, "'separate' or 'joint'"),
        ({"instruction": "a cup", "max_new_tokens": 0}, "max_new_tokens"),
        ({"instruction": "a cup", "threshold": 0.2}, "unknown option threshold.*box_threshold"),
    ],
)
def test_wrong_arguments_raise_and_say_what_to_do(detector, arguments, says):
    with pytest.raises(InputError, match=says):
        scripted(detector, 'Targets: ["cup"]').detect(KITCHEN, **arguments)


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ModelError, match=r"'tiny'.*picto.*base"):
        DetGPT.from_pretrained("tiny")


def test_a_folder_with_a_broken_description_says_so(tmp_path):
    (tmp_path / "detgpt.json").write_text('{"reasoner": "x"}')
    with pytest.raises(ModelError, match=r"detgpt\.json.*detector"):
        resolve(tmp_path)


def test_something_without_the_verb_is_no_part():
    with pytest.raises(InputError, match=r"detector.*no method .detect"):
        DetGPT(reasoner=object(), detector=object())


def test_every_named_pair_says_what_it_knows_and_needs():
    for name in PAIRS:
        pair = resolve(name)
        assert pair.knows, name
        assert pair.needs, name


def test_the_module_level_call_keeps_its_model():
    first = detgpt.detect(KITCHEN, names=["coffee"])
    assert first == detgpt.detect(KITCHEN, names=["coffee"], model="picto")
