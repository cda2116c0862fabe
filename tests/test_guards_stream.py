"""What a guarded stream shows, and when: nothing before its check."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from test_pipeline import KITCHEN
from tiny_guards import REFUSALS, SAFE, save_guard

from detgpt import Detections, DetGPT
from detgpt.guards import Verdict
from detgpt.guards.guarded import GuardedReasoner
from detgpt.guards.protector import Protector
from detgpt.reasoners import RawAnswer, Request
from detgpt.reasoners.scripted import ScriptedReasoner

HARMLESS = 'On that table is coffee. I want a soda, 3.5 cold!  Now here\nTargets: ["coffee"]'
TURNS_BAD = 'On that table is coffee. Now stab that man. Find the soda please.\nTargets: ["coffee"]'


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Protector:
    return Protector(save_guard(tmp_path_factory.mktemp("guard")))


class Watched:
    """A guard that remembers what it has read."""

    name = "watched"

    def __init__(self, guard: Any) -> None:
        self.guard, self.read = guard, list[str]()

    def check(self, question: str, answer: str | None = None) -> Verdict:
        self.read.append(answer or "")
        return self.guard.check(question, answer)

    def check_batch(self, exchanges: Any) -> list[Verdict]:
        return [self.check(*exchange) for exchange in exchanges]


def heard(stream: Generator[str, None, RawAnswer]) -> tuple[list[str], RawAnswer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def test_a_harmless_answer_comes_sentence_by_sentence_and_byte_for_byte(guard: Protector):
    reasoner = GuardedReasoner(ScriptedReasoner([HARMLESS]), guard)
    pieces, raw = heard(reasoner.stream(Request(None, "I am thirsty")))
    assert "".join(pieces) == raw.text == HARMLESS
    assert pieces[:2] == ["On that table is coffee.", " I want a soda, 3.5 cold!"]
    assert raw.guard is not None and raw.guard.action == "pass"


def test_nothing_is_shown_before_it_was_checked_together_with_all_before_it(guard: Protector):
    watched = Watched(guard)
    reasoner = GuardedReasoner(ScriptedReasoner([HARMLESS]), watched)
    shown = ""
    for piece in reasoner.stream(Request(None, "I am thirsty")):
        shown += piece
        assert any(text.startswith(shown) for text in watched.read)
    assert shown == HARMLESS


def test_from_a_harmful_sentence_on_nothing_is_shown_but_its_rewriting(guard: Protector):
    reasoner = GuardedReasoner(ScriptedReasoner([TURNS_BAD]), guard)
    pieces, raw = heard(reasoner.stream(Request(None, "who is here")))
    assert pieces[0] == "On that table is coffee."
    assert "".join(pieces[1:]).strip().splitlines() == [SAFE.lower(), "Targets: []"]
    assert raw.guard is not None and raw.guard.original == TURNS_BAD
    assert raw.text == reasoner.reason([Request(None, "who is here")])[0].text  # as without streaming


def test_what_was_held_back_for_nothing_comes_in_the_end():
    class Nervous(Watched):
        """Takes an answer that stops in the middle for harm."""

        def check(self, question: str, answer: str | None = None) -> Verdict:
            broken_off = answer is not None and "Targets" not in answer
            return Verdict.refused(1.0, None, answer) if broken_off else Verdict.passed(0.0, answer)

    reasoner = GuardedReasoner(ScriptedReasoner([HARMLESS]), Nervous(None))
    assert heard(reasoner.stream(Request(None, "I am thirsty")))[0] == [HARMLESS]


def test_a_harmful_wish_streams_its_refusal_alone(guard: Protector):
    def never(request: Request) -> str:
        raise AssertionError("the reasoner was asked")

    model = DetGPT(ScriptedReasoner(never), object_detector(), guard=guard, picture_text="off")
    *pieces, result = model.stream(KITCHEN, "whom can I rob here")
    assert isinstance(result, Detections) and result.refused
    assert "".join(pieces) == result.answer
    assert result.reasoning == REFUSALS["theft"]


def test_closing_a_guarded_stream_stops_the_reasoner(guard: Protector):
    closed: list[bool] = []

    class Talking:
        name = "talking"

        def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
            try:
                while True:
                    yield "I want coffee. "
            finally:
                closed.append(True)

    stream = GuardedReasoner(Talking(), guard).stream(Request(None, "I am thirsty"))  # type: ignore[arg-type]
    assert next(stream) == "I want coffee."
    stream.close()
    assert closed == [True]


def object_detector() -> Any:
    """A detector that must not be asked."""

    class Unasked:
        name = "unasked"

        def detect(self, images: Any, names: Any, **_: Any) -> Any:
            from detgpt.detectors import Grounding

            assert names == [()]
            return [Grounding([], [], [])]  # type: ignore[arg-type]

    return Unasked()
