"""The bridge without a robot: read the pictures of a recorded bag, write the detections to a new one.

    python ros/detgpt_bridge.py bag drive.mcap answers --wish "I am thirsty"

Reads ROS 1 (.bag) and ROS 2 (a folder, .mcap or .db3) and writes the same kind, with the times of the recording. Every
picture is answered, so the result does not depend on the machine's speed. Needs `rosbags`, but no ROS.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detgpt import terminal
from detgpt.errors import DetGPTError, ImageError, InputError, MissingExtraError
from detgpt_ros import definitions
from detgpt_ros.lookout import Frame, Lookout
from detgpt_ros.messages import Messages
from detgpt_ros.settings import PARAMETERS, TRANSPORTS, Configuration

try:
    from rosbags.highlevel import AnyReader, AnyReaderError
    from rosbags.interfaces import Nodetype, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
    from rosbags.rosbag1 import Writer as Writer1
    from rosbags.rosbag2 import StoragePlugin
    from rosbags.rosbag2 import Writer as Writer2
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore
    from rosbags.typesys.store import Typestore
except ImportError as error:
    raise MissingExtraError("rosbags", "ros") from error

PICTURES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
DISTRIBUTIONS = ("humble", "iron", "jazzy", "kilted")
NAMESPACE = "/detgpt"  # as the live node's topics
PLAIN = {
    "detections": "vision_msgs/Detection2DArray",
    "image_annotated": "sensor_msgs/Image",
    "reasoning": "std_msgs/String",
}
ROS1_ONLY = {"vision_info": "vision_msgs/VisionInfo", "labels": "std_msgs/String"}


@dataclass
class Summary:
    """What became of the pictures."""

    pictures: int = 0
    answered: int = 0
    skipped: int = 0
    unreadable: int = 0
    boxes: int = 0
    reasonings: int = 0
    first_problem: str = ""


# ------------------------------------------------------------------------------------------------- message types


def typestore(distribution: str) -> Typestore:
    """The message types of a distribution ("noetic", "humble", "jazzy", …), `vision_msgs` included."""
    ros1 = distribution == "noetic"
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores(f"ros2_{distribution}"))
    for name, text in (definitions.ROS1 if ros1 else definitions.ROS2).items():
        store.register(get_types_from_msg(text, name.replace("/", "/msg/")))
    return store


def maker(store: Typestore) -> Callable[..., Any]:
    """`make` for `Messages`: the class of that name, with zeros for the fields that were not given."""

    def make(name: str, /, **fields: Any) -> Any:
        full = name.replace("/", "/msg/")
        defined = store.fielddefs[full][1]
        given = {
            field: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
            for field, value in fields.items()
        }
        return store.types[full](**{field: given[field] if field in given else zero(kind) for field, kind in defined})

    def zero(kind: Any) -> Any:
        node, detail = kind
        if node is Nodetype.NAME:
            return make(detail.replace("/msg/", "/"))
        if node is Nodetype.BASE:
            return {"string": "", "bool": False, "float32": 0.0, "float64": 0.0}.get(detail[0], 0)
        (_, element), length = detail
        if node is Nodetype.ARRAY:
            return np.zeros(length, element[0])
        return np.zeros(0, element[0]) if detail[0][0] is Nodetype.BASE and element[0] != "string" else []

    return make


# ------------------------------------------------------------------------------------------------ reading, writing


@contextmanager
def reading(source: Path, distribution: str) -> Iterator[AnyReader]:
    """The bag, opened. `distribution` knows the types of an old ROS 2 bag that holds none."""
    if not source.exists():
        raise InputError(f"{str(source)!r} does not exist. Check the path, seen from {Path.cwd()}.")
    try:
        with AnyReader([source], default_typestore=typestore(distribution)) as reader:
            yield reader
    except (AnyReaderError, OSError) as error:
        remedy = "If the recording was cut short, mend it with `rosbag reindex` or `ros2 bag reindex`."
        raise InputError(f"{str(source)!r} cannot be read as a bag: {error}. {remedy}") from error


def camera(reader: AnyReader, topic: str | None, transport: str | None) -> Any:
    """The connections that hold the pictures: those of `topic`, or of the one topic that has any."""
    kinds = PICTURES if transport is None else (PICTURES[TRANSPORTS.index(transport)],)
    topics = {c.topic: c.msgtype for c in reader.connections if c.msgtype in PICTURES}
    usable = {name for name, kind in topics.items() if kind in kinds}
    shown = ", ".join(sorted(topics)) or "none"
    if topic is None and len(usable) != 1:
        raise InputError(f"the bag has {len(usable)} topics with such pictures ({shown}). Choose one with --topic.")
    chosen = topic if topic is not None else usable.pop()
    if chosen not in topics:
        raise InputError(f"the bag has no pictures on {chosen!r}. Topics with pictures: {shown}.")
    return [connection for connection in reader.connections if connection.topic == chosen]


class Output:
    """A new bag of the same kind as the one that is read."""

    def __init__(self, path: Path, *, ros1: bool, storage: str, store: Typestore) -> None:
        self._ros1, self._store = ros1, store
        self._messages = Messages(maker(store), ros1=ros1)
        if ros1:
            self._writer: Any = Writer1(path)
        else:
            self._writer = Writer2(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
        self._connections: dict[str, Any] = {}

    def __enter__(self) -> Output:
        self._writer.open()
        for topic, kind in {**PLAIN, **(ROS1_ONLY if self._ros1 else {})}.items():
            latched = topic in ("reasoning", *ROS1_ONLY)
            more: dict[str, Any] = (
                {"latching": int(latched)} if self._ros1 else {"offered_qos_profiles": [_qos(latched)]}
            )
            full = kind.replace("/", "/msg/")
            connection = self._writer.add_connection(f"{NAMESPACE}/{topic}", full, typestore=self._store, **more)
            self._connections[topic] = connection, full
        return self

    def __exit__(self, *failure: Any) -> None:
        self._writer.__exit__(*failure)

    def answer(self, time: int, frame: Frame, lookout: Lookout, summary: Summary) -> None:
        """What a live node would publish about this frame."""
        messages = self._messages
        result, cause = lookout.process(frame)
        assert result is not None  # nobody changes the wish of a recording
        if self._ros1 and messages.labels.add(target.name for target in result.targets):
            info, labels = messages.label_texts(frame.header, f"{NAMESPACE}/labels")
            self.write("vision_info", time, info)
            self.write("labels", time, labels)
        if cause:
            self.write("reasoning", time, messages.text(result.answer))
        self.write("detections", time, messages.detections(frame.header, result))
        if lookout.configuration.settings.annotate:
            self.write("image_annotated", time, messages.annotated(frame.header, result))
        summary.answered += 1
        summary.reasonings += bool(cause)
        summary.boxes += len(result)

    def write(self, topic: str, time: int, message: Any) -> None:
        connection, kind = self._connections[topic]
        serialize = self._store.serialize_ros1 if self._ros1 else self._store.serialize_cdr
        self._writer.write(connection, time, serialize(message, kind))


def _qos(latched: bool) -> Qos:
    forever = QosTime(2147483647, 4294967295)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=1 if latched else 5,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when it is whole; a bag may be a file or a folder."""
    workshop = target.parent / f".{os.getpid()}-{target.name}"
    try:
        workshop.mkdir(parents=True)
        yield workshop / target.name
        if target.is_dir():
            shutil.rmtree(target)
        (workshop / target.name).replace(target)
    except OSError as error:
        raise InputError(f"cannot write {str(target)!r}: {error.strerror or error}. Choose another place.") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Job:
    """A bag to answer, and where the answers go.

    topic: of the pictures; None where only one has any. transport: raw or compressed; None takes either.
    storage: of a ROS 2 bag, mcap or sqlite3; None as the source. distribution: whose ROS 2 types to write.
    """

    source: Path
    target: Path
    topic: str | None = None
    transport: str | None = None
    storage: str | None = None
    distribution: str = "jazzy"
    overwrite: bool = False

    def check(self) -> None:
        """Raise `InputError` for what can be known before a model is loaded."""
        with reading(self.source, self.distribution) as reader:
            camera(reader, self.topic, self.transport)
            _check_name(self.target, ros1=not reader.is2)
        _check_free(self.target, self.overwrite)

    def run(self, lookout: Lookout, progress: Callable[[int, int], None] = lambda done, total: None) -> Summary:
        """Answer every picture, or as many a second as the rate says."""
        self.check()
        summary = Summary()
        with reading(self.source, self.distribution) as reader:
            connections = camera(reader, self.topic, self.transport)
            ros1 = not reader.is2
            store = typestore("noetic" if ros1 else self.distribution)
            storage = self.storage or ("mcap" if _holds_mcap(self.source) else "sqlite3")
            total = sum(connection.msgcount for connection in connections)
            with replacing(self.target) as path, Output(path, ros1=ros1, storage=storage, store=store) as output:
                for time, frame in self._frames(reader, connections, lookout.configuration.settings.rate, summary):
                    progress(summary.pictures - 1, total)
                    output.answer(time, frame, lookout, summary)
                progress(summary.pictures, total)
                if not summary.answered:
                    why = summary.first_problem or "it has none"
                    raise InputError(f"no picture of {str(self.source)!r} could be read: {why}")
        return summary

    def _frames(
        self, reader: AnyReader, connections: Any, rate: float, summary: Summary
    ) -> Iterator[tuple[int, Frame]]:
        """The readable pictures with the time of their recording, thinned to `rate`."""
        last = -float("inf")
        for connection, time, data in reader.messages(connections):
            summary.pictures += 1
            if rate and time - last < 0.999e9 / rate:  # the clock of a recording trembles
                summary.skipped += 1
                continue
            last = time
            try:
                yield time, Frame.of(reader.deserialize(data, connection.msgtype))
            except ImageError as error:
                summary.unreadable += 1
                summary.first_problem = summary.first_problem or str(error)


def _check_name(target: Path, *, ros1: bool) -> None:
    """A ROS 1 bag is a file that ends in .bag, a ROS 2 bag is a folder."""
    if ros1 and target.suffix != ".bag":
        raise InputError(f"{str(target)!r} would be a ROS 1 bag, as the source is: end it in .bag")
    if not ros1 and target.suffix in (".bag", ".mcap", ".db3"):
        raise InputError(f"{str(target)!r} would be a ROS 2 bag, which is a folder: leave out {target.suffix}")


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise InputError(f"{str(target)!r} exists already. Choose another name, or give --overwrite.")


def _holds_mcap(source: Path) -> bool:
    return source.suffix == ".mcap" or (source.is_dir() and any(source.glob("*.mcap")))


# --------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="detgpt_bridge.py bag", description="Answer the pictures of a recorded bag into a new bag."
    )
    parser.add_argument("source", type=Path, help="a ROS 1 .bag, or a ROS 2 folder, .mcap or .db3")
    parser.add_argument("target", type=Path, help="the new bag: NAME.bag for ROS 1, a folder for ROS 2")
    parser.add_argument("--topic", help="the pictures' topic; needed where the bag has several")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), help="of a ROS 2 bag; as the source unless given")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default="jazzy", help="whose ROS 2 types to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    for parameter in PARAMETERS.values():
        if parameter.name != "lost_after":  # no camera is lost in a recording
            shown = "" if parameter.default in (None, "") else f" [{parameter.default}]"
            flag = f"--{parameter.name.replace('_', '-')}"
            parser.add_argument(flag, dest=parameter.name, metavar=parameter.kind.__name__, help=parameter.help + shown)
    given = vars(parser.parse_args(arguments))
    values = {name: given.pop(name) for name in PARAMETERS if name in given}
    try:
        configuration = Configuration.of(values)
        if not any(configuration.settings.order):
            raise InputError('nothing to look for: give --wish "I am thirsty", or --names cup,bottle')
    except InputError as error:
        parser.error(str(error))
    job = Job(transport=values["image_transport"], **given)
    try:
        job.check()
        lookout = Lookout(configuration.load(), configuration)
        with terminal.progress(job.source.name) as progress:
            summary = job.run(lookout, progress)
    except DetGPTError as error:
        terminal.print_error(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    if summary.unreadable:
        terminal.note(f"{summary.unreadable} pictures could not be read, the first because {summary.first_problem}")
    terminal.note(
        f"wrote {job.target}: {summary.answered} of {summary.pictures} pictures answered, "
        f"{summary.boxes} boxes, reasoned {summary.reasonings} times"
    )
    return 0
