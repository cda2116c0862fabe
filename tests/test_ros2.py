"""The ROS 2 bridge with a real rclpy and real DDS: camera, user and listener are processes of their own.

Needs the ROS 2 that `make ros2` builds in build/ros2 out of Python 3.12; skipped without it, continuous integration
included.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ros_processes import Process, System, python_path, until

REPOSITORY = Path(__file__).parents[1]
PREFIX = REPOSITORY / "build/ros2"
CAMERA = ("--ros-args", "-r", "image:=/camera/image_raw")


@pytest.fixture(scope="session", autouse=True)
def _ros2() -> None:
    if not (PREFIX / ".ready").exists():
        pytest.skip("no ROS 2 in build/ros2: make ros2")


@pytest.fixture
def ros(tmp_path: Path) -> Iterator[System]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ROS_", "RMW_"))},
        "PYTHONPATH": python_path(),
        "AMENT_PREFIX_PATH": str(PREFIX),
        "LD_LIBRARY_PATH": str(PREFIX / "lib"),
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),  # nothing else on this machine hears it
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(tmp_path / "log"),
        "FAILING": str(tmp_path / "failing"),
    }
    system = System(2, PREFIX / "bin/python", environment, tmp_path)
    try:
        yield system
    finally:
        system.finish()


def state(listener: Process) -> tuple[int, str]:
    reports = listener.messages("diagnostics")
    return (reports[-1]["level"], reports[-1]["message"]) if reports else (-1, "")


def labels(listener: Process) -> set[str]:
    found = listener.messages("detections")
    return {label for label, *_ in found[-1]["found"]} if found else set()


def test_boxes_reasons_and_pictures_for_a_wish_that_changes(ros: System) -> None:
    bridge = ros.node("bridge", 0.05, *CAMERA, "-p", "wish:=tea", "-p", "rate:=5")  # an integer does for a number
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    shown = (bridge, listener, camera)
    until(lambda: labels(listener) == {"tea"}, *shown)
    answered = until(lambda: len(found := listener.messages("detections")) > 3 and found, *shown)
    sent = {message["stamp"] for message in camera.messages("sent")}
    assert {message["stamp"] for message in answered} <= sent
    assert {message["frame_id"] for message in answered} == {"lens_kitchen"}
    assert answered[-1]["found"] == [["tea", 320.0, 240.0]]
    picture = until(lambda: listener.messages("image_annotated"), *shown)[-1]
    assert picture["size"] == [320, 240] and picture["drawn"]
    until(lambda: state(listener) == (0, "running"), *shown)

    # By topic, and by parameter.
    ros.node("say", "soup")
    until(lambda: labels(listener) == {"soup"}, *shown)
    call = ros.node("set", "wish", '"cake"')
    assert until(lambda: call.messages("set"), call)[0]["success"]
    until(lambda: labels(listener) == {"cake"}, *shown)
    said = [message["text"].split("\n")[0] for message in listener.messages("reasoning")]
    assert said == ["You asked for tea.", "You asked for soup.", "You asked for cake."]

    # A wrong value is refused with the reason, and nothing changes.
    call = ros.node("set", "rate", "-3")
    (answer,) = until(lambda: call.messages("set"), call)
    assert not answer["success"] and "rate=-3.0" in answer["message"]

    # Pause and go on; end cleanly.
    call = ros.node("call", "pause", "true")
    assert until(lambda: call.messages("service"), call)[0]["success"]
    until(lambda: state(listener) == (0, "paused"), *shown)
    ros.node("call", "pause", "false")
    until(lambda: state(listener) == (0, "running"), *shown)
    assert bridge.stop(signal.SIGINT) == 0
    assert "Traceback" not in bridge.text


def test_latency_stays_bounded_while_the_model_is_slower_than_the_camera(ros: System) -> None:
    bridge = ros.node("bridge", 0.5, *CAMERA, "-p", "names:=cup")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: len(listener.messages("detections")) >= 16, bridge, listener, camera)
    ages = [message["at"] - message["stamp"] * 1e-9 for message in listener.messages("detections")]
    assert sorted(ages[-8:])[4] < 2.0, ages  # queued, the last of 16 would be 6.4 s late


def test_camera_and_model_fail_and_come_back(ros: System) -> None:
    bridge = ros.node("bridge", 0.05, *CAMERA, "-p", "wish:=tea", "-p", "lost_after:=2.0")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: state(listener) == (0, "running"), bridge, listener, camera)
    camera.stop(signal.SIGKILL)
    until(lambda: state(listener)[0] == 2 and "camera lost" in state(listener)[1], bridge, listener)
    camera = ros.node("camera", "desk", 10)
    until(lambda: listener.messages("detections")[-1]["frame_id"] == "lens_desk", bridge, listener, camera)
    failing = Path(ros.environment["FAILING"])
    failing.touch()
    until(lambda: state(listener) == (2, "detecting fails: RuntimeError: the GPU is gone"), bridge, listener)
    failing.unlink()
    until(lambda: state(listener) == (0, "running"), bridge, listener)
    assert bridge.stop(signal.SIGTERM) == 0


def test_a_simulated_clock_that_stands_still_stops_nothing(ros: System) -> None:
    bridge = ros.node("bridge", 0.05, *CAMERA, "-p", "wish:=tea", "-p", "use_sim_time:=true")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: len(listener.messages("detections")) > 5, bridge, listener, camera)
    until(lambda: state(listener) == (0, "running"), bridge, listener)


def test_the_parameter_file_is_read_and_a_wrong_value_ends_it_with_one_line(ros: System) -> None:
    file = REPOSITORY / "ros/config/detgpt.yaml"
    bridge = ros.node("bridge", 0.05, *CAMERA, "--params-file", file, "-p", "image_transport:=theora")
    until(lambda: not bridge.is_running(), bridge)
    assert "image_transport='theora' is unknown" in bridge.text and "Traceback" not in bridge.text
    assert bridge.stop() == 1


def test_the_message_types_are_those_that_bags_write(ros: System) -> None:
    """ROS's own generator and rosbags agree on the hash of every type."""
    from detgpt_ros import bag, definitions

    code = (
        "import sys, vision_msgs.msg as m;"
        "print(*[getattr(m, n).__class__._TYPE_SUPPORT is None and getattr(m, n).__class__.__import_type_support__()"
        " or n for n in sys.argv[1:]])"
    )
    names = [name.partition("/")[2] for name in definitions.ROS2]
    ran = subprocess.run(
        [ros.python, "-c", code, *names], env=ros.environment, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.split() == names, ran.stderr
    store = bag.typestore("jazzy")
    for name in names:
        described = (PREFIX / f"share/vision_msgs/msg/{name}.json").read_text()
        assert store.hash_rihs01(f"vision_msgs/msg/{name}") in described
