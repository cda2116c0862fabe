"""Dynamic batching: requests gather while the model is busy and go through it together.

One worker serves the oldest request, and with it every other that waits with the same options, up to `max_batch`.
A stream goes alone. Nothing is shared between requests but the model: each picture is read before it comes here,
and where a batch fails, its requests are tried one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import anyio
from PIL import Image

from detgpt.pipeline import DetGPT, Options
from detgpt.results import Detections


@dataclass(frozen=True)
class Asked:
    """One request, read and checked. wish: an instruction, or names to find without reasoning."""

    image: Image.Image
    wish: str | tuple[str, ...]
    options: Options


class QueueFullError(Exception):
    """There is no place for another request; `retry_after` seconds from now there should be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class _AbandonedError(Exception):
    """Nobody listens to this stream any more."""


@dataclass(eq=False)
class _Job:
    asked: Asked
    key: object  # jobs with equal keys may share a batch
    result: asyncio.Future[Detections]  # cancelled when nobody waits for it any more
    pieces: asyncio.Queue[str | None] | None = None  # of a stream: its text, then None
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Answers many requests at once with one model. Use as `async with`; its methods belong to one event loop.

    max_batch: how many requests go through the model together.
    max_wait: how long the oldest request waits for company, in seconds.
    queue: how many requests may wait, beside the batch at work.
    on_batch: told the size of every batch that was run.
    """

    def __init__(
        self,
        model: DetGPT,
        *,
        max_batch: int,
        max_wait: float,
        queue: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.model = model
        self.max_batch, self.max_wait, self.places = max_batch, max_wait, queue + max_batch
        self.taken = 0  # places, of requests that are being read, wait or run
        self._on_batch = on_batch
        self._waiting: list[_Job] = []  # oldest first
        self._arrival = asyncio.Event()
        self._batch_seconds = 1.0  # of late, for telling when to try again
        self._thread = ThreadPoolExecutor(1, "detgpt-model")  # always the same one, which torch likes best

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._worker = self._loop.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        return self.taken < self.places and not self._worker.done()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place from before a request's body is read until it is answered: so memory is bounded too."""
        if not self.has_room:
            batches = math.ceil(self.taken / self.max_batch)
            raise QueueFullError(max(1, math.ceil(batches * self._batch_seconds)))
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def detect(self, asked: Asked) -> Detections:
        """The answer, from a batch with others. Cancelling this takes the request out of the queue."""
        job = self._enqueue(_Job(asked, asked.options, self._loop.create_future()))
        try:
            return await job.result
        finally:
            self._withdraw(job)

    async def stream(self, asked: Asked) -> AsyncGenerator[str | Detections, None]:
        """The reasoner's text piece by piece, then the answer. Closing this stops the model."""
        if not isinstance(asked.wish, str):  # without reasoning there is nothing to stream
            yield await self.detect(asked)
            return
        # The queue is unbounded so that a client who reads slowly does not hold up the model; the longest
        # answer bounds what it can hold.
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        job = _Job(asked, object(), self._loop.create_future(), pieces)
        job.result.add_done_callback(lambda _: pieces.put_nowait(None))
        self._enqueue(job)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await job.result
        finally:
            self._withdraw(job)

    def _enqueue(self, job: _Job) -> _Job:
        self._waiting.append(job)
        self._arrival.set()
        return job

    def _withdraw(self, job: _Job) -> None:
        job.result.cancel()
        if job in self._waiting:
            self._waiting.remove(job)

    # ------------------------------------------------------------------------------------------------ the worker

    async def _work(self) -> None:
        while True:
            jobs = await self._next_batch()
            started = time.monotonic()
            outcomes = await self._loop.run_in_executor(self._thread, self._answer, jobs)
            self._batch_seconds += 0.3 * (time.monotonic() - started - self._batch_seconds)
            self._on_batch(len(jobs))
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.result.cancelled():
                    continue
                if isinstance(outcome, Exception):
                    job.result.set_exception(outcome)
                else:
                    job.result.set_result(outcome)

    async def _next_batch(self) -> list[_Job]:
        """The oldest job and those that go with it, taken out of the queue."""
        while True:
            while not self._waiting:
                await self._next_arrival()
            oldest = self._waiting[0]
            while len(jobs := self._like(oldest)) < self.max_batch and oldest.pieces is None:
                left = oldest.arrived + self.max_wait - time.monotonic()
                if left <= 0:
                    break
                with anyio.move_on_after(left):
                    await self._next_arrival()
            if jobs:  # they may all have been withdrawn meanwhile
                self._waiting = [job for job in self._waiting if job not in jobs]
                return jobs

    async def _next_arrival(self) -> None:
        self._arrival.clear()
        await self._arrival.wait()

    def _like(self, oldest: _Job) -> list[_Job]:
        return [job for job in self._waiting if job.key == oldest.key][: self.max_batch]

    # ----------------------------------------------------------------------------------------- in the model's thread

    def _answer(self, jobs: Sequence[_Job]) -> list[Detections | Exception]:
        """One outcome per job; a job that fails takes no other with it."""
        try:
            return list(self._run(jobs))
        except Exception as error:  # whatever it is: it belongs to the one who asked, and the worker goes on
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self._answer([job])]

    def _run(self, jobs: Sequence[_Job]) -> Sequence[Detections]:
        if jobs[0].pieces is not None:
            return [self._stream(jobs[0])]
        items = [(job.asked.image, job.asked.wish) for job in jobs]
        return self.model.detect_batch(items, **asdict(jobs[0].asked.options))

    def _stream(self, job: _Job) -> Detections:
        pieces, wish = job.pieces, job.asked.wish
        assert pieces is not None and isinstance(wish, str)
        events = self.model.stream(job.asked.image, wish, **asdict(job.asked.options))
        with contextlib.closing(events):  # type: ignore[type-var]  # a generator; closing it stops the model
            for event in events:
                if isinstance(event, Detections):
                    return event
                if job.result.cancelled():
                    raise _AbandonedError
                self._loop.call_soon_threadsafe(pieces.put_nowait, event)
        raise AssertionError("a stream ended without its Detections")
