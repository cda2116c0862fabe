"""For colcon: `colcon build --packages-select detgpt_ros`, then `ros2 launch detgpt_ros detgpt.launch.py`."""

from setuptools import setup

PACKAGE = "detgpt_ros"

setup(
    name=PACKAGE,
    version="0.1.0",
    packages=[PACKAGE],
    py_modules=["detgpt_bridge"],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", ["launch/detgpt.launch.py"]),
        (f"share/{PACKAGE}/config", ["config/detgpt.yaml"]),
    ],
    install_requires=["detgpt"],
    zip_safe=True,
    entry_points={"console_scripts": ["detgpt_bridge = detgpt_bridge:main"]},
)
