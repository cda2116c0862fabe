"""A reasoner behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`."""

from __future__ import annotations

import base64
import codecs
import io
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detgpt.answer import format_instruction
from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.reasoners import RawAnswer, Request, TokenSpan


class OpenAIReasoner:
    """Asks the chat-completions endpoint of the server at `base_url` (its `/v1` address) for `model`.

    api_key: sent as the bearer token; local servers need none, and none is taken from the environment.
    timeout: seconds to wait for the server. concurrency: requests under way at once; the server batches them.
    image_format: "jpeg" or "png", how images travel. Token probabilities are asked for; a server that does
    not give them yields answers with `tokens=None`.

    Raises `MissingExtraError` without the openai package, `ModelError` when the server cannot be reached or
    refuses, `InputError` for a wrong argument.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = 60,
        *,
        concurrency: int = 8,
        max_retries: int = 2,
        image_format: str = "jpeg",
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "openai") from error
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"base_url must start with http:// or https://, not {base_url!r}")
        if image_format not in ("jpeg", "png"):
            raise InputError(f'image_format must be "jpeg" or "png", not {image_format!r}')
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, not {concurrency}")
        self.name = model
        self._base_url = base_url
        self._image_format = image_format
        self._concurrency = concurrency
        self._wants_logprobs = True
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=max_retries
        )

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        """One answer per request, in order; up to `concurrency` requests are under way at once."""
        _check_max_new_tokens(max_new_tokens)
        if not requests:
            return []
        with ThreadPoolExecutor(min(self._concurrency, len(requests))) as workers:
            return list(workers.map(lambda request: self._ask(request, max_new_tokens), requests))

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        """Generator of text pieces as they arrive; returns the `RawAnswer`. Closing it ends the request."""
        _check_max_new_tokens(max_new_tokens)
        return self._stream(request, max_new_tokens)

    def _ask(self, request: Request, max_new_tokens: int) -> RawAnswer:
        completion = self._create(request, max_new_tokens, stream=False)
        if not getattr(completion, "choices", None):
            raise self._unusable("its reply is no chat completion")
        choice = completion.choices[0]
        return _raw_answer(choice.message.content or "", _logprobs(choice), choice.finish_reason)

    def _stream(self, request: Request, max_new_tokens: int) -> Generator[str, None, RawAnswer]:
        text, tokens, finish_reason = "", [], None
        with self._create(request, max_new_tokens, stream=True) as chunks:
            try:
                for chunk in chunks:
                    for choice in chunk.choices[:1]:  # the chunk with the usage has none
                        tokens += _logprobs(choice)
                        finish_reason = choice.finish_reason or finish_reason
                        if choice.delta.content:
                            text += choice.delta.content
                            yield choice.delta.content
            except self._errors.OpenAIError as error:
                raise self._unusable(error) from error
        if finish_reason is None:
            raise self._unusable("the stream ended before the answer did")
        return _raw_answer(text, tokens, finish_reason)

    def _create(self, request: Request, max_new_tokens: int, stream: bool) -> Any:
        """The completion or its stream; without token probabilities where the server refuses them."""
        with_logprobs = self._wants_logprobs
        try:
            arguments: dict[str, Any] = {"logprobs": True} if with_logprobs else {}
            return self._client.chat.completions.create(
                model=self.name,
                messages=self._messages(request),
                max_tokens=max_new_tokens,
                temperature=0,
                stream=stream,
                **arguments,
            )
        except (self._errors.BadRequestError, self._errors.UnprocessableEntityError) as error:
            if not with_logprobs or "logprob" not in str(error).lower():
                raise self._unusable(error) from error
        except self._errors.OpenAIError as error:
            raise self._unusable(error) from error
        self._wants_logprobs = False
        return self._create(request, max_new_tokens, stream)

    def _messages(self, request: Request) -> list[Any]:
        instructions = [turn.instruction for turn in request.history] + [request.instruction]
        prompt = instructions[0] if request.verbatim else format_instruction(instructions[0])
        messages: list[Any] = [{"role": "user", "content": text} for text in instructions]
        messages[0]["content"] = [
            {"type": "image_url", "image_url": {"url": self._data_url(request)}},
            {"type": "text", "text": prompt},
        ]
        answers = [{"role": "assistant", "content": turn.answer} for turn in request.history]
        for position, answer in enumerate(answers):
            messages.insert(2 * position + 1, answer)
        return messages

    def _data_url(self, request: Request) -> str:
        buffer = io.BytesIO()
        request.image.save(buffer, self._image_format.upper(), quality=92)
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        return f"data:image/{self._image_format};base64,{encoded}"

    def _unusable(self, reason: object) -> ModelError:
        return ModelError(
            f"the server at {self._base_url} gave no answer from {self.name!r}: {reason}\n"
            "Check that it runs, the address (it often ends in /v1), the model's name and the key."
        )


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def _logprobs(choice: Any) -> list[Any]:
    return list(choice.logprobs.content or []) if getattr(choice, "logprobs", None) else []


def _raw_answer(text: str, tokens: list[Any], finish_reason: str | None) -> RawAnswer:
    return RawAnswer(text, _token_spans(text, tokens), complete=finish_reason != "length")


def _token_spans(text: str, tokens: list[Any]) -> tuple[TokenSpan, ...] | None:
    """Characters that each token wrote; None when the tokens do not spell the text (nothing is known)."""
    if not tokens:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    spans, written = [], ""
    for token in tokens:
        if len(written) >= len(text):
            break  # the end-of-turn token, which is not part of the text
        start = len(written)
        written += decoder.decode(bytes(token.bytes) if token.bytes is not None else token.token.encode())
        inside_letter = bool(decoder.getstate()[0])
        spans.append(TokenSpan(start, len(written) + inside_letter, min(token.logprob, 0.0)))
    return tuple(spans) if written == text else None
