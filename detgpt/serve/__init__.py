"""The HTTP service: `detgpt serve`.

    detgpt serve --model picto --port 8000
    curl -F image=@kitchen.png -F instruction="I am thirsty" http://127.0.0.1:8000/v1/detect

`batching.py` gathers requests into batches, `messages.py` says what goes in and out, `app.py` is the HTTP around
them, `metrics.py` what is counted; `ray.py` runs it all on several machines. Importing this file is cheap; the web
framework loads when a service starts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from detgpt.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from detgpt.pipeline import DetGPT

__all__ = ["Serving", "create_app", "run"]

log = logging.getLogger("uvicorn.error")  # which prints, once uvicorn is configured


@dataclass(frozen=True)
class Serving:
    """How the service runs.

    host: address to listen on; 0.0.0.0 for every network of this machine.
    port: port to listen on; 0 for any free one.
    max_batch: how many requests go through the models together.
    max_wait: how long a request waits for others to join it, in seconds.
    queue: how many requests may wait; one more is answered with 429.
    timeout: how long a request may take from its first byte, in seconds; after that it is answered with 504.
    max_pixels: largest width x height of a picture; a request in the queue holds three bytes for each.
    allow_urls: fetch pictures from public web addresses that clients name.
    api_keys: clients must send one of these; none: everyone may ask.
    cors_origins: web pages of these origins may read the answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    max_wait: float = 0.01
    queue: int = 64
    timeout: float = 60.0
    max_pixels: int = 32_000_000
    allow_urls: bool = field(default=False, metadata={"flags": ("--allow-urls",)})
    api_keys: tuple[str, ...] = field(default=(), metadata={"flags": ("--api-key",), "envvar": "DETGPT_API_KEYS"})
    cors_origins: tuple[str, ...] = field(default=(), metadata={"flags": ("--cors-origin",)})

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} leaves no room for a request: give 1 or more")
        if not 0 <= self.max_wait < self.timeout:
            raise InputError(f"max_wait={self.max_wait!r} must lie between 0 and the timeout of {self.timeout!r} s")
        if not all(re.fullmatch(r"[!-~]+", key) for key in self.api_keys):  # what an HTTP header carries as it is
            raise InputError("an API key is empty, or holds a space or a letter outside ASCII: choose another")


def create_app(model: DetGPT, serving: Serving | None = None) -> FastAPI:
    """The service around a loaded model, for any ASGI server. Raises `MissingExtraError` without its extra."""
    try:
        from detgpt.serve import app
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error
    return app.create_app(model, serving or Serving())


def run(load: Callable[[], DetGPT], serving: Serving) -> None:
    """Take the port, load the model, and serve until SIGTERM or Ctrl-C, which let running requests finish."""
    try:
        import uvicorn

        from detgpt.serve import app
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error
    config = uvicorn.Config(
        "",  # the application follows as soon as the model is there
        host=serving.host,
        port=serving.port,
        timeout_graceful_shutdown=int(serving.timeout) + 5,  # every request has ended by then
        server_header=False,
    )
    socket = config.bind_socket()  # a port that is taken is told before gigabytes are loaded
    warn_of_strangers(serving)
    try:
        config.app = app.create_app(load(), serving)
        _leave_a_core()
        uvicorn.Server(config).run([socket])
    finally:
        socket.close()


def _leave_a_core() -> None:
    """Keep one core for HTTP and for decoding pictures: torch's threads wait for the slowest of them at every step."""
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))


def warn_of_strangers(serving: Serving) -> None:
    if serving.host not in ("127.0.0.1", "::1", "localhost") and not serving.api_keys:
        log.warning("whoever reaches %s may use this service: give it an API key", serving.host)
