"""A reasoner behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`.

    OpenAIReasoner("Qwen/Qwen3-VL-4B-Instruct", base_url="http://localhost:8000/v1")

Every answer is streamed, so that it ends as soon as its answer line is complete, whatever the model would still say.
"""

from __future__ import annotations

import base64
import codecs
import io
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from detgpt.answer import answer_is_complete, format_instruction
from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.reasoners import RawAnswer, Request, TokenSpan, check_prompt
from detgpt.servers import address, credentials

# What a server may refuse to be told, and the word in its refusal that says so.
_REFUSABLE = {"logprobs": "logprob", "temperature": "temperature", "max_tokens": "max_completion_tokens"}
_QUALITIES = (92, 80, 65, 50)  # of the JPEG, until it is small enough


class OpenAIReasoner:
    """Asks the server at `base_url` (its `/v1` address) for chat completions of `model`.

    base_url: the environment's OPENAI_BASE_URL unless given; there is no other default, for pictures go there.
    api_key: the bearer token; local servers need none. Unless given, OPENAI_API_KEY is sent, but only to the server
        that the environment means it for: OPENAI_BASE_URL, or api.openai.com where that is not set. The same holds
        for what the openai package reads besides (organization, project, headers).
    prompt: "full", or None, tells the model the three steps and the answer's form; "bare" sends the instruction as it
        is, for a model trained so (`detgpt_prompt` in its config), such as the built-in one.
    timeout: seconds within which an answer must be complete, retries included.
    max_retries: how often to ask again after a lost connection, a broken-off answer, or a status of 408, 409, 429 or
        5xx. A stream that has begun to speak is not repeated.
    concurrency: requests under way at once; the server batches them.
    max_image_side, max_image_bytes: pictures travel as JPEG, scaled down to this longer side in pixels; then quality
        and, where that is not enough, size go down until the file has at most so many bytes.

    Token probabilities are asked for; a server that does not give them yields answers with `tokens=None`.

    Raises `MissingExtraError` without the openai package, `ModelError` when the server cannot be reached, refuses,
    writes no chat completion or takes too long, `InputError` for a wrong argument.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        prompt: str | None = None,
        timeout: float = 60,
        max_retries: int = 2,
        concurrency: int = 8,
        max_image_side: int = 1536,
        max_image_bytes: int = 1_000_000,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "openai") from error
        check_prompt(prompt)
        _check_at_least(0.001, timeout=timeout)
        _check_at_least(0, max_retries=max_retries)
        _check_at_least(1, concurrency=concurrency)
        _check_at_least(16, max_image_side=max_image_side)
        _check_at_least(4096, max_image_bytes=max_image_bytes)
        self.name = model
        self._base_url = address(base_url)
        self._prompt = prompt or "full"
        self._timeout = timeout
        self._max_retries = max_retries
        self._concurrency = concurrency
        self._max_image = max_image_side, max_image_bytes
        self._refused: frozenset[str] = frozenset()
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=self._base_url, timeout=timeout, max_retries=0, **credentials(self._base_url, api_key)
        )

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        """One answer per request, in order; up to `concurrency` requests are under way at once."""
        _check_at_least(1, max_new_tokens=max_new_tokens)
        if not requests:
            return []
        with ThreadPoolExecutor(min(self._concurrency, len(requests))) as workers:
            return list(workers.map(lambda request: self._answer(request, max_new_tokens), requests))

    def stream(self, request: Request, *, max_new_tokens: int = 512) -> Generator[str, None, RawAnswer]:
        """Generator of text pieces as they arrive; returns the `RawAnswer`. Closing it ends the request."""
        _check_at_least(1, max_new_tokens=max_new_tokens)
        return self._stream(request, max_new_tokens, speaks=True)

    def input_size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) in pixels at which a served Qwen2.5-VL, with its published settings, reads `image`."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        with Image.open(io.BytesIO(_jpeg(image, *self._max_image))) as sent:
            height, width = smart_resize(sent.height, sent.width, factor=28, min_pixels=3136, max_pixels=12_845_056)
        return width, height

    def _answer(self, request: Request, max_new_tokens: int) -> RawAnswer:
        stream = self._stream(request, max_new_tokens, speaks=False)
        while True:
            try:
                next(stream)
            except StopIteration as stop:
                return stop.value

    def _stream(self, request: Request, max_new_tokens: int, speaks: bool) -> Generator[str, None, RawAnswer]:
        """Pieces from a thread that asks. Whatever the network does to it, nobody waits beyond the time-out."""
        deadline = time.monotonic() + self._timeout
        events: queue.SimpleQueue[str | RawAnswer | Exception] = queue.SimpleQueue()
        given_up = threading.Event()

        def work() -> None:
            try:
                events.put(self._ask(request, max_new_tokens, events.put, given_up, speaks))
            except Exception as error:
                events.put(error)

        threading.Thread(target=work, name="detgpt-server", daemon=True).start()
        try:
            while True:
                event = events.get(timeout=max(deadline - time.monotonic(), 0))
                if isinstance(event, RawAnswer):
                    return event
                if isinstance(event, Exception):
                    raise event
                yield event
        except queue.Empty:
            raise self._unusable(f"its answer was not complete within {self._timeout:g} s") from None
        finally:
            given_up.set()

    def _ask(
        self,
        request: Request,
        max_new_tokens: int,
        on_text: Callable[[str], None],
        given_up: threading.Event,
        speaks: bool,
    ) -> RawAnswer:
        """Ask, and ask again while the trouble is one that passes and, where it `speaks`, nothing was said."""
        messages = self._messages(request)
        for tried in range(self._max_retries + 1):
            answer = _GrowingAnswer(on_text)
            try:
                return self._read(answer, messages, max_new_tokens, given_up)
            except ModelError as error:
                pause = self._pause(error.__cause__, tried)
                if pause is None or tried == self._max_retries or (speaks and answer.text):
                    raise
            if given_up.wait(pause):
                break
        return answer.finished()  # nobody reads it any more

    def _read(
        self, answer: _GrowingAnswer, messages: list[Any], max_new_tokens: int, given_up: threading.Event
    ) -> RawAnswer:
        """One stream from its start to its end, or to the end of the answer line."""
        try:
            with self._open(messages, max_new_tokens) as chunks:
                kind = chunks.response.headers.get("content-type", "no content type")
                for chunk in chunks:
                    answer.add(chunk)
                    if answer.has_ended or given_up.is_set():
                        return answer.finished()
        except self._openai.OpenAIError as error:
            raise self._unusable(error) from error
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise self._unusable(f"its reply is no chat completion ({error})") from error
        if "event-stream" not in kind:
            raise self._unusable(f"its reply is no stream of events but {kind}")
        raise self._unusable("the stream ended before the answer did") from EOFError()

    def _open(self, messages: list[Any], max_new_tokens: int) -> Any:
        """The stream of a completion, asked for without what this server refuses to be told."""
        refused = self._refused
        arguments: dict[str, Any] = {"logprobs": True, "temperature": 0, "max_tokens": max_new_tokens}
        arguments = {name: value for name, value in arguments.items() if name not in refused}
        if "max_tokens" in refused:
            arguments["max_completion_tokens"] = max_new_tokens
        try:
            return self._client.chat.completions.create(
                model=self.name, messages=messages, stream=True, timeout=self._timeout, **arguments
            )
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            said = error.response.text.lower()
            more = {name for name, word in _REFUSABLE.items() if name in arguments and word in said}
            if not more:
                raise
        self._refused = refused | more
        return self._open(messages, max_new_tokens)

    def _pause(self, error: BaseException | None, tried: int) -> float | None:
        """Seconds to wait before asking again; None where that would not help."""
        if isinstance(error, self._openai.APIStatusError):
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                return None
            wish = error.response.headers.get("retry-after", "")
            return float(wish) if wish.isdecimal() else 0.5 * 2**tried
        return 0.5 * 2**tried if isinstance(error, (self._openai.APIConnectionError, EOFError)) else None

    def _messages(self, request: Request) -> list[Any]:
        """The conversation; the picture, if there is one, stands in its first message."""
        first, *later = [turn.instruction for turn in request.history] + [request.instruction]
        bare = self._prompt == "bare" or request.verbatim
        content: list[Any] = [{"type": "text", "text": first if bare else format_instruction(first)}]
        if request.image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": self._data_url(request.image)}})
        messages: list[Any] = [{"role": "user", "content": content}]
        for turn, instruction in zip(request.history, later, strict=True):
            messages.append({"role": "assistant", "content": turn.answer})
            messages.append({"role": "user", "content": instruction})
        return messages

    def _data_url(self, image: Image.Image) -> str:
        return "data:image/jpeg;base64," + base64.b64encode(_jpeg(image, *self._max_image)).decode("ascii")

    def _unusable(self, reason: object) -> ModelError:
        if isinstance(reason, self._openai.APIStatusError):
            reason = f"status {reason.status_code}, {reason.response.text[:300]}"
        elif isinstance(reason, self._openai.APIConnectionError):
            reason = f"{reason} {reason.__cause__ or ''}"
        elif isinstance(reason, self._openai.APIError):
            reason = f"{reason} {reason.body or ''}"
        return ModelError(
            f"the server at {self._base_url} gave no answer from {self.name!r}: {reason}\n"
            "Check that it runs, the address (it often ends in /v1), the model's name and the key."
        )


class _GrowingAnswer:
    """What a stream has said so far; it has ended when the server says so or the answer line is complete."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self.has_ended = False
        self._was_cut = False
        self._tokens: list[Any] = []
        self._on_text = on_text

    def add(self, chunk: Any) -> None:
        for choice in (chunk.choices or [])[:1]:  # the chunk with the usage has none
            self._tokens += (choice.logprobs.content or []) if getattr(choice, "logprobs", None) else []
            self.has_ended = choice.finish_reason is not None
            self._was_cut = choice.finish_reason == "length"
            if piece := choice.delta.content:
                self.text += piece
                self._on_text(piece)
                self.has_ended |= "]" in piece and answer_is_complete(self.text)

    def finished(self) -> RawAnswer:
        return RawAnswer(self.text, _token_spans(self.text, self._tokens), complete=not self._was_cut)


def _check_at_least(least: float, **argument: float) -> None:
    for name, value in argument.items():
        if not value >= least:
            raise InputError(f"{name} must be at least {least}, not {value!r}")


def _jpeg(image: Image.Image, max_side: int, max_bytes: int) -> bytes:
    """`image` as a JPEG file within both limits."""
    picture = image.copy()
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, subsampling=0)  # colours as sharp as shapes
            if buffer.tell() <= max_bytes:
                return buffer.getvalue()
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))


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
