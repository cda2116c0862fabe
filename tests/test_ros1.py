"""The ROS 1 bridge with a real roscore and real nodes: camera, user and listener are processes of their own.

Needs Debian's packages python3-rospy, python3-roslaunch, python3-sensor-msgs, python3-std-srvs and
python3-diagnostic-msgs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ros_processes import PYTHON, Process, System, python_path, until

REPOSITORY = Path(__file__).parents[1]
BRIDGE = str(REPOSITORY / "ros/detgpt_bridge.py")
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
CAMERA = "image:=/camera/image_raw"


def missing() -> str:
    """Why there is no ROS 1 here, "" where there is one that this Python can import."""
    if not (shutil.which("roscore") and (SYSTEM_PACKAGES / "rospy").is_dir()):
        return "no roscore: apt-get install python3-rospy python3-roslaunch python3-sensor-msgs …"
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True).stdout.split()[1]
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    return "" if version.startswith(f"{mine}.") else f"the system's rospy is for Python {version}, this is {mine}"


@pytest.fixture(scope="session", autouse=True)
def _ros1() -> None:
    why = missing()
    if why and os.environ.get("CI"):
        pytest.fail(why)
    if why:
        pytest.skip(why)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def ros(tmp_path: Path) -> Iterator[System]:
    # The system's packages come last, so that they never stand before those of this environment.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(SYSTEM_PACKAGES)!r})")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ROS_")},
        "PYTHONPATH": python_path(tmp_path),
        "ROS_MASTER_URI": f"http://127.0.0.1:{free_port()}",
        "ROS_IP": "127.0.0.1",
        "ROS_HOME": str(tmp_path / "home"),
        "FAILING": str(tmp_path / "failing"),
    }
    system = System(1, PYTHON, environment, tmp_path)
    try:
        yield system
    finally:
        system.finish()


def start_master(ros: System) -> Process:
    port = ros.environment["ROS_MASTER_URI"].rpartition(":")[2]
    for _ in range(5):
        master = ros.run("roscore", "-p", port)
        until(lambda: "started core service [/rosout]" in master.text or not master.is_running(), master)  # noqa: B023
        if master.is_running():
            return master  # on a busy machine it gives up on its own child after ten seconds
    raise AssertionError(f"roscore does not start: {master.text}")


def state(listener: Process) -> tuple[int, str]:
    reports = listener.messages("diagnostics")
    return (reports[-1]["level"], reports[-1]["message"]) if reports else (-1, "")


def names(listener: Process, index: int = -1) -> set[str]:
    """What the last detections hold, in words."""
    found, labels = listener.messages("detections"), listener.messages("labels")
    return {labels[-1]["names"][number] for number, *_ in found[index]["found"]} if found and labels else set()


def test_the_built_in_model_answers_a_camera_and_a_wish_that_changes(ros: System) -> None:
    start_master(ros)
    # As the documentation says: the launch file finds the package in the checkout, the script its Python on PATH.
    ros.environment["ROS_PACKAGE_PATH"] = str(REPOSITORY / "ros")
    ros.environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), ros.environment["PATH"]])
    bridge = ros.run("roslaunch", "detgpt_ros", "detgpt.launch", CAMERA, "wish:=I am thirsty")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    shown = (bridge, listener, camera)

    # Boxes carry the header of the very picture they were found in.
    until(lambda: names(listener) & {"coffee", "soda"}, *shown, seconds=200)
    answered = listener.messages("detections")
    sent = {message["stamp"] for message in camera.messages("sent")}
    assert {message["frame_id"] for message in answered} == {"lens_kitchen"}
    stamps = [message["stamp"] for message in answered]
    assert set(stamps) <= sent and stamps == sorted(stamps)
    assert all(0 < width <= 320 and 0 < height <= 240 for message in answered for _, width, height in message["found"])
    assert listener.messages("vision_info")[-1]["location"] == "/detgpt/labels"
    assert "Targets: [" in listener.messages("reasoning")[-1]["text"]
    picture = until(lambda: listener.messages("image_annotated"), *shown)[-1]
    assert picture["size"] == [320, 240] and picture["drawn"]

    # A new wish by topic; the parameter follows.
    before = len(listener.messages("reasoning"))
    ros.node("say", "my finger is bleeding")
    until(lambda: len(listener.messages("reasoning")) > before, *shown)
    until(lambda: parameter(ros, "/detgpt/wish") == "my finger is bleeding", *shown)

    # And by parameter; not reasoned about again while the scene stays.
    ros.run("rosparam", "set", "/detgpt/wish", "I want to sit down")
    until(lambda: "looking for: I want to sit down" in bridge.text, *shown)
    until(lambda: len(listener.messages("reasoning")) == before + 2, *shown)

    # It ends when asked to, and says goodbye to the master.
    assert bridge.stop(signal.SIGINT) == 0
    assert "Traceback" not in bridge.text
    assert "/detgpt" not in nodes(ros)


def test_latency_stays_bounded_while_the_model_is_slower_than_the_camera(ros: System) -> None:
    start_master(ros)
    bridge = ros.node("bridge", 0.5, CAMERA, "_names:=cup")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: len(listener.messages("detections")) >= 16, bridge, listener, camera)
    ages = [message["at"] - message["stamp"] * 1e-9 for message in listener.messages("detections")]
    # Queued, the last of 16 answers would be 16 * (0.5 - 0.1) = 6.4 s late.
    assert sorted(ages[-8:])[4] < 2.0, ages
    report = until(lambda: listener.messages("diagnostics"), listener)[-1]
    assert int(report["values"]["frames dropped"]) > 20 and report["name"] == "detgpt"


def test_camera_master_and_model_fail_and_come_back(ros: System) -> None:
    master = start_master(ros)
    bridge = ros.node("bridge", 0.05, CAMERA, "_wish:=tea", "_lost_after:=2")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: names(listener) == {"tea"} and state(listener) == (0, "running"), bridge, listener, camera)

    # The camera dies and another one comes.
    camera.stop(signal.SIGKILL)
    until(lambda: state(listener)[0] == 2 and "camera lost: no picture on /camera" in state(listener)[1], bridge)
    camera = ros.node("camera", "desk", 10)
    until(lambda: listener.messages("detections")[-1]["frame_id"] == "lens_desk", bridge, listener, camera)
    until(lambda: state(listener) == (0, "running"), bridge, listener)

    # The model fails for a while.
    failing = Path(ros.environment["FAILING"])
    failing.touch()
    until(lambda: state(listener) == (2, "detecting fails: RuntimeError: the GPU is gone"), bridge, listener)
    failing.unlink()
    until(lambda: state(listener) == (0, "running"), bridge, listener)

    # The master dies with camera and listener; new ones find the bridge, topics, services and all.
    for process in (camera, listener, master):
        process.stop(signal.SIGKILL)
    until(lambda: "the master does not answer" in bridge.text, bridge)
    start_master(ros)
    listener, camera = ros.listen(), ros.node("camera", "park", 10)
    until(
        lambda: [m for m in listener.messages("detections") if m["frame_id"] == "lens_park"], bridge, listener, camera
    )
    assert names(listener) == {"tea"}
    assert bridge.is_running() and bridge.text.count("registering anew") == 1

    # Services: pause, and reason anew.
    call = ros.node("call", "pause", "true")
    assert until(lambda: call.messages("service"), call)[0]["success"]
    until(lambda: state(listener) == (0, "paused"), bridge, listener)
    ros.node("call", "pause", "false")
    until(lambda: state(listener) == (0, "running"), bridge, listener)
    before = len(listener.messages("reasoning"))
    ros.node("call", "reason")
    until(lambda: len(listener.messages("reasoning")) > before, bridge, listener)
    assert bridge.stop(signal.SIGTERM) == 0


def test_a_simulated_clock_that_stands_still_stops_nothing(ros: System) -> None:
    start_master(ros)
    subprocess.run(["rosparam", "set", "/use_sim_time", "true"], env=ros.environment, check=True, timeout=60)
    bridge = ros.node("bridge", 0.05, CAMERA, "_wish:=tea")
    listener, camera = ros.listen(), ros.node("camera", "kitchen", 10)
    until(lambda: len(listener.messages("detections")) > 5, bridge, listener, camera)
    until(lambda: state(listener) == (0, "running"), bridge, listener)


@pytest.mark.parametrize(
    ("argument", "said"),
    [("_wihs:=tea", "unknown parameter wihs"), ("_rate:=fast", "rate='fast' is no float")],
)
def test_a_wrong_parameter_ends_it_with_one_line(ros: System, argument: str, said: str) -> None:
    start_master(ros)
    bridge = ros.run(PYTHON, BRIDGE, "ros1", CAMERA, argument)
    until(lambda: not bridge.is_running(), bridge)
    assert said in bridge.text and "Traceback" not in bridge.text
    assert bridge.stop() == 1


def parameter(ros: System, name: str) -> str:
    ran = subprocess.run(["rosparam", "get", name], env=ros.environment, capture_output=True, text=True, timeout=60)
    return ran.stdout.strip()


def nodes(ros: System) -> list[Any]:
    """The nodes that the master knows."""
    code = "import rosgraph; print(*(n for p in rosgraph.Master('/test').getSystemState() for _, ns in p for n in ns))"
    ran = subprocess.run([PYTHON, "-c", code], env=ros.environment, capture_output=True, text=True, timeout=60)
    return ran.stdout.split()
