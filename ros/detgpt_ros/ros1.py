"""The bridge as a ROS 1 node.

    python ros/detgpt_bridge.py ros1 image:=/camera/image_raw _wish:="I am thirsty"

Needs `rospy`, `sensor_msgs`, `std_srvs` and `diagnostic_msgs`; without `vision_msgs` its messages are generated from
`definitions.py`. rospy itself does not notice a restarted master; this node does, and registers anew.
"""

from __future__ import annotations

import functools
import importlib
import time
from typing import Any

import rosgraph
import rospy
from diagnostic_msgs.msg import DiagnosticArray
from genpy.dynamic import generate_dynamic
from rospy.impl.registration import (
    Registration,
    get_registration_listeners,
    get_service_manager,
    get_topic_manager,
)
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header, String
from std_srvs.srv import SetBool, SetBoolResponse, Trigger, TriggerResponse

from detgpt.errors import InputError
from detgpt.results import Detections
from detgpt_ros import definitions
from detgpt_ros.live import Bridge
from detgpt_ros.lookout import Frame
from detgpt_ros.messages import Level, Messages, Status
from detgpt_ros.settings import Configuration

BUFFER = 2**26  # bytes; smaller than one picture, rospy's default of 64 KiB would let old ones pile up
LOST = (ConnectionError, OSError, rosgraph.MasterException)


@functools.cache
def message_class(name: str) -> Any:
    """The class of "vision_msgs/Detection2D"; from our definitions where that package is not installed."""
    package, _, kind = name.partition("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), kind)
    except ImportError:
        if name not in definitions.ROS1:
            raise
        return _generated()[name]


@functools.cache
def _generated() -> dict[str, Any]:
    """All of `definitions.ROS1`, generated together so that they hold one another's classes."""
    parts = {**definitions.ROS1}
    for known in ("std_msgs/Header", "sensor_msgs/Image", "geometry_msgs/Pose2D", "geometry_msgs/PoseWithCovariance"):
        text, *others = message_class(known)._full_text.split("\n" + "=" * 80 + "\n")
        parts[known] = text
        parts.update((other.split("\n", 1)[0].removeprefix("MSG: "), other.split("\n", 1)[1]) for other in others)
    first = "vision_msgs/Detection2DArray"
    separator = "\n" + "=" * 80 + "\n"
    rest = (f"MSG: {name}\n{text}" for name, text in parts.items() if name != first)
    return generate_dynamic(first, separator.join([parts[first], *rest]))


def make(name: str, /, **fields: Any) -> Any:
    return message_class(name)(**fields)


class Node:
    """Topics, services and parameters around a `Bridge`."""

    def __init__(self, load: Any = None) -> None:
        configuration = Configuration.of(_own_parameters())
        self._seen = configuration.values()
        self._messages = Messages(make, ros1=True)
        self._detections = rospy.Publisher("~detections", message_class("vision_msgs/Detection2DArray"), queue_size=1)
        self._annotated = rospy.Publisher("~image_annotated", Image, queue_size=1)
        self._reasoning = rospy.Publisher("~reasoning", String, queue_size=10, latch=True)
        self._labels = rospy.Publisher("~labels", String, queue_size=1, latch=True)
        self._info = rospy.Publisher("~vision_info", message_class("vision_msgs/VisionInfo"), queue_size=1, latch=True)
        self._diagnostics = rospy.Publisher("/diagnostics", DiagnosticArray, queue_size=1)
        compressed = configuration.settings.image_transport == "compressed"
        topic = rospy.resolve_name("image") + ("/compressed" if compressed else "")
        self.bridge = Bridge(self, configuration, load, camera=topic)
        self.bridge.start()
        kind = CompressedImage if compressed else Image
        rospy.Subscriber(topic, kind, self.bridge.offer, queue_size=1, buff_size=BUFFER)
        rospy.Subscriber("~wish", String, lambda message: self._set({"wish": message.data, "names": ""}))
        rospy.Service("~pause", SetBool, self._pause)
        rospy.Service("~reason", Trigger, self._reason)

    # -------------------------------------------------------------------------------------------------- the host

    def now(self) -> float:
        return rospy.get_time()

    def publish_detections(self, frame: Frame, result: Detections) -> None:
        if self._messages.labels.add(target.name for target in result.targets):
            location = rospy.resolve_name("~labels")
            info, labels = self._messages.label_texts(Header(stamp=rospy.Time.now()), location)
            self._info.publish(info)
            self._labels.publish(labels)
        self._detections.publish(self._messages.detections(frame.header, result))
        if self.bridge.configuration.settings.annotate and self._annotated.get_num_connections():
            self._annotated.publish(self._messages.annotated(frame.header, result))

    def publish_reasoning(self, frame: Frame, result: Detections) -> None:
        self._reasoning.publish(self._messages.text(result.answer))

    def publish_status(self, status: Status) -> None:
        header = Header(stamp=rospy.Time.now())
        self._diagnostics.publish(self._messages.diagnostics(header, status, rospy.get_name().strip("/")))

    def log(self, level: Level, text: str) -> None:
        {Level.OK: rospy.loginfo, Level.WARN: rospy.logwarn, Level.ERROR: rospy.logerr}[level]("%s", text)

    # --------------------------------------------------------------------------------------- callbacks and upkeep

    def _set(self, values: dict[str, Any]) -> None:
        try:
            self.bridge.configure(values)
        except InputError as error:
            rospy.logerr("%s", error)
            return
        self._seen.update(values)
        try:
            for name, value in values.items():  # so that `rosparam get` tells the truth
                rospy.set_param(f"~{name}", value)
        except LOST as error:
            rospy.logwarn("the wish is taken, but the master does not store it: %s", error)

    def _pause(self, request: Any) -> Any:
        self.bridge.pause(request.data)
        return SetBoolResponse(success=True, message="paused" if request.data else "running")

    def _reason(self, request: Any) -> Any:
        self.bridge.reason_now()
        return TriggerResponse(success=True, message="reasoning at the next picture")

    def upkeep(self) -> None:
        """Follow `rosparam set`, and register anew with a master that was restarted."""
        if not _is_known_to_master():
            rospy.logwarn("the master was restarted: registering anew")
            _register_anew()
        changes = {name: value for name, value in _own_parameters().items() if value != self._seen.get(name)}
        self._seen.update(changes)
        if changes:
            self._set(changes)


def _own_parameters() -> dict[str, Any]:
    found = rospy.get_param(rospy.get_name(), {})
    return found if isinstance(found, dict) else {}


def _is_known_to_master() -> bool:
    """Whether the master knows our topics; the node's name it also knows after a mere log message of ours."""
    publishers, _, _ = rosgraph.Master(rospy.get_name()).getSystemState()
    return rospy.get_name() in dict(publishers).get(rospy.resolve_name("~detections"), [])


def _register_anew() -> None:
    """Tell the master all topics and services of this process, those of rospy itself included."""
    listeners = get_registration_listeners()
    for kind, known in (
        (Registration.PUB, get_topic_manager().get_publications()),
        (Registration.SUB, get_topic_manager().get_subscriptions()),
        (Registration.SRV, get_service_manager().get_services()),
    ):
        for name, type_or_uri in known:
            listeners.notify_added(name, type_or_uri, kind)


def main(arguments: list[str], load: Any = None) -> int:
    while not rosgraph.is_master_online():
        print(f"waiting for the ROS master at {rosgraph.get_master_uri()}: start roscore", flush=True)
        time.sleep(2)
    rospy.init_node("detgpt", argv=["detgpt", *arguments])
    try:
        node = Node(load)
    except InputError as error:
        rospy.logfatal("%s", error)
        return 1
    rospy.on_shutdown(node.bridge.stop)
    reachable = True
    while not rospy.is_shutdown():
        time.sleep(1)  # rospy's own sleep follows a simulated clock, which may stand still
        try:
            node.upkeep()
            reachable = True
        except LOST as error:
            if reachable and not rospy.is_shutdown():
                rospy.logwarn("the master does not answer (%s): going on without it", error)
            reachable = False
    return 0
