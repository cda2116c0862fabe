"""Boxes in every frame of a short clip. The wish is reasoned about once, and again when the scene changes.

save(watch(model, "walk.mp4", "something to eat"), "out.mp4")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from detgpt.download import quoted
from detgpt.draw import draw
from detgpt.errors import InputError
from detgpt.pipeline import DetGPT
from detgpt.results import Detections

MAX_SECONDS = 30.0
MAX_SIDE = 1280  # pixels; larger frames are made smaller
FRAMES_PER_SECOND = 10
GLANCE = (32, 32)  # pixels in which two frames are compared; their mean difference of 1 makes a new scene:
CUT = 0.1  # from one frame to the next
DRIFT = 0.2  # from the frame that was reasoned about


@dataclass(frozen=True)
class Sight:
    """What was found in one frame.

    seconds: the frame's time. result: with the frame as its image. reasoned: whether the wish was thought about
    anew here; otherwise the targets are those of the last frame where it was.
    """

    seconds: float
    result: Detections
    reasoned: bool


def watch(
    model: DetGPT, clip: str | Path, wish: str, *, frames_per_second: float = FRAMES_PER_SECOND, **options: Any
) -> Iterator[Sight]:
    """Detect in so many frames of each second; `options` as in `DetGPT.detect`.

    Raises `InputError` for a clip that cannot be read or is longer than `MAX_SECONDS`.
    """
    thought: Detections | None = None
    scene: np.ndarray = np.zeros(())
    last = scene
    for seconds, frame in frames(clip, frames_per_second):
        glance = np.asarray(frame.resize(GLANCE, Image.Resampling.BOX), dtype=np.float32) / 255
        if thought is None or _differ(glance, last, CUT) or _differ(glance, scene, DRIFT):
            scene, thought = glance, model.detect(frame, wish, **options)
            yield Sight(seconds, thought, reasoned=True)
        else:
            yield Sight(seconds, _again(model, thought, frame, options), reasoned=False)
        last = glance


def _differ(glance: np.ndarray, other: np.ndarray, limit: float) -> bool:
    return bool(np.abs(glance - other).mean() > limit)


def _again(model: DetGPT, thought: Detections, frame: Image.Image, options: dict[str, Any]) -> Detections:
    """The same targets in another frame."""
    names = [target.name for target in thought.targets]
    if not names:
        return replace(thought, image=frame)
    found = model.detect(frame, names=names, **options)
    pairs = zip(thought.targets, found.targets, strict=True)
    targets = tuple(replace(before, found=now.found) for before, now in pairs)
    return replace(thought, boxes=found.boxes, scores=found.scores, labels=found.labels, targets=targets, image=frame)


def count_frames(clip: str | Path, frames_per_second: float) -> int | None:
    """About how many frames `watch` will look at; None where the clip does not say how long it is."""
    with _opened(clip) as container:
        seconds = None if container.duration is None else container.duration / av.time_base
    return None if seconds is None else max(1, round(seconds * frames_per_second))


def frames(clip: str | Path, frames_per_second: float) -> Iterator[tuple[float, Image.Image]]:
    """(seconds, frame) of a clip: upright, evenly spaced, no larger than `MAX_SIDE`."""
    if frames_per_second <= 0:
        raise InputError(f"frames_per_second={frames_per_second!r} must be more than 0")
    with _opened(clip) as container:
        due = 0.0
        for number, frame in enumerate(container.decode(video=0)):
            if number == 0:
                start = frame.time or 0.0
            seconds = (frame.time or 0.0) - start
            if seconds > MAX_SECONDS:
                raise _too_long(clip)
            if seconds < due - 1e-3:
                continue
            due += 1 / frames_per_second
            picture = frame.to_image().rotate(frame.rotation, expand=True)
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
            yield seconds, picture


@contextmanager
def _opened(clip: str | Path) -> Iterator[Any]:
    try:
        with av.open(str(clip)) as container:
            if not container.streams.video:
                raise InputError(f"{quoted(clip)} has no picture in it. Give a video.")
            if container.duration is not None and container.duration / av.time_base > MAX_SECONDS + 0.5:
                raise _too_long(clip)
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{quoted(clip)} is no video that can be read, or is damaged. Give an MP4.") from error


def _too_long(clip: str | Path) -> InputError:
    return InputError(f"{quoted(clip)} is longer than {MAX_SECONDS:.0f} seconds. Cut it shorter.")


def saved(sights: Iterable[Sight], path: str | Path, frames_per_second: float = FRAMES_PER_SECOND) -> Iterator[Sight]:
    """Pass the sights on, each after it is written with its boxes to an MP4 that browsers and players open (H.264).

    A target keeps its colour through the whole clip. Where the sights break off, no file stays behind.
    """
    try:
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream: Any = None
            names: dict[str, None] = {}
            for sight in sights:
                result = sight.result
                assert result.image is not None
                stream = stream or _stream(container, result.image.size, frames_per_second)
                names.update(dict.fromkeys(target.name for target in result.targets))
                drawn = draw(result.image, result.boxes, result.labels, result.scores, names=list(names), min_side=0)
                drawn = drawn.crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_image(drawn)))
                yield sight
            if stream is None:
                raise InputError("the clip has no frame that can be read. Give an MP4.")
            container.mux(stream.encode())
    except BaseException:  # also where the one who reads the sights stops: half a clip is of no use
        Path(path).unlink(missing_ok=True)
        raise


def _stream(container: Any, image_wh: tuple[int, int], frames_per_second: float) -> Any:
    rate = Fraction(frames_per_second).limit_denominator(1000)
    stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
    stream.width, stream.height = (max(2, side // 2 * 2) for side in image_wh)  # the codec wants even numbers
    stream.pix_fmt = "yuv420p"
    return stream
