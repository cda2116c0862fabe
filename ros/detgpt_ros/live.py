"""The bridge at work: the newest frame wins, reasoning never holds up detecting, and no failure ends it.

Three threads: one detects on the newest frame, one reasons when that is due, one reports once a second. They sleep on
the machine's own clock, so a simulated clock that stands still stops nothing. The adapter offers messages and
publishes what comes out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from detgpt.errors import ImageError, InputError
from detgpt.pipeline import DetGPT
from detgpt.results import Detections
from detgpt_ros.lookout import Frame, Lookout
from detgpt_ros.messages import Level, Status
from detgpt_ros.settings import Configuration

REPORT_EVERY = 1.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds after a failure; doubled each time


class Host(Protocol):
    """What the bridge needs of ROS. Called from the bridge's threads."""

    def now(self) -> float:
        """The time of ROS, simulated or not, in seconds."""
        ...

    def publish_detections(self, frame: Frame, result: Detections) -> None: ...

    def publish_reasoning(self, frame: Frame, result: Detections) -> None: ...

    def publish_status(self, status: Status) -> None: ...

    def log(self, level: Level, text: str) -> None: ...


class Newest:
    """Room for one thing: a newer one pushes it out."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque(maxlen=1)
        self._filled = threading.Condition()

    def put(self, item: Any) -> bool:
        """Whether an older one was pushed out."""
        with self._filled:
            pushed_out = bool(self._items)
            self._items.append(item)
            self._filled.notify()
            return pushed_out

    def put_back(self, item: Any) -> None:
        """Only where nothing newer has come."""
        with self._filled:
            if not self._items:
                self._items.append(item)
                self._filled.notify()

    def take(self, timeout: float) -> Any:
        """The newest, None where nothing came in time."""
        with self._filled:
            self._filled.wait_for(lambda: self._items, timeout)
            return self._items.popleft() if self._items else None


class Failures:
    """Of one kind of work: the last one since it went well, and how long to wait before the next try."""

    def __init__(self) -> None:
        self.message = ""
        self.total = 0
        self._pause = FIRST_PAUSE

    def add(self, error: Exception) -> float:
        """Seconds to wait."""
        self.message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.total += 1
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause

    def clear(self) -> None:
        self.message, self._pause = "", FIRST_PAUSE


class Bridge:
    """Frames in, detections out. `load` gives the model; `camera` is the topic's name, for people."""

    def __init__(
        self, host: Host, configuration: Configuration, load: Callable[[], DetGPT] | None = None, camera: str = "image"
    ) -> None:
        self._host, self._camera = host, camera
        self._load = load or configuration.load
        self._can_reason = configuration.reasons
        self.configuration = configuration
        self._lookout: Lookout | None = None
        self._frames, self._to_reason = Newest(), Newest()
        self._last: Frame | None = None
        self._paused = False
        self._stop = threading.Event()
        self._loading, self._images, self._detecting, self._reasoning = (Failures() for _ in range(4))
        self._received = self._dropped = self._answered = self._reasoned = 0
        self._cause = ""
        self._heard = time.monotonic()
        self._answers: deque[tuple[float, float, float | None]] = deque(maxlen=50)  # when, seconds of work, latency
        self._reported: tuple[Level, str] | None = None
        self._threads = [
            threading.Thread(target=work, name=f"detgpt-{work.__name__.strip('_')}", daemon=True)
            for work in (self._detect_all, self._reason_all, self._report_all)
        ]

    # ------------------------------------------------------------------------------ from the adapter's callbacks

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float = 5.0) -> None:
        """End the threads; one that is inside a model gets `patience` seconds."""
        self._stop.set()
        deadline = time.monotonic() + patience
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def offer(self, message: Any) -> None:
        """A message of the camera; cheap, since it is decoded only when its turn comes."""
        self._received += 1
        self._heard = time.monotonic()
        if self._frames.put(message):
            self._dropped += 1

    def configure(self, values: Mapping[str, Any]) -> None:
        """Change parameters while running. Raises `InputError` and changes nothing where one is wrong."""
        before, now = self.configuration, self.configuration.changed(values)
        if now.settings.wish.strip() and not self._can_reason:
            raise InputError("the bridge was started with names, so it has no reasoner: start it anew with a wish")
        self.configuration = now
        if self._lookout:
            self._lookout.configuration = now
        if before.settings.order != now.settings.order:
            self._host.log(Level.OK, f"looking for: {now.settings.wish.strip() or ', '.join(now.settings.fixed_names)}")
            self._look_again()

    def pause(self, paused: bool) -> None:
        self._paused = paused
        self._look_again()

    def reason_now(self) -> None:
        if self._lookout:
            self._lookout.ask()
            self._look_again()

    def _look_again(self) -> None:
        """A new order is answered on the last frame too, for a camera that shows one picture and no more."""
        if self._last is not None:
            self._frames.put_back(self._last)

    # ------------------------------------------------------------------------------------------------ the threads

    @contextmanager
    def _reporting(self, failures: Failures) -> Iterator[None]:
        """Whatever goes wrong inside is remembered and waited out: a robot's node does not die of one frame."""
        try:
            yield
            failures.clear()
        except Exception as error:
            if not self._stop.is_set():  # while ROS shuts down, publishing fails and nobody needs to know
                self._stop.wait(failures.add(error))

    def _detect_all(self) -> None:
        while self._lookout is None and not self._stop.is_set():
            with self._reporting(self._loading):
                self._lookout = Lookout(self._load(), self.configuration)
                self._lookout.configuration = self.configuration  # it may have changed meanwhile
        while not self._stop.is_set():
            item = self._frames.take(timeout=0.2)
            if item is None or self._paused:
                continue
            began = time.monotonic()
            frame = self._decoded(item)
            if frame is not None:
                with self._reporting(self._detecting):
                    self._detect(frame, began)
            if rate := self.configuration.settings.rate:
                self._stop.wait(began + 1 / rate - time.monotonic())

    def _decoded(self, item: Any) -> Frame | None:
        if isinstance(item, Frame):
            return item
        try:
            frame = Frame.of(item)
        except ImageError as error:
            self._images.add(error)
            return None
        self._images.clear()
        return frame

    def _detect(self, frame: Frame, began: float) -> None:
        assert self._lookout is not None
        self._last = frame
        if self._lookout.due(frame):
            self._to_reason.put(frame)
        result = self._lookout.detect(frame)
        if result is None:
            return
        self._host.publish_detections(frame, result)
        self._answered += 1
        now = time.monotonic()
        latency = self._host.now() - frame.time if frame.time else None  # some drivers leave the stamp empty
        self._answers.append((now, now - began, latency))

    def _reason_all(self) -> None:
        while not self._stop.is_set():
            frame = self._to_reason.take(timeout=0.2)
            if frame is None or self._paused:
                continue
            with self._reporting(self._reasoning):
                self._reason(frame)
            if self._reasoning.message:
                self._to_reason.put_back(frame)

    def _reason(self, frame: Frame) -> None:
        assert self._lookout is not None
        cause = self._lookout.due(frame)  # the reasoning before may have settled it
        if not cause:
            return
        self._cause = cause
        result = self._lookout.reason(frame)
        if result is not None:
            self._reasoned += 1
            self._host.publish_reasoning(frame, result)
            names = ", ".join(target.name for target in result.targets) or result.problem or "nothing fits"
            self._host.log(Level.OK, f"reasoned, since {cause}: {names}")
        self._look_again()

    def _report_all(self) -> None:
        failures = Failures()
        while not self._stop.wait(REPORT_EVERY):
            before = failures.message
            with self._reporting(failures):
                self.report()
            if failures.message and failures.message != before:  # nobody else would say so
                self._host.log(Level.ERROR, f"reporting fails: {failures.message}")

    # ------------------------------------------------------------------------------------------------ how it goes

    def report(self) -> None:
        """Publish the status; log it where it has changed."""
        status = self.status()
        if self._reported != (status.level, status.message):
            self._reported = (status.level, status.message)
            self._host.log(status.level, status.message)
        self._host.publish_status(status)

    def status(self) -> Status:
        level, message = self._state()
        now = time.monotonic()
        recent = [answer for answer in self._answers if now - answer[0] < 10]
        last = self._lookout.last if self._lookout else None
        settings = self.configuration.settings
        values = {
            "wish": settings.wish,
            "names": ", ".join(settings.fixed_names or [target.name for target in (last.targets if last else ())]),
            "frames received": str(self._received),
            "frames answered": str(self._answered),
            "frames dropped": str(self._dropped),
            "frames unreadable": str(self._images.total),
            "answers per second": f"{_rate([when for when, _, _ in recent]):.2f}",
            "seconds per answer": _worst([work for _, work, _ in recent]),
            "latency": _worst([latency for _, _, latency in recent if latency is not None]),
            "reasonings": str(self._reasoned),
            "last reasoned since": self._cause,
            "failures": str(self._loading.total + self._detecting.total + self._reasoning.total),
        }
        return Status(level, message, values)

    def _state(self) -> tuple[Level, str]:
        """The first thing that keeps it from answering."""
        settings = self.configuration.settings
        silence = time.monotonic() - self._heard
        if self._lookout is None:
            failed = self._loading.message
            return (Level.ERROR, f"the model does not load: {failed}") if failed else (Level.WARN, "loading the model")
        for doing, failures in (("detecting", self._detecting), ("reasoning", self._reasoning)):
            if failures.message:
                return Level.ERROR, f"{doing} fails: {failures.message}"
        if self._paused:
            return Level.OK, "paused"
        if not self._received:
            return Level.WARN, f"waiting for pictures on {self._camera}"
        if silence > settings.lost_after > 0:
            return Level.ERROR, f"camera lost: no picture on {self._camera} for more than {settings.lost_after:g} s"
        if self._images.message:
            return Level.ERROR, f"cannot read the pictures: {self._images.message}"
        if not any(settings.order):
            return Level.OK, "waiting for a wish"
        last = self._lookout.last
        if last is None and not settings.fixed_names:
            return Level.OK, "reasoning"
        if last is not None and last.problem:
            return Level.WARN, f"the answer could not be read: {last.problem}"
        return Level.OK, "running"


def _rate(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0


def _worst(values: list[float]) -> str:
    """Median and maximum, in seconds; empty where there are none."""
    if not values:
        return ""
    ordered = sorted(values)
    return f"median {ordered[len(ordered) // 2]:.3f} s, worst {ordered[-1]:.3f} s"
