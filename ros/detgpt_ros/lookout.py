"""When to reason and when to detect: reason on a new wish, a changed scene or old age; detect on every frame.

Knows neither ROS nor threads nor the wall clock: time is the time of the frames, so that a simulated clock and a
recorded bag are as good as a live camera.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from detgpt.pipeline import DetGPT
from detgpt.results import Detections, Target
from detgpt_ros.images import picture
from detgpt_ros.settings import Configuration

_GRID, _CELL = 8, 4  # a thumbnail is 8 x 8 cells of 4 x 4 pixels


@dataclass(frozen=True)
class Frame:
    """One picture of the camera. header: its message's, kept as it is. time: seconds, of its stamp."""

    image: Image.Image
    header: Any = None
    time: float = 0.0

    @classmethod
    def of(cls, message: Any) -> Frame:
        """From a `sensor_msgs` Image or CompressedImage. Raises `ImageError`."""
        return cls(picture(message), message.header, seconds(message.header.stamp))

    @cached_property
    def thumbnail(self) -> np.ndarray:
        """(32, 32, 3) float32 in [0, 1]."""
        side = _GRID * _CELL
        small = self.image.resize((side, side), Image.Resampling.BOX, reducing_gap=2.0)
        return np.asarray(small, np.float32) / 255


def seconds(stamp: Any) -> float:
    """A stamp of ROS 1 (secs, nsecs) or ROS 2 and bags (sec, nanosec) as seconds."""
    if hasattr(stamp, "secs"):
        return stamp.secs + stamp.nsecs * 1e-9
    return stamp.sec + stamp.nanosec * 1e-9


def scene_change(before: np.ndarray, after: np.ndarray) -> float:
    """How much two thumbnails differ where they differ most: mean absolute difference of a cell, in [0, 1].

    A colour cast over the whole picture (exposure, white balance) does not count; something new in one place does.
    """
    shift = np.median(after - before, axis=(0, 1))
    difference = np.abs(after - before - shift).mean(axis=2)
    cells = difference.reshape(_GRID, _CELL, _GRID, _CELL).mean(axis=(1, 3))
    return float(cells.max())


@dataclass(frozen=True)
class _Reasoned:
    """What was found out last: the order it answers, the frame it saw, and the answer."""

    order: tuple[str, tuple[str, ...]]
    frame: Frame
    result: Detections


class Lookout:
    """Knows what to look for. One thread may reason while another detects."""

    def __init__(self, model: DetGPT, configuration: Configuration) -> None:
        self.model = model
        self.configuration = configuration  # replaced as a whole when it changes
        self._reasoned: _Reasoned | None = None  # likewise
        self._asked = False

    def ask(self) -> None:
        """Reason anew at the next frame."""
        self._asked = True

    @property
    def last(self) -> Detections | None:
        """The last answer of the reasoner to what is asked for now."""
        reasoned = self._reasoned
        return reasoned.result if reasoned and reasoned.order == self.configuration.settings.order else None

    def due(self, frame: Frame) -> str:
        """Why it is time to reason about this frame; "" where it is not."""
        settings, reasoned = self.configuration.settings, self._reasoned
        if settings.fixed_names or not settings.wish.strip():
            return ""
        if reasoned is None or reasoned.order != settings.order:
            return "the wish is new"
        if self._asked:
            return "asked for"
        age = frame.time - reasoned.frame.time
        if age < 0:
            # A bag played anew or a simulation reset; a frame just overtaken by the reasoning is no such thing.
            return "the clock went back" if -age > max(settings.reason_interval, 1.0) else ""
        if age < settings.reason_interval:
            return ""
        if reasoned.result.problem:
            return "the last answer could not be read"
        if scene_change(reasoned.frame.thumbnail, frame.thumbnail) > settings.scene_threshold:
            return "the scene changed"
        return "the answer is old" if 0 < settings.max_age <= age else ""

    def reason(self, frame: Frame) -> Detections | None:
        """Ask the reasoner about this frame and remember its names; None where the wish changed meanwhile."""
        configuration = self.configuration
        self._asked = False
        result = self.model.detect(frame.image, configuration.settings.wish, **configuration.options)
        if configuration.settings.order != self.configuration.settings.order:
            return None
        self._reasoned = _Reasoned(configuration.settings.order, frame, replace(result, image=None))
        return result

    def detect(self, frame: Frame) -> Detections | None:
        """Find in this frame what was reasoned last; None where it is not known yet what to look for."""
        configuration = self.configuration
        settings = configuration.settings
        if settings.fixed_names:
            return self.model.detect(frame.image, names=settings.fixed_names, **configuration.options)
        last = self.last
        if last is None:
            return None
        if not last.targets:
            return replace(_nothing(frame.image), **_said(last))
        found = self.model.detect(frame.image, names=[target.name for target in last.targets], **configuration.options)
        targets = tuple(replace(sure, found=now.found) for sure, now in zip(last.targets, found.targets, strict=True))
        return replace(found, targets=targets, **_said(last))

    def process(self, frame: Frame) -> tuple[Detections | None, str]:
        """Both in turn, for recorded data: the frame's detections, and why the reasoner was asked ("": it was not)."""
        cause = self.due(frame)
        if cause:
            return self.reason(frame), cause
        return self.detect(frame), ""


def _said(result: Detections) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("reasoning", "answer", "problem", "instruction", "unsure")}


def _nothing(image: Image.Image) -> Detections:
    targets: tuple[Target, ...] = ()
    return Detections(boxes=np.empty((0, 4)), scores=np.empty(0), labels=(), targets=targets, image=image)
