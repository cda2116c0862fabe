"""A guard model on any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama): Llama Guard and its like.

    ServedGuard("meta-llama/Llama-Guard-4-12B", "http://localhost:8000/v1").check("Whom could I rob here?")

The server's chat template turns the exchange into the model's own prompt. These forms of a reply are read: "safe", or
"unsafe" and the codes of the categories on the next line (Llama Guard); "Safety: Unsafe" and "Categories: Violent"
(Qwen3Guard); "Yes" or "No" to whether there is harm (Granite Guardian, ShieldGemma). Any other reply is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.guards import Exchange, Verdict
from detgpt.guards.normalise import normalised
from detgpt.servers import address, credentials

_HARM = re.compile(r"\W*(?:safety\W+)?(?P<word>unsafe|safe|controversial|yes|no)\b", re.IGNORECASE)
_HARMFUL = ("unsafe", "controversial", "yes")
_NAMED = re.compile(r"categories\W+(?P<names>[^\n]+)", re.IGNORECASE)
_CODES = re.compile(r"\bS\d{1,2}\b")
MAX_REPLY = 40  # tokens
CONCURRENCY = 8

# Llama Guard's codes: the MLCommons taxonomy of hazards, and S14.
HAZARDS = {
    "S1": "violent crimes",
    "S2": "non-violent crimes",
    "S3": "sex-related crimes",
    "S4": "child sexual exploitation",
    "S5": "defamation",
    "S6": "specialized advice",
    "S7": "privacy",
    "S8": "intellectual property",
    "S9": "indiscriminate weapons",
    "S10": "hate",
    "S11": "suicide and self-harm",
    "S12": "sexual content",
    "S13": "elections",
    "S14": "code interpreter abuse",
}


class ServedGuard:
    """The guard model that a server runs; safe to call from several threads. Harmful answers are refused.

    model: its name there; None: the only one that the server has.
    base_url: the server's `/v1` address; OPENAI_BASE_URL of the environment unless given.
    api_key: as in `detgpt.reasoners.openai.OpenAIReasoner`.
    timeout: seconds for one reply. max_retries: tries after a failure that may pass.
    refusals: what to say, by category.

    Raises `MissingExtraError` without the openai package, `ModelError` when the server does not answer or its reply is
    no verdict, `InputError` for a wrong argument.
    """

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30,
        max_retries: int = 2,
        refusals: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "openai") from error
        if not timeout > 0 or max_retries < 0:
            raise InputError(f"timeout={timeout!r} must be positive and max_retries={max_retries!r} 0 or more")
        self._openai = openai
        self._base_url = address(base_url)
        self._client = openai.OpenAI(
            base_url=self._base_url,
            timeout=timeout,
            max_retries=max_retries,
            **credentials(self._base_url, api_key),
        )
        self._refusals = refusals
        self._no_logprobs = False
        self.name = self._only_model() if model is None else model

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """The verdict on an answer to a question; without an answer, on the question alone.

        Its score is the probability that the model gave to its word for harm; 1 or 0 where the server tells none.
        """
        ways = dict.fromkeys([(question, answer), (normalised(question), answer and normalised(answer))])
        score, category = max((self._judged(*way) for way in ways), key=lambda judged: judged[0])
        return Verdict.passed(score, answer) if score < 0.5 else self._refused(score, category, answer)

    def check_batch(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """`check` for each of several exchanges, in order; several are under way at once."""
        if not exchanges:
            return []
        with ThreadPoolExecutor(min(CONCURRENCY, len(exchanges))) as workers:
            return list(workers.map(lambda exchange: self.check(*exchange), exchanges))

    def _refused(self, score: float, category: str | None, answer: str | None) -> Verdict:
        return Verdict.refused(score, category, answer, self._refusals)

    def _judged(self, question: str, answer: str | None) -> tuple[float, str | None]:
        """The chance of harm, and its category."""
        messages: list[Any] = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        choice = self._reply(messages)
        text = choice.message.content or ""
        said = _HARM.match(text)
        if said is None:
            raise self._unusable(f"its reply is no verdict: {text[:80]!r}")
        word = said["word"].lower()
        harmful = word in _HARMFUL
        sure = _probability(choice, said.start("word"))
        if sure is None:
            return float(harmful), _category(text)
        return (max(sure, 0.5) if harmful else min(1 - sure, 0.49)), _category(text)

    def _reply(self, messages: list[Any]) -> Any:
        known: dict[str, Any] = {} if self._no_logprobs else {"logprobs": True}
        try:
            reply = self._client.chat.completions.create(
                model=self.name, messages=messages, temperature=0, max_tokens=MAX_REPLY, **known
            )
            return reply.choices[0]
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            if self._no_logprobs or "logprob" not in error.response.text.lower():
                raise self._unusable(error) from error
        except self._openai.OpenAIError as error:
            raise self._unusable(error) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise self._unusable(f"its reply is no chat completion ({error})") from error
        self._no_logprobs = True
        return self._reply(messages)

    def _only_model(self) -> str:
        try:
            names = [str(model.id) for model in self._client.models.list()]
        except (self._openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
            raise self._unusable(error) from error
        if len(names) != 1:
            raise InputError(
                f"the server at {self._base_url} has {len(names)} models ({', '.join(names)}): name the guard, "
                f"as in {self._base_url}#MODEL"
            )
        return names[0]

    def _unusable(self, reason: object) -> ModelError:
        return ModelError(
            f"the server at {self._base_url} gave no verdict: {reason}\n"
            "Check that it runs, that its model is a guard, the address (it often ends in /v1) and the key."
        )


def _probability(choice: Any, place: int) -> float | None:
    """The probability of the token that wrote the character `place` of the reply."""
    end = 0
    for token in (choice.logprobs and choice.logprobs.content) or ():
        end += len(token.token)
        if end > place:
            return math.exp(min(token.logprob, 0.0))
    return None


def _category(text: str) -> str | None:
    if codes := _CODES.findall(text):
        return HAZARDS.get(codes[0], codes[0])
    named = _NAMED.search(text)
    return named["names"].strip().lower() if named and named["names"].strip().lower() != "none" else None
