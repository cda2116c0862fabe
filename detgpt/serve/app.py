"""The HTTP around a model: endpoints, limits, and errors that tell a client what to do and nothing about the server.

    uvicorn --factory my_module:build          # where build() returns create_app(model, Serving(…))

Every request takes its place in the queue before its body is read, and gives it back when it is answered, when its
time is over, or when its client hangs up. Left out: TLS, rates per client and access from elsewhere, which are the
reverse proxy's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, format_sse_event
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from detgpt import __version__
from detgpt.answer import ParsedAnswer
from detgpt.download import MAX_SECONDS, download, shown_url
from detgpt.errors import ImageError, InputError
from detgpt.images import MAX_BYTES, load_image
from detgpt.pipeline import DetGPT
from detgpt.results import Detections
from detgpt.serve import Serving, messages
from detgpt.serve.batching import Asked, Batcher, QueueFullError
from detgpt.serve.metrics import CLIENT_GONE, Counted, Metrics

MAX_BODY = MAX_BYTES * 4 // 3 + 2**16  # the largest image as base64, and room for the rest
DETECT, STREAM = "/v1/detect", "/v1/detect/stream"
COSTLY = ("max_new_tokens", "tiles", "masks")  # a client may ask for no more of these than the server starts with
BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")

log = logging.getLogger(__name__)
T = TypeVar("T")


def create_app(model: DetGPT, serving: Serving) -> FastAPI:
    """The service around a loaded model."""
    metrics = Metrics(queue_depth=lambda: batcher.waiting, in_flight=lambda: batcher.taken)
    batcher = Batcher(
        model,
        max_batch=serving.max_batch,
        max_wait=serving.max_wait,
        queue=serving.queue,
        on_batch=metrics.batch_size.observe,
    )
    reader = _Reader(model, serving)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    async def place() -> AsyncIterator[None]:
        with batcher.place():
            yield

    app = FastAPI(
        title="DetGPT",
        summary="Detect what you need by saying why you need it.",
        version=__version__,
        lifespan=lifespan,
        max_body_size=MAX_BODY,
    )
    app.add_middleware(Counted, metrics=metrics, endpoints=(DETECT, STREAM))
    if serving.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=serving.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization"],
            expose_headers=["Retry-After"],
        )
    _answer_errors_with_problems(app)
    guarded: dict[str, Any] = {
        "dependencies": [*([Depends(_checking(serving.api_keys))] if serving.api_keys else []), Depends(place)],
        "openapi_extra": {"requestBody": messages.request_body()},
    }
    errors = [400, *([401] if serving.api_keys else []), 413, 415, 422, 429, 500, 504]

    @app.post(DETECT, response_model=messages.Answer, responses=messages.problem_responses(*errors), **guarded)
    async def detect(request: Request) -> Response:
        """Find what an instruction needs in a picture; or, without any reasoning, the things called `names`."""
        with anyio.fail_after(serving.timeout):
            result = await _unless_gone(request, batcher.detect(await reader.read(request)))
        if result is None:
            return Response(status_code=CLIENT_GONE)
        metrics.answered(result)
        return Response(await run_sync(result.to_json), media_type="application/json")  # masks take their time

    @app.post(
        STREAM,
        response_class=Response,
        responses={
            200: {
                "description": "Events `reasoning` ({text}), then `detections` (as from /v1/detect) or `error`.",
                "content": {"text/event-stream": {"itemSchema": messages.EVENT}},
            },
            **messages.problem_responses(*errors),
        },
        **guarded,
    )
    async def stream(request: Request) -> Response:
        """The reasoning as it is written, then the detections, as server-sent events."""
        deadline = anyio.current_time() + serving.timeout
        with anyio.fail_after(serving.timeout):
            events = batcher.stream(await reader.read(request))
            first = await _unless_gone(request, anext(events))  # until then errors have a status of their own
        if first is None:
            return Response(status_code=CLIENT_GONE)
        return EventSourceResponse(_server_sent(request, first, events, deadline, metrics))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses=messages.problem_responses(503))
    async def ready() -> dict[str, str]:
        """A request that came now would find a place in the queue."""
        if not batcher.has_room:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the queue is full")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Reader:
    """From a request's body to a picture and a wish, off the event loop and only so many at a time."""

    def __init__(self, model: DetGPT, serving: Serving) -> None:
        self.options = model.options
        self.serving = serving
        self.decoding = anyio.CapacityLimiter(os.cpu_count() or 1)

    async def read(self, request: Request) -> Asked:
        wish = await messages.read(request)
        options = self.options.updated(wish.options())
        for name in COSTLY:
            asked, most = getattr(options, name), getattr(self.options, name)
            if asked > most:
                raise InputError(f"{name}={asked!r} is more than this server gives: {name} may be at most {most!r}")
        names = ParsedAnswer.of_names(wish.names).names if wish.names is not None else ()
        if wish.instruction is not None and not wish.instruction.strip():
            raise InputError("the instruction is empty: say in words what you want to find")
        data = wish.image if wish.image is not None else await self._fetched(wish.image_url or "")
        image = await run_sync(self._decoded, data, limiter=self.decoding)
        return Asked(image, wish.instruction or names, options)

    def _decoded(self, data: bytes) -> Image.Image:
        return load_image(data, max_pixels=self.serving.max_pixels)

    async def _fetched(self, url: str) -> bytes:
        if not self.serving.allow_urls:
            raise InputError("this server fetches no addresses: send the image itself")
        seconds = min(MAX_SECONDS, self.serving.timeout)
        try:
            return await run_sync(download, url, MAX_BYTES, seconds, False, abandon_on_cancel=True)
        except ImageError as error:
            log.warning("refused an address: %s", error)
            # One answer for all reasons: which of them it was would tell strangers about the network around us.
            raise ImageError(
                f"{shown_url(url)} cannot be fetched. It must be a public http: or https: address that gives "
                f"the image within {seconds:g} s and {MAX_BYTES} bytes; or send the image itself."
            ) from None


def _checking(api_keys: tuple[str, ...]) -> Any:
    """The dependency that lets through who has a key."""
    known = [key.encode() for key in api_keys]

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        key = given.credentials.encode() if given else b""
        if not any([secrets.compare_digest(key, one) for one in known]):  # a list: every key is compared
            detail = "send one of the server's API keys: Authorization: Bearer KEY"
            raise HTTPException(HTTPStatus.UNAUTHORIZED, detail, {"WWW-Authenticate": "Bearer"})

    return check


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, where the client hangs up first."""

    async def finish() -> T:
        return await work

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(finish()), asyncio.create_task(hang_up())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


# ---------------------------------------------------------------------------------------------------------- events


async def _server_sent(
    request: Request,
    first: str | Detections,
    events: AsyncGenerator[str | Detections, None],
    deadline: float,
    metrics: Metrics,
) -> AsyncIterator[bytes]:
    event = first
    try:
        while True:
            yield await run_sync(_event, event)
            if isinstance(event, Detections):
                metrics.answered(event)
                return
            with anyio.fail_after(max(0, deadline - anyio.current_time())):
                event = await anext(events)
    except Exception as error:  # too late for a status: it goes into the stream
        status, detail = _status_and_detail(error)
        request.state.outcome = status
        if status == HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("a stream failed", exc_info=error)
        yield format_sse_event(event="error", data_str=json.dumps(messages.problem(status, detail)))
    finally:
        await events.aclose()


def _event(event: str | Detections) -> bytes:
    if isinstance(event, Detections):
        return format_sse_event(event="detections", data_str=event.to_json())
    return format_sse_event(event="reasoning", data_str=json.dumps({"text": event}, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------------- errors


def _status_and_detail(error: Exception) -> tuple[int, str]:
    """What a client may know about an error."""
    if isinstance(error, InputError):
        return HTTPStatus.UNPROCESSABLE_ENTITY, str(error)
    if isinstance(error, QueueFullError):
        return HTTPStatus.TOO_MANY_REQUESTS, str(error)
    if isinstance(error, TimeoutError):
        return HTTPStatus.GATEWAY_TIMEOUT, "the time for this request is over: try again when there is less to do"
    return HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed to answer this; its log says why"


def _answer_errors_with_problems(app: FastAPI) -> None:
    def answer(status: int, detail: str, headers: Any = None, errors: Any = None) -> JSONResponse:
        content = messages.problem(status, detail, errors)
        return JSONResponse(content, status, headers, media_type="application/problem+json")

    async def own(_: Request, error: Exception) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFullError) else None
        return answer(*_status_and_detail(error), headers)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        return answer(error.status_code, str(error.detail), error.headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        rows = [{"field": ".".join(str(part) for part in row["loc"]), "message": row["msg"]} for row in error.errors()]
        told = "; ".join(": ".join(filter(None, row.values())) for row in rows)
        return answer(HTTPStatus.UNPROCESSABLE_ENTITY, told, errors=rows)

    for kind in (InputError, QueueFullError, TimeoutError, Exception):
        app.add_exception_handler(kind, own)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
