"""The bridge as a ROS 2 node.

    python ros/detgpt_bridge.py ros2 --ros-args -r image:=/camera/image_raw -p wish:="I am thirsty"

Needs `rclpy`, `sensor_msgs`, `std_srvs`, `diagnostic_msgs` and `vision_msgs` (4.x: Humble and later).
"""

from __future__ import annotations

import importlib
from array import array
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node as RclpyNode
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header, String
from std_srvs.srv import SetBool, Trigger
from vision_msgs.msg import Detection2DArray

from detgpt.errors import InputError
from detgpt.results import Detections
from detgpt_ros.live import Bridge
from detgpt_ros.lookout import Frame
from detgpt_ros.messages import Level, Messages, Status
from detgpt_ros.settings import PARAMETERS, Configuration

# As rclpy's profile for sensor data, but of depth 1: an older picture is worth nothing.
NEWEST_PICTURE = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def make(name: str, /, **fields: Any) -> Any:
    """A message by name; bytes become the array that rclpy takes without looking at every single one."""
    package, _, kind = name.partition("/")
    if kind == "DiagnosticStatus":
        fields["level"] = bytes([fields["level"]])  # a ROS 2 byte is one of Python's bytes
    given = {
        field: array("B", value) if field == "data" and kind == "Image" else value for field, value in fields.items()
    }
    return getattr(importlib.import_module(f"{package}.msg"), kind)(**given)


class Node(RclpyNode):
    """Topics, services and parameters around a `Bridge`."""

    def __init__(self, load: Any = None) -> None:
        super().__init__("detgpt")
        for parameter in PARAMETERS.values():
            # Dynamic, so that an unset one stays unset and `-p rate:=5` is as good as 5.0; `Configuration` checks.
            described = ParameterDescriptor(description=parameter.help, dynamic_typing=True)
            self.declare_parameter(parameter.name, parameter.default, described)
        configuration = Configuration.of({name: self.get_parameter(name).value for name in PARAMETERS})
        self._messages = Messages(make, ros1=False)
        self._detections = self.create_publisher(Detection2DArray, "~/detections", 5)
        self._annotated = self.create_publisher(Image, "~/image_annotated", 1)
        self._reasoning = self.create_publisher(String, "~/reasoning", LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        compressed = configuration.settings.image_transport == "compressed"
        topic = self.resolve_topic_name("image") + ("/compressed" if compressed else "")
        self.bridge = Bridge(self, configuration, load, camera=topic)
        self.bridge.start()
        kind = CompressedImage if compressed else Image
        self.create_subscription(kind, topic, self.bridge.offer, NEWEST_PICTURE)
        self.create_subscription(String, "~/wish", self._on_wish, 5)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/reason", self._on_reason)
        self.add_on_set_parameters_callback(self._on_parameters)

    # -------------------------------------------------------------------------------------------------- the host

    def now(self) -> float:
        return self.get_clock().now().nanoseconds * 1e-9

    def publish_detections(self, frame: Frame, result: Detections) -> None:
        self._detections.publish(self._messages.detections(frame.header, result))
        if self.bridge.configuration.settings.annotate and self._annotated.get_subscription_count():
            self._annotated.publish(self._messages.annotated(frame.header, result))

    def publish_reasoning(self, frame: Frame, result: Detections) -> None:
        self._reasoning.publish(self._messages.text(result.answer))

    def publish_status(self, status: Status) -> None:
        header = Header(stamp=self.get_clock().now().to_msg())
        self._diagnostics.publish(self._messages.diagnostics(header, status, self.get_name()))

    def log(self, level: Level, text: str) -> None:
        logger = self.get_logger()
        # One call per level and line: rclpy refuses a call that changes its level.
        if level is Level.OK:
            logger.info(text)
        elif level is Level.WARN:
            logger.warning(text)
        else:
            logger.error(text)

    # ------------------------------------------------------------------------------------------------- callbacks

    def _on_wish(self, message: Any) -> None:
        chosen = {"wish": message.data, "names": ""}
        outcome = self.set_parameters_atomically([Parameter(name, value=value) for name, value in chosen.items()])
        if not outcome.successful:
            self.get_logger().error(outcome.reason)

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        changes = {parameter.name: parameter.value for parameter in parameters if parameter.name in PARAMETERS}
        try:
            self.bridge.configure(changes)
        except InputError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _on_pause(self, request: Any, response: Any) -> Any:
        self.bridge.pause(request.data)
        response.success, response.message = True, "paused" if request.data else "running"
        return response

    def _on_reason(self, request: Any, response: Any) -> Any:
        self.bridge.reason_now()
        response.success, response.message = True, "reasoning at the next picture"
        return response


def main(arguments: list[str], load: Any = None) -> int:
    rclpy.init(args=["detgpt", *arguments])
    try:
        node = Node(load)
    except InputError as error:
        rclpy.logging.get_logger("detgpt").fatal(str(error))
        rclpy.try_shutdown()
        return 1
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # the two ways in which a node is asked to end
    finally:
        node.bridge.stop()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0
