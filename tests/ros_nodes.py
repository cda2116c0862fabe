"""Nodes for the tests of the ROS bridge, each a process of its own, as on a robot. Run by test_ros1 and test_ros2.

python tests/ros_nodes.py 1 camera kitchen 10     publish an example 10 times a second, seen by "lens_kitchen"
python tests/ros_nodes.py 1 listen                print every message of the bridge as one line of JSON
python tests/ros_nodes.py 1 say "a wish"          publish the wish once somebody listens
python tests/ros_nodes.py 1 call pause true       call a service of the bridge
python tests/ros_nodes.py 1 bridge 0.5 ...        the bridge with a model that needs 0.5 s and knows no picture
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures

EXAMPLES = Path(__file__).parents[1] / "examples"
FAILING = Path(os.environ.get("FAILING", "/nonexistent"))  # while this file is there, the model of `bridge` fails


def example(name: str) -> Pictures.Image:
    with Pictures.open(EXAMPLES / f"{name}.png") as image:
        return image.convert("RGB").resize((320, 240))


def is_drawn_on(message: Any) -> bool:
    return bytes(message.data) != UNTOUCHED[message.header.frame_id]


def tell(topic: str, **what: Any) -> None:
    line = json.dumps({"topic": topic, "at": time.time(), **what}) + "\n"
    os.write(1, line.encode())  # in one go: callbacks of several threads speak


UNTOUCHED = {f"lens_{name}": example(name).tobytes() for name in ("kitchen", "desk", "park")}


def image_fields(name: str) -> dict[str, Any]:
    """As a camera sends them: blue first, rows padded."""
    image = example(name)
    rows = np.pad(np.asarray(image)[:, :, ::-1].reshape(image.height, -1), ((0, 0), (0, 8)))
    return {
        "encoding": "bgr8",
        "width": image.width,
        "height": image.height,
        "step": rows.shape[1],
        "data": rows.tobytes(),
    }


def slow_model(seconds: float) -> Any:
    """A model that finds what the wish says in all of the picture, after so many seconds."""
    from detgpt import DetGPT
    from detgpt.detectors import Grounding
    from detgpt.reasoners.scripted import ScriptedReasoner

    class Slow:
        name = "slow"

        def detect(self, images: Any, names: Any, **options: Any) -> list[Any]:
            time.sleep(seconds)
            if FAILING.exists():
                raise RuntimeError("the GPU is gone")
            return [
                Grounding(
                    np.array([[0, 0, *image.size]] * len(asked), np.float32).reshape(-1, 4),
                    np.ones(len(asked), np.float32),
                    np.arange(len(asked)),
                )
                for image, asked in zip(images, names, strict=True)
            ]

    def answer(request: Any) -> str:
        return f'You asked for {request.instruction}.\nTargets: ["{request.instruction}"]'

    return DetGPT(ScriptedReasoner(answer), Slow())


# ---------------------------------------------------------------------------------------------------------- ROS 1


def camera1(name: str, rate: str) -> None:
    import rospy
    from sensor_msgs.msg import Image
    from std_msgs.msg import Header

    rospy.init_node("camera", anonymous=True)
    publisher = rospy.Publisher("/camera/image_raw", Image, queue_size=1)
    fields = image_fields(name)
    while not rospy.is_shutdown():
        now = rospy.Time.now()
        tell("sent", stamp=now.to_nsec())
        publisher.publish(Image(header=Header(stamp=now, frame_id=f"lens_{name}"), **fields))
        time.sleep(1 / float(rate))


def listen1() -> None:
    import rospy
    from diagnostic_msgs.msg import DiagnosticArray
    from sensor_msgs.msg import Image
    from std_msgs.msg import String

    from detgpt_ros.ros1 import message_class

    def stamped(header: Any) -> dict[str, Any]:
        return {"stamp": header.stamp.to_nsec(), "frame_id": header.frame_id}

    def detections(message: Any) -> None:
        found = [(one.results[0].id, one.bbox.size_x, one.bbox.size_y) for one in message.detections]
        tell("detections", **stamped(message.header), found=found)

    def diagnostics(message: Any) -> None:
        for status in message.status:
            tell("diagnostics", level=status.level, message=status.message, name=status.name,
                 values={pair.key: pair.value for pair in status.values})  # fmt: skip

    def annotated(message: Any) -> None:
        size = message.width, message.height
        tell("image_annotated", **stamped(message.header), size=size, drawn=is_drawn_on(message))

    rospy.init_node("listener", anonymous=True)
    rospy.Subscriber("/detgpt/detections", message_class("vision_msgs/Detection2DArray"), detections)
    rospy.Subscriber("/detgpt/vision_info", message_class("vision_msgs/VisionInfo"),
                     lambda m: tell("vision_info", location=m.database_location))  # fmt: skip
    rospy.Subscriber("/detgpt/labels", String, lambda m: tell("labels", names=json.loads(m.data)))
    rospy.Subscriber("/detgpt/reasoning", String, lambda m: tell("reasoning", text=m.data))
    rospy.Subscriber("/detgpt/image_annotated", Image, annotated, queue_size=1, buff_size=2**24)
    rospy.Subscriber("/diagnostics", DiagnosticArray, diagnostics)
    tell("listening")
    while not rospy.is_shutdown():
        time.sleep(0.1)


def say1(wish: str) -> None:
    import rospy
    from std_msgs.msg import String

    rospy.init_node("user", anonymous=True)
    publisher = rospy.Publisher("/detgpt/wish", String, queue_size=1)
    while not publisher.get_num_connections():
        time.sleep(0.05)
    publisher.publish(wish)
    time.sleep(0.5)


def call1(service: str, value: str = "") -> None:
    import rospy
    from std_srvs.srv import SetBool, Trigger

    rospy.init_node("user", anonymous=True)
    rospy.wait_for_service(f"/detgpt/{service}", 20)
    kind = SetBool if value else Trigger
    answer = rospy.ServiceProxy(f"/detgpt/{service}", kind)(*([value == "true"] if value else []))
    tell("service", success=answer.success, message=answer.message)


def bridge1(seconds: str, *arguments: str) -> None:
    from detgpt_ros import ros1

    sys.exit(ros1.main(list(arguments), load=lambda: slow_model(float(seconds))))


# ---------------------------------------------------------------------------------------------------------- ROS 2


def camera2(name: str, rate: str) -> None:
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image

    rclpy.init()
    node = rclpy.create_node(f"camera_{os.getpid()}")
    publisher = node.create_publisher(Image, "/camera/image_raw", qos_profile_sensor_data)
    message = Image()
    for field, value in image_fields(name).items():
        setattr(message, field, array("B", value) if field == "data" else value)
    message.header.frame_id = f"lens_{name}"
    while rclpy.ok():
        now = node.get_clock().now()
        tell("sent", stamp=now.nanoseconds)
        message.header.stamp = now.to_msg()
        publisher.publish(message)
        time.sleep(1 / float(rate))


def listen2() -> None:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from sensor_msgs.msg import Image
    from std_msgs.msg import String
    from vision_msgs.msg import Detection2DArray

    def stamped(header: Any) -> dict[str, Any]:
        return {"stamp": header.stamp.sec * 10**9 + header.stamp.nanosec, "frame_id": header.frame_id}

    def detections(message: Any) -> None:
        found = [(one.results[0].hypothesis.class_id, one.bbox.size_x, one.bbox.size_y) for one in message.detections]
        tell("detections", **stamped(message.header), found=found)

    def diagnostics(message: Any) -> None:
        for status in message.status:
            tell("diagnostics", level=status.level[0], message=status.message, name=status.name,
                 values={pair.key: pair.value for pair in status.values})  # fmt: skip

    def annotated(message: Any) -> None:
        size = message.width, message.height
        tell("image_annotated", **stamped(message.header), size=size, drawn=is_drawn_on(message))

    rclpy.init()
    node = rclpy.create_node(f"listener_{os.getpid()}")
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    node.create_subscription(Detection2DArray, "/detgpt/detections", detections, 10)
    node.create_subscription(String, "/detgpt/reasoning", lambda m: tell("reasoning", text=m.data), latched)
    node.create_subscription(Image, "/detgpt/image_annotated", annotated, 1)
    node.create_subscription(DiagnosticArray, "/diagnostics", diagnostics, 10)
    tell("listening")
    rclpy.spin(node)


def say2(wish: str) -> None:
    import rclpy
    from std_msgs.msg import String

    rclpy.init()
    node = rclpy.create_node(f"user_{os.getpid()}")
    publisher = node.create_publisher(String, "/detgpt/wish", 1)
    while not publisher.get_subscription_count():
        time.sleep(0.05)
    publisher.publish(String(data=wish))
    time.sleep(0.5)


def call2(service: str, value: str = "") -> None:
    import rclpy
    from std_srvs.srv import SetBool, Trigger

    rclpy.init()
    node = rclpy.create_node(f"user_{os.getpid()}")
    kind = SetBool if value else Trigger
    client = node.create_client(kind, f"/detgpt/{service}")
    assert client.wait_for_service(20)
    answer = client.call_async(kind.Request(**({"data": value == "true"} if value else {})))
    rclpy.spin_until_future_complete(node, answer, timeout_sec=20)
    tell("service", success=answer.result().success, message=answer.result().message)


def set2(name: str, value: str) -> None:
    """Set a parameter of the bridge from outside, as `ros2 param set` does."""
    import rclpy
    from rclpy.parameter import Parameter
    from rclpy.parameter_client import AsyncParameterClient

    rclpy.init()
    node = rclpy.create_node(f"user_{os.getpid()}")
    client = AsyncParameterClient(node, "/detgpt")
    assert client.wait_for_services(20)
    answer = client.set_parameters([Parameter(name, value=json.loads(value))])
    rclpy.spin_until_future_complete(node, answer, timeout_sec=20)
    result = answer.result().results[0]
    tell("set", success=result.successful, message=result.reason)


def bridge2(seconds: str, *arguments: str) -> None:
    from detgpt_ros import ros2

    sys.exit(ros2.main(list(arguments), load=lambda: slow_model(float(seconds))))


if __name__ == "__main__":
    version, what, *rest = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        globals()[f"{what}{version}"](*rest)
