"""Start the bridge after `colcon build`:

ros2 launch detgpt_ros detgpt.launch.py image:=/camera/image_raw wish:="I am thirsty"
"""

from __future__ import annotations

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription

ARGUMENTS = {
    "image": ("image", "topic of the camera; with image_transport=compressed, /compressed is added"),
    "wish": ("", "what you need, in words"),
    "names": ("", "instead of a wish, things to look for: cup,bottle"),
    "model": ("picto", "picto (pictograms only), small, base or large"),
    "image_transport": ("raw", "raw or compressed"),
    "use_sim_time": ("false", "take the time from /clock"),
    "params_file": (
        PathJoinSubstitution([FindPackageShare("detgpt_ros"), "config", "detgpt.yaml"]),
        "everything else; see that file",
    ),
}


def generate_launch_description() -> LaunchDescription:
    chosen = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    texts = {
        name: ParameterValue(chosen[name], value_type=str) for name in ("wish", "names", "model", "image_transport")
    }
    bridge = Node(
        package="detgpt_ros",
        executable="detgpt_bridge",
        name="detgpt",
        arguments=["ros2"],
        output="screen",
        emulate_tty=True,
        remappings=[("image", chosen["image"])],
        parameters=[
            chosen["params_file"],
            {**texts, "use_sim_time": ParameterValue(chosen["use_sim_time"], value_type=bool)},
        ],
    )
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, bridge])
