#!/usr/bin/env python3
"""DetGPT on a robot: subscribes to a camera and a wish, publishes boxes and reasons. See docs/ros.md.

    detgpt_bridge.py ros2 --ros-args -r image:=/camera/image_raw -p wish:="I am thirsty"
    detgpt_bridge.py ros1 image:=/camera/image_raw _wish:="I am thirsty"
    detgpt_bridge.py bag drive.mcap answers --wish "I am thirsty"

Without the first word it is the ROS that this shell has been set up for.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

KINDS = ("ros1", "ros2", "bag")


def ros_here() -> str:
    """The ROS of this shell, "" where there is none. Its setup script sets ROS_VERSION."""
    libraries = {"1": "rospy", "2": "rclpy"}
    version = os.environ.get("ROS_VERSION", "")
    versions = [version] if version in libraries else ["2", "1"]
    return next((f"ros{version}" for version in versions if find_spec(libraries[version])), "")


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    kind = arguments.pop(0) if arguments[:1] and arguments[0] in KINDS else ros_here()
    if not kind:
        print(
            "error: neither rclpy (ROS 2) nor rospy (ROS 1) can be imported. Run your ROS's setup script first, such "
            "as `source /opt/ros/jazzy/setup.bash`; `detgpt_bridge.py bag` needs no ROS.",
            file=sys.stderr,
        )
        return 1
    try:
        if kind == "bag":
            from detgpt_ros import bag

            return bag.main(arguments)
        if kind == "ros1":
            from detgpt_ros import ros1

            return ros1.main(arguments)
        from detgpt_ros import ros2

        return ros2.main(arguments)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
