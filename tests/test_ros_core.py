"""The heart of the ROS bridge, without ROS: pictures, when to reason, the newest frame, failures, parameters."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from detgpt import DetGPT
from detgpt.detectors import Grounding
from detgpt.errors import ImageError, InputError
from detgpt.pipeline import Options
from detgpt.reasoners import RawAnswer, Request
from detgpt.results import Detections
from detgpt_ros.images import picture
from detgpt_ros.live import Bridge
from detgpt_ros.lookout import Frame, Lookout, scene_change
from detgpt_ros.messages import Labels, Level, Status
from detgpt_ros.settings import PARAMETERS, Configuration, Settings

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"


# ------------------------------------------------------------------------------------------ pictures from messages


def raw(encoding: str, pixels: np.ndarray, padding: int = 0) -> SimpleNamespace:
    """A sensor_msgs/Image whose rows end in `padding` bytes of 255."""
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=255)
    return SimpleNamespace(
        encoding=encoding, width=width, height=height, step=rows.shape[1], is_bigendian=1, data=rows.tobytes()
    )


@pytest.mark.parametrize(
    ("encoding", "pixel", "rgb"),
    [
        ("rgb8", (10, 20, 30), (10, 20, 30)),
        ("bgr8", (30, 20, 10), (10, 20, 30)),
        ("rgba8", (10, 20, 30, 0), (10, 20, 30)),  # alpha 0 is not white: simulators leave it empty
        ("bgra8", (30, 20, 10, 0), (10, 20, 30)),
        ("mono8", (40,), (40, 40, 40)),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_every_encoding_gives_the_same_colours_with_and_without_padding(
    encoding: str, pixel: tuple[int, ...], rgb: tuple[int, ...], padding: int
) -> None:
    pixels = np.zeros((3, 4, len(pixel)), np.uint8)
    pixels[1, 2] = pixel
    image = picture(raw(encoding, pixels, padding))
    assert image.size == (4, 3)
    assert image.getpixel((2, 1)) == rgb
    assert np.asarray(image).sum() == sum(rgb)  # nothing of the padding got in


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("named", ["jpeg", "bgr8; jpeg compressed bgr8", "rgb8; png compressed"])
def test_compressed_pictures_say_what_they_are_themselves(kind: str, named: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, kind)
    image = picture(SimpleNamespace(format=named, data=np.frombuffer(file.getvalue(), np.uint8)))
    red, green, blue = image.getpixel((8, 8))  # type: ignore[misc]
    assert abs(red - 200) < 5 and abs(green - 30) < 5 and abs(blue - 30) < 5


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (SimpleNamespace(encoding="16UC1", width=1, height=1, step=2, data=b"ab"), "depth or 16-bit data"),
        (SimpleNamespace(encoding="bayer_rggb8", width=1, height=1, step=1, data=b"a"), "debayering"),
        (SimpleNamespace(encoding="yuv422", width=1, height=1, step=2, data=b"ab"), "rgb8, bgr8"),
        (SimpleNamespace(encoding="rgb8", width=0, height=0, step=0, data=b""), "empty"),
        (SimpleNamespace(encoding="rgb8", width=2, height=2, step=6, data=b"123"), "holds 3 bytes"),
        (SimpleNamespace(encoding="rgb8", width=2, height=1, step=3, data=b"123456"), "3 bytes a row"),
        (SimpleNamespace(format="16UC1; compressedDepth png", data=b""), "depth or 16-bit data"),
        (SimpleNamespace(format="16UC1; png compressed ", data=b""), "depth or 16-bit data"),
        (SimpleNamespace(format="jpeg", data=b"\xff\xd8\xff\xe0 cut"), "damaged"),
    ],
)
def test_what_is_no_colour_picture_is_refused_and_the_message_says_why(message: Any, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        picture(message)


# ------------------------------------------------------------------------------------------------ when to reason


class Reasoner:
    """Answers "the <wish>"; counts, and can fail, say nonsense or wait."""

    name = "test"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing = False
        self.nonsense = False
        self.gate = threading.Event()
        self.gate.set()

    def reason(self, requests: Sequence[Request], *, max_new_tokens: int = 512) -> list[RawAnswer]:
        self.asked += [request.instruction for request in requests]
        assert self.gate.wait(20)
        if self.failing:
            raise RuntimeError("the server is down")
        if self.nonsense:
            return [RawAnswer("Hm.") for _ in requests]
        return [
            RawAnswer("There is none.\nTargets: []" if "none" in r.instruction else f'Targets: ["{r.instruction}"]')
            for r in requests
        ]


class Detector:
    """One box per name, as large as the picture; can fail, or take its time."""

    name = "test"

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.failing = False
        self.seconds = 0.0

    def detect(self, images: Any, names: Any, **options: Any) -> list[Grounding]:
        time.sleep(self.seconds)
        if self.failing:
            raise RuntimeError("out of memory")
        self.asked += [tuple(asked) for asked in names]
        return [
            Grounding(
                np.array([[0, 0, *image.size]] * len(asked), np.float32).reshape(-1, 4),
                np.full(len(asked), 0.9, np.float32),
                np.arange(len(asked)),
            )
            for image, asked in zip(images, names, strict=True)
        ]


@pytest.fixture
def reasoner() -> Reasoner:
    return Reasoner()


@pytest.fixture
def detector() -> Detector:
    return Detector()


@pytest.fixture
def lookout(reasoner: Reasoner, detector: Detector) -> Lookout:
    return Lookout(DetGPT(reasoner, detector), Configuration(Settings(wish="tea", max_age=60, reason_interval=2)))


def scene(name: str, time: float) -> Frame:
    with Image.open(EXAMPLES / f"{name}.png") as image:
        return Frame(image.convert("RGB").resize((320, 240)), f"header at {time}", time)


def order(lookout: Lookout, **values: Any) -> None:
    lookout.configuration = lookout.configuration.changed(values)


def test_it_reasons_once_and_then_only_detects(lookout: Lookout, reasoner: Reasoner, detector: Detector) -> None:
    causes = [lookout.process(scene("kitchen", second))[1] for second in range(10)]
    assert causes == ["the wish is new", *[""] * 9]
    assert reasoner.asked == ["tea"]
    assert detector.asked == [("tea",)] * 10


def test_a_detected_frame_carries_the_reasons_of_the_last_reasoning(lookout: Lookout) -> None:
    first, _ = lookout.process(scene("kitchen", 0))
    second, cause = lookout.process(scene("kitchen", 1))
    assert first is not None and second is not None and cause == ""
    assert (second.instruction, second.answer, second.labels) == ("tea", first.answer, ("tea",))


@pytest.mark.parametrize(
    ("name", "second", "cause"),
    [
        ("kitchen", 50, ""),
        ("desk", 5, "the scene changed"),
        ("desk", 1, ""),  # too soon after the last time
        ("kitchen", 61, "the answer is old"),
        ("kitchen", -100, "the clock went back"),  # a simulation was reset, or the bag plays again
        ("kitchen", -0.1, ""),
    ],
)
def test_it_reasons_anew_when_the_scene_or_the_clock_says_so(
    lookout: Lookout, name: str, second: float, cause: str
) -> None:
    lookout.process(scene("kitchen", 0))
    assert lookout.due(scene(name, second)) == cause


def test_a_new_wish_is_reasoned_at_once_and_the_old_names_are_forgotten(lookout: Lookout, reasoner: Reasoner) -> None:
    lookout.process(scene("kitchen", 0))
    order(lookout, wish="soup")
    assert lookout.detect(scene("kitchen", 0.1)) is None  # boxes of the old wish would be wrong
    result, cause = lookout.process(scene("kitchen", 0.2))
    assert result is not None and result.labels == ("soup",) and cause == "the wish is new"


def test_a_wish_that_changes_while_the_reasoner_thinks_is_not_answered_with_the_old_one(
    lookout: Lookout, reasoner: Reasoner
) -> None:
    reasoner.gate.clear()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(lookout.reason(scene("kitchen", 0))))
    thread.start()
    while not reasoner.asked:
        time.sleep(0.01)
    order(lookout, wish="soup")
    reasoner.gate.set()
    thread.join(10)
    assert answers == [None]
    assert lookout.last is None


def test_names_need_no_reasoner(lookout: Lookout, reasoner: Reasoner) -> None:
    order(lookout, wish="", names="cup, bottle")
    result, cause = lookout.process(scene("kitchen", 0))
    assert result is not None and [t.name for t in result.targets] == ["cup", "bottle"] and cause == ""
    assert reasoner.asked == []


def test_where_nothing_fits_the_detector_is_left_alone(lookout: Lookout, detector: Detector) -> None:
    order(lookout, wish="none")
    lookout.process(scene("kitchen", 0))
    before = len(detector.asked)
    result, _ = lookout.process(scene("kitchen", 1))
    assert result is not None and len(result) == 0 and result.reasoning == "There is none."
    assert len(detector.asked) == before


def test_an_unreadable_answer_is_asked_for_again(lookout: Lookout, reasoner: Reasoner) -> None:
    reasoner.nonsense = True
    result, _ = lookout.process(scene("kitchen", 0))
    assert result is not None and result.problem
    assert lookout.due(scene("kitchen", 1)) == ""
    assert lookout.due(scene("kitchen", 3)) == "the last answer could not be read"


def test_a_small_new_thing_is_a_change_but_another_exposure_is_none() -> None:
    before = scene("kitchen", 0).image
    with_cup = before.copy()
    with_cup.paste((20, 20, 200), (140, 100, 180, 140))
    brighter = Image.fromarray((np.asarray(before) * 0.8 + 20).astype(np.uint8))
    noise = np.random.default_rng(0).normal(0, 8, (240, 320, 3))
    noisy = Image.fromarray((np.asarray(before) + noise).clip(0, 255).astype(np.uint8))
    change = {name: scene_change(Frame(before).thumbnail, Frame(image).thumbnail) for name, image in
              {"cup": with_cup, "brighter": brighter, "noisy": noisy, "same": before}.items()}  # fmt: skip
    threshold = Settings().scene_threshold
    assert change["same"] == 0
    assert change["noisy"] < threshold / 2 and change["brighter"] < threshold
    assert change["cup"] > threshold
    assert scene_change(Frame(before).thumbnail, scene("desk", 0).thumbnail) > 2 * threshold


# --------------------------------------------------------------------------------------------------- the live part


class Robot:
    """A host that remembers what was published."""

    def __init__(self) -> None:
        self.detections: list[tuple[Frame, Detections]] = []
        self.reasonings: list[Detections] = []
        self.logged: list[tuple[Level, str]] = []

    def now(self) -> float:
        return 1000.0

    def publish_detections(self, frame: Frame, result: Detections) -> None:
        self.detections.append((frame, result))

    def publish_reasoning(self, frame: Frame, result: Detections) -> None:
        self.reasonings.append(result)

    def publish_status(self, status: Status) -> None: ...

    def log(self, level: Level, text: str) -> None:
        self.logged.append((level, text))


def message(second: float = 999.0, frame_id: str = "camera") -> SimpleNamespace:
    """A sensor_msgs/Image as a bag or ROS 2 has it."""
    stamp = SimpleNamespace(sec=int(second), nanosec=int(second % 1 * 1e9))
    image = raw("rgb8", np.zeros((24, 32, 3), np.uint8))
    image.header = SimpleNamespace(stamp=stamp, frame_id=frame_id)
    return image


def until(happened: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


Start = Callable[..., Bridge]


@pytest.fixture
def robot() -> Robot:
    return Robot()


@pytest.fixture
def start(robot: Robot, reasoner: Reasoner, detector: Detector) -> Iterator[Start]:
    """Start a bridge with these settings; they are stopped in the end."""
    bridges = []

    def start(load: Callable[[], DetGPT] | None = None, **values: Any) -> Bridge:
        bridge = Bridge(robot, Configuration.of(values), load or (lambda: DetGPT(reasoner, detector)), "/camera")
        bridge.start()
        bridges.append(bridge)
        return bridge

    yield start
    reasoner.gate.set()
    for bridge in bridges:
        bridge.stop()


def state(bridge: Bridge) -> tuple[Level, str]:
    status = bridge.status()
    return status.level, status.message


def test_one_picture_is_enough_for_reasons_and_boxes(start: Start, robot: Robot) -> None:
    start(wish="tea").offer(message(999, "left_eye"))
    until(lambda: robot.detections)
    frame, result = robot.detections[0]
    assert (frame.header.frame_id, frame.header.stamp.sec) == ("left_eye", 999)
    assert result.labels == ("tea",) and len(robot.reasonings) == 1


def test_a_new_wish_is_answered_on_the_last_picture_of_a_silent_camera(start: Start, robot: Robot) -> None:
    bridge = start(wish="tea")
    bridge.offer(message())
    until(lambda: robot.detections)
    bridge.configure({"wish": "soup"})
    until(lambda: robot.detections[-1][1].labels == ("soup",))


def test_a_slow_model_drops_pictures_and_answers_the_newest(start: Start, robot: Robot, detector: Detector) -> None:
    bridge = start(names="cup")
    detector.seconds = 0.2
    for number in range(60):
        bridge.offer(message(number))
        time.sleep(0.01)
    until(lambda: robot.detections[-1][0].time == 59)
    assert len(robot.detections) < 12
    answered = [frame.time for frame, _ in robot.detections]
    assert answered == sorted(answered)
    dropped = int(bridge.status().values["frames dropped"])
    assert dropped + len(answered) == 60


def test_detecting_goes_on_while_the_reasoner_thinks(start: Start, robot: Robot, reasoner: Reasoner) -> None:
    bridge = start(wish="tea", max_age=1, reason_interval=0)
    bridge.offer(message(0))
    until(lambda: robot.detections)
    reasoner.gate.clear()
    before = len(robot.detections)
    for number in range(2, 6):  # each of them calls for reasoning
        bridge.offer(message(number))
        until(lambda expected=number: robot.detections[-1][0].time == expected)  # type: ignore[misc]
    assert len(robot.detections) > before + 2
    assert len(reasoner.asked) == 2


def test_the_rate_is_a_limit(start: Start, robot: Robot) -> None:
    bridge = start(names="cup", rate=10)
    began = time.monotonic()
    for number in range(50):
        bridge.offer(message(number))
        time.sleep(0.01)
    assert len(robot.detections) <= (time.monotonic() - began) * 10 + 2


def test_a_failing_detector_is_reported_and_recovered_from(start: Start, robot: Robot, detector: Detector) -> None:
    bridge = start(names="cup")
    detector.failing = True
    bridge.offer(message(1))
    until(lambda: state(bridge) == (Level.ERROR, "detecting fails: RuntimeError: out of memory"))
    detector.failing = False
    bridge.offer(message(2))
    until(lambda: robot.detections and state(bridge) == (Level.OK, "running"))


def test_a_failing_reasoner_leaves_the_boxes_of_the_last_names(start: Start, robot: Robot, reasoner: Reasoner) -> None:
    bridge = start(wish="tea", max_age=1, reason_interval=0)
    bridge.offer(message(0))
    until(lambda: robot.detections)
    reasoner.failing = True
    bridge.offer(message(5))
    until(lambda: state(bridge) == (Level.ERROR, "reasoning fails: RuntimeError: the server is down"))
    bridge.offer(message(6))
    until(lambda: robot.detections[-1][0].time == 6)
    assert robot.detections[-1][1].labels == ("tea",)
    asked = len(reasoner.asked)
    until(lambda: len(reasoner.asked) > asked + 1)  # tried again without a new picture
    reasoner.failing = False
    until(lambda: state(bridge) == (Level.OK, "running"))


def test_a_model_that_does_not_load_is_tried_again(
    start: Start, robot: Robot, reasoner: Reasoner, detector: Detector
) -> None:
    there = threading.Event()

    def load() -> DetGPT:
        if not there.is_set():
            raise InputError("no network")
        return DetGPT(reasoner, detector)

    bridge = start(load, wish="tea")
    until(lambda: state(bridge) == (Level.ERROR, "the model does not load: InputError: no network"))
    bridge.offer(message())
    there.set()
    until(lambda: robot.detections)


def test_an_unreadable_picture_is_reported_and_the_next_one_answered(start: Start, robot: Robot) -> None:
    bridge = start(names="cup")
    depth = message()
    depth.encoding = "16UC1"
    bridge.offer(depth)
    until(lambda: "depth or 16-bit" in state(bridge)[1] and state(bridge)[0] is Level.ERROR)
    bridge.offer(message())
    until(lambda: robot.detections)
    assert state(bridge) == (Level.OK, "running")
    assert bridge.status().values["frames unreadable"] == "1"


def test_a_lost_camera_is_reported_and_its_return_too(start: Start, robot: Robot) -> None:
    bridge = start(names="cup", lost_after=0.3)
    until(lambda: state(bridge) == (Level.WARN, "waiting for pictures on /camera"))
    bridge.offer(message())
    until(lambda: state(bridge) == (Level.OK, "running"))
    until(lambda: state(bridge)[0] is Level.ERROR and "camera lost: no picture on /camera" in state(bridge)[1])
    bridge.offer(message())
    assert state(bridge) == (Level.OK, "running")


def test_a_change_of_state_is_logged_once(start: Start, robot: Robot) -> None:
    bridge = start(names="cup")
    bridge.offer(message())
    until(lambda: robot.detections)
    for _ in range(3):
        bridge.report()
    assert robot.logged.count((Level.OK, "running")) == 1


def test_paused_it_answers_nothing(start: Start, robot: Robot) -> None:
    bridge = start(names="cup")
    bridge.offer(message(1))
    until(lambda: robot.detections)
    bridge.pause(True)
    bridge.offer(message(2))
    time.sleep(0.4)
    assert robot.detections[-1][0].time == 1 and state(bridge) == (Level.OK, "paused")
    bridge.pause(False)
    bridge.offer(message(3))
    until(lambda: robot.detections[-1][0].time == 3)


def test_it_stops_at_once_while_it_waits(start: Start) -> None:
    bridge = start(wish="tea")
    began = time.monotonic()
    bridge.stop()
    assert time.monotonic() - began < 2
    assert not any(thread.is_alive() for thread in bridge._threads)


def test_asked_to_it_reasons_anew(start: Start, robot: Robot, reasoner: Reasoner) -> None:
    bridge = start(wish="tea")
    bridge.offer(message())
    until(lambda: robot.detections)
    bridge.reason_now()
    until(lambda: len(reasoner.asked) == 2)


def test_a_wish_for_a_bridge_without_a_reasoner_is_refused(start: Start) -> None:
    bridge = start(names="cup")
    with pytest.raises(InputError, match="no reasoner"):
        bridge.configure({"wish": "tea", "names": ""})
    assert bridge.configuration.settings.names == "cup"


# ------------------------------------------------------------------------------------------------------ parameters


def test_values_come_in_their_type_however_yaml_reads_them() -> None:
    now = Configuration.of({"rate": 5, "max_age": "2e1", "annotate": "false", "box_threshold": "0.3", "device": ""})
    assert (now.settings.rate, now.settings.max_age, now.settings.annotate) == (5.0, 20.0, False)
    assert now.options == {"box_threshold": 0.3}
    assert now.choice.device is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wihs": "tea"}, "unknown parameter wihs: the parameters are wish, "),
        ({"rate": -1}, "rate=-1.0"),
        ({"rate": "fast"}, "rate='fast' is no float"),
        ({"scene_threshold": 2}, "scene_threshold=2.0"),
        ({"image_transport": "theora"}, "choose raw or compressed"),
        ({"box_threshold": 7}, "box_threshold=7.0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"wish": "tea", "names": "cup"}, "both a wish"),
        ({"annotate": "maybe"}, "annotate='maybe' is no bool"),
    ],
)
def test_a_wrong_parameter_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Configuration.of(values)


def test_the_model_cannot_change_while_it_runs() -> None:
    with pytest.raises(InputError, match="start the bridge anew"):
        Configuration.of({}).changed({"model": "base"})


def test_every_setting_of_the_pipeline_is_a_parameter() -> None:
    assert {part.name for part in fields(Options)} < set(PARAMETERS)
    assert all(parameter.help for parameter in PARAMETERS.values())


def test_the_parameter_file_holds_every_setting_with_its_default() -> None:
    written = yaml.safe_load((REPOSITORY / "ros/config/detgpt.yaml").read_text())["/**"]["ros__parameters"]
    assert written == {p.name: p.default for p in PARAMETERS.values() if p.default is not None}


# ------------------------------------------------------------------------------------------------------------ rest


def test_a_name_keeps_its_number() -> None:
    labels = Labels()
    assert labels.add(["cup", "bottle"]) and not labels.add(["bottle"])
    assert [labels.number(name) for name in ("bottle", "cup", "soap")] == [1, 0, 2]


def test_the_core_imports_neither_ros_nor_a_model() -> None:
    code = (
        "import sys, detgpt_ros.live; print(*{'rospy', 'rclpy', 'rosbags', 'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY / "ros"
    )
    assert ran.stdout.strip() == ""


def test_without_ros_the_script_says_what_to_do(tmp_path: Path) -> None:
    script = REPOSITORY / "ros/detgpt_bridge.py"
    ran = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, env={"ROS_VERSION": "2"})
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: neither rclpy (ROS 2) nor rospy (ROS 1)") and "Traceback" not in ran.stderr
