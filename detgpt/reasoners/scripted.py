"""Answers from a script, without a model: for demos, dry runs and tests of everything around the reasoner."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Mapping, Sequence

from detgpt.answer import RETRY_INSTRUCTION
from detgpt.errors import InputError
from detgpt.reasoners import RawAnswer, Request


class ScriptedReasoner:
    """Gives prepared answer texts: in turn (and again from the start), by instruction, or from a function.

        ScriptedReasoner(['A cup stands on the table.\\nTargets: ["cup"]'])
        ScriptedReasoner({"I am thirsty": 'Targets: ["cup"]'})
        ScriptedReasoner(lambda request: 'Targets: ["cup"]')

    A script by instruction raises `InputError` for an instruction it does not hold; asked again only for the
    form (`RETRY_INSTRUCTION`), it repeats the answer to the instruction before. The token probabilities are
    unknown, so they are None.
    """

    name = "scripted"

    def __init__(self, answers: Sequence[str] | Mapping[str, str] | Callable[[Request], str]) -> None:
        if isinstance(answers, str) or (not callable(answers) and not answers):
            raise InputError(f"answers must be a non-empty list, a mapping or a function, not {answers!r}")
        self._answer: Callable[[Request], str]
        if callable(answers):
            self._answer = answers
        elif isinstance(answers, Mapping):
            script = dict(answers)
            self._answer = lambda request: _look_up(script, request)
        else:
            in_turn = itertools.cycle(tuple(answers))
            self._answer = lambda request: next(in_turn)

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        return [RawAnswer(self._answer(request)) for request in requests]

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        answer = RawAnswer(self._answer(request))
        yield from re.findall(r"\s*\S+\s*$|\s*\S+|\s+", answer.text)
        return answer


def _look_up(script: Mapping[str, str], request: Request) -> str:
    instruction = request.instruction
    if instruction == RETRY_INSTRUCTION and instruction not in script and request.history:
        instruction = request.history[-1].instruction
    if instruction not in script:
        raise InputError(f"the script has no answer to {instruction!r}; it knows {sorted(script)}")
    return script[instruction]
