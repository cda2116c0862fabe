"""The bag tool: recorded pictures in, detections out, in the bytes that ROS 1 and ROS 2 write."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2

from detgpt import DetGPT
from detgpt.detectors import Grounding
from detgpt.errors import InputError
from detgpt.reasoners.scripted import ScriptedReasoner
from detgpt_ros import bag
from detgpt_ros.lookout import Lookout
from detgpt_ros.settings import Configuration

REPOSITORY = Path(__file__).parents[1]
START = 1_700_000_000_000_000_000
TENTH = 100_000_000  # of a second, in nanoseconds
KINDS = ("noetic", "humble-sqlite3", "jazzy-mcap")


class LeftHalf:
    """A detector that boxes the left half for every name."""

    name = "left-half"

    def detect(self, images: Any, names: Any, **options: Any) -> list[Grounding]:
        return [
            Grounding(
                np.array([[0, 0, image.width / 2, image.height]] * len(asked), np.float32).reshape(-1, 4),
                np.full(len(asked), 0.75, np.float32),
                np.arange(len(asked)),
            )
            for image, asked in zip(images, names, strict=True)
        ]


def lookout(answer: str = 'A kitchen.\nTargets: ["Tasse groß"]', **values: Any) -> Lookout:
    configuration = Configuration.of({"wish": "tea", **values})
    return Lookout(DetGPT(ScriptedReasoner([answer]), LeftHalf()), configuration)


def record(path: Path, kind: str, pictures: list[Image.Image], topic: str = "/camera/image", **change: Any) -> Path:
    """A bag of `kind` with these pictures, ten a second; on /camera/… compressed where the topic ends so."""
    distribution, _, storage = kind.partition("-")
    store = bag.typestore(distribution)
    make = bag.maker(store)
    ros1 = distribution == "noetic"
    path = path.with_suffix(".bag") if ros1 else path
    compressed = topic.endswith("/compressed")
    name = "sensor_msgs/CompressedImage" if compressed else "sensor_msgs/Image"
    full = name.replace("/", "/msg/")
    writer: Any = Writer1(path) if ros1 else Writer2(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    with writer:
        connection = writer.add_connection(topic, full, typestore=store)
        for number, image in enumerate(pictures):
            time = START + number * TENTH
            # The stamp lies before the time of recording, as a real camera's does.
            sec, nanosec = divmod(time - 5_000_000, 10**9)
            stamp = make("builtin_interfaces/Time", sec=sec, nanosec=nanosec)
            more = {"seq": number} if ros1 else {}
            header = make("std_msgs/Header", stamp=stamp, frame_id=f"lens_{number}", **more)
            if compressed:
                file = io.BytesIO()
                image.save(file, "PNG")
                message = make(name, header=header, format="rgb8; png compressed", data=file.getvalue())
            else:
                fields = {"encoding": "rgb8", "step": 3 * image.width, "data": image.tobytes(), **change}
                message = make(name, header=header, height=image.height, width=image.width, **fields)
            serialize = store.serialize_ros1 if ros1 else store.serialize_cdr
            writer.write(connection, time, serialize(message, full))
    return path


def read(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """The messages by topic: (time, message), as the bag itself says what they are made of."""
    found: dict[str, list[tuple[int, Any]]] = {}
    with AnyReader([path]) as reader:
        for connection in reader.connections:
            found[connection.topic] = []
        for connection, time, data in reader.messages():
            found[connection.topic].append((time, reader.deserialize(data, connection.msgtype)))
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def grey(tmp_path: Path) -> list[Image.Image]:
    return [Image.new("RGB", (40, 20), (number, number, number)) for number in range(5)]


def answer(source: Path, target: Path, watch: Lookout, progress: Any = None, **how: Any) -> bag.Summary:
    job = bag.Job(source, target, **how)
    return job.run(watch, progress) if progress else job.run(watch)


def output(tmp_path: Path, kind: str) -> Path:
    return tmp_path / ("answers.bag" if kind == "noetic" else "answers")


def test_every_picture_is_answered_with_its_own_header_and_time(
    tmp_path: Path, kind: str, grey: list[Image.Image]
) -> None:
    source, target = record(tmp_path / "drive", kind, grey), output(tmp_path, kind)
    summary = answer(source, target, lookout(), distribution=kind.split("-")[0].replace("noetic", "jazzy"))
    assert (summary.pictures, summary.answered, summary.boxes, summary.reasonings) == (5, 5, 5, 1)
    topics = read(target)
    assert len(topics["/detgpt/detections"]) == len(topics["/detgpt/image_annotated"]) == 5
    for number, (time, message) in enumerate(topics["/detgpt/detections"]):
        assert time == START + number * TENTH
        header = message.header
        assert (header.frame_id, header.stamp.sec * 10**9 + header.stamp.nanosec) == (
            f"lens_{number}",
            time - 5_000_000,
        )
        (one,) = message.detections
        assert one.header == header
        centre = one.bbox.center if kind == "noetic" else one.bbox.center.position
        assert (centre.x, centre.y, one.bbox.size_x, one.bbox.size_y) == (10, 10, 20, 20)
        (result,) = one.results
        assert result.pose.pose.orientation.w == 1 and not result.pose.covariance.any()
        if kind == "noetic":
            assert (result.id, result.score) == (0, 0.75)
        else:
            assert (result.hypothesis.class_id, result.hypothesis.score) == ("Tasse groß", 0.75)
    ((_, said),) = topics["/detgpt/reasoning"]
    assert said.data.startswith("A kitchen.")


def test_the_annotated_picture_is_as_large_as_the_cameras_and_shows_the_box(tmp_path: Path, kind: str) -> None:
    black = Image.new("RGB", (300, 150))
    source, target = record(tmp_path / "drive", kind, [black]), output(tmp_path, kind)
    answer(source, target, lookout())
    ((_, message),) = read(target)["/detgpt/image_annotated"]
    assert (message.width, message.height, message.encoding, message.step) == (300, 150, "rgb8", 900)
    pixels = message.data.reshape(150, 300, 3)
    assert pixels[100, 140:155].any() and not pixels[:, 200:].any()  # the right edge of the box; nothing beyond


def test_a_ros1_bag_says_which_number_is_which_name(tmp_path: Path, grey: list[Image.Image]) -> None:
    source, target = record(tmp_path / "drive", "noetic", grey), output(tmp_path, "noetic")
    answer(source, target, lookout('Targets: ["cup", "pot"]'))
    topics = read(target)
    ((_, info),) = topics["/detgpt/vision_info"]
    assert (info.method, info.database_location, info.database_version) == ("DetGPT", "/detgpt/labels", 2)
    assert json.loads(topics[info.database_location][0][1].data) == ["cup", "pot"]


@pytest.mark.parametrize("kind", ["humble-sqlite3", "jazzy-mcap"])
def test_reasons_reach_who_subscribes_late(tmp_path: Path, kind: str, grey: list[Image.Image]) -> None:
    """As from the live node: a player of the bag keeps the last reasoning for them, and no detections."""
    source, target = record(tmp_path / "drive", kind, grey), output(tmp_path, kind)
    answer(source, target, lookout())
    with AnyReader([target]) as reader:
        kept = {c.topic: c.ext.offered_qos_profiles[0].durability.name for c in reader.connections}  # type: ignore[union-attr]
    assert kept["/detgpt/reasoning"] == "TRANSIENT_LOCAL" and kept["/detgpt/detections"] == "VOLATILE"


def test_the_types_are_those_of_the_published_vision_msgs() -> None:
    """The sum that a ROS 1 subscriber compares; it is the same in every release of Noetic's package."""
    assert bag.typestore("noetic").generate_msgdef("vision_msgs/msg/Detection2DArray")[1] == (
        "402071f61477de256df9f1aa45e6e4c8"
    )


@pytest.mark.parametrize("distribution", ["humble", "jazzy"])
def test_the_bytes_of_a_detection_are_cdr(distribution: str) -> None:
    """Read back byte by byte as the standard says: little-endian, each number aligned to its own size."""
    store = bag.typestore(distribution)
    make = bag.maker(store)
    found = make(
        "vision_msgs/Detection2D",
        header=make("std_msgs/Header", stamp=make("builtin_interfaces/Time", sec=7, nanosec=8), frame_id="eye"),
        bbox=make("vision_msgs/BoundingBox2D", size_x=3.0, size_y=4.0),
    )
    data = bytes(store.serialize_cdr(found, "vision_msgs/msg/Detection2D", little_endian=True))
    expected = b"\x00\x01\x00\x00" + struct.pack("<iI", 7, 8) + struct.pack("<I4s", 4, b"eye\0")
    expected += struct.pack("<I4x", 0)  # no results; the next number has 8 bytes and starts at a multiple of 8
    expected += struct.pack("<5d", 0, 0, 0, 3, 4) + struct.pack("<I1s", 1, b"\0")
    assert data.rstrip(b"\0") == expected.rstrip(b"\0") and abs(len(data) - len(expected)) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_pictures_are_read(tmp_path: Path, kind: str, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", kind, grey, topic="/camera/image/compressed")
    assert answer(source, output(tmp_path, kind), lookout()).answered == 5


def test_the_rate_thins_the_recording(tmp_path: Path, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", "jazzy-mcap", grey)
    summary = answer(source, tmp_path / "answers", lookout(rate=5))
    assert (summary.answered, summary.skipped) == (3, 2)


def test_progress_counts_the_pictures(tmp_path: Path, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", "jazzy-mcap", grey)
    seen: list[tuple[int, int]] = []
    answer(source, tmp_path / "answers", lookout(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 5) for number in range(6)]


def test_without_annotation_no_pictures_are_written(tmp_path: Path, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", "jazzy-mcap", grey)
    answer(source, tmp_path / "answers", lookout(annotate=False))
    assert read(tmp_path / "answers")["/detgpt/image_annotated"] == []


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path, kind: str, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", kind, grey)
    before = sorted(tmp_path.iterdir())
    watch = lookout()

    def fail(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(source, output(tmp_path, kind), watch, progress=fail)
    assert sorted(tmp_path.iterdir()) == before


def test_what_exists_is_replaced_only_when_told(tmp_path: Path, kind: str, grey: list[Image.Image]) -> None:
    source, target = record(tmp_path / "drive", kind, grey), output(tmp_path, kind)
    answer(source, target, lookout())
    with pytest.raises(InputError, match="--overwrite"):
        answer(source, target, lookout())
    answer(source, target, lookout('Targets: ["pot", "cup"]'), overwrite=True)
    assert read(target)["/detgpt/reasoning"][0][1].data == 'Targets: ["pot", "cup"]'
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])


def test_depth_images_are_counted_and_a_bag_of_nothing_else_is_an_error(
    tmp_path: Path, grey: list[Image.Image]
) -> None:
    source = record(tmp_path / "drive", "jazzy-mcap", grey, encoding="16UC1")
    with pytest.raises(InputError, match=r"no picture .* could be read: .*depth or 16-bit"):
        answer(source, tmp_path / "answers", lookout())
    assert not (tmp_path / "answers").exists()


def test_a_bag_cut_short_is_named_with_a_remedy(tmp_path: Path, kind: str, grey: list[Image.Image]) -> None:
    source = record(tmp_path / "drive", kind, grey)
    file = source if source.is_file() else next(source.glob("drive*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="reindex"):
        answer(source, output(tmp_path, kind), lookout())


@pytest.mark.parametrize(("target", "said"), [("answers.bag", "leave out .bag"), ("answers.mcap", "leave out .mcap")])
def test_a_ros2_bag_is_a_folder(tmp_path: Path, grey: list[Image.Image], target: str, said: str) -> None:
    source = record(tmp_path / "drive", "jazzy-mcap", grey)
    with pytest.raises(InputError, match=said):
        answer(source, tmp_path / target, lookout())


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two scenes that the built-in model knows, three pictures each."""
    images = []
    for name in ("kitchen", "desk"):
        with Image.open(REPOSITORY / "examples" / f"{name}.png") as image:
            images += [image.convert("RGB")] * 3
    yield record(tmp_path_factory.mktemp("bag") / "drive", "jazzy-mcap", images)


def command(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, REPOSITORY / "ros/detgpt_bridge.py", "bag"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [*script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=240
    )


def test_the_built_in_model_answers_a_recorded_drive(recorded: Path, tmp_path: Path) -> None:
    ran = command(recorded, "answers", "--wish", "I am thirsty", "--reason-interval", 0.1, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "wrote answers: 6 of 6 pictures answered" in ran.stderr
    topics = read(tmp_path / "answers")
    assert len(topics["/detgpt/reasoning"]) == 2  # once for the kitchen, once for the desk
    labels = {one.results[0].hypothesis.class_id for _, m in topics["/detgpt/detections"][:3] for one in m.detections}
    assert labels & {"coffee", "soda"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["out"], 2, "nothing to look for"),
        (["out", "--wish", "tea", "--rate", "fast"], 2, "rate='fast' is no float"),
        (
            ["out", "--wish", "tea", "--topic", "/rear"],
            1,
            "no pictures on '/rear'. Topics with pictures: /camera/image",
        ),
        (["out", "--wish", "tea", "--image-transport", "compressed"], 1, "0 topics with such pictures"),
    ],
)
def test_a_mistake_is_one_line(recorded: Path, tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    ran = command(recorded, *arguments, cwd=tmp_path)
    assert ran.returncode == status
    assert said in ran.stderr and "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bag_is_named(tmp_path: Path) -> None:
    ran = command("nowhere.bag", "out.bag", "--names", "cup", cwd=tmp_path)
    assert ran.returncode == 1 and "error: 'nowhere.bag' does not exist" in ran.stderr
