#!/usr/bin/env bash
# A real ROS 2 (Jazzy) for tests/test_ros2.py, from PyPI's wheels, into build/ros2: about two minutes, 300 MB.
#
#     bash tests/ros2_environment.sh
#
# The wheels (github.com/ycheng517/ros-python-wheels) are for Python 3.12 and hold no vision_msgs, which is therefore
# built here from the definitions in detgpt_ros by ROS's own generators. Needs cmake and a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=$PWD/build/ros2
[ -e "$prefix/.ready" ] && [ "$prefix/.ready" -nt "$0" ] && exit 0

python=""
for candidate in "${PYTHON312:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
  if "$candidate" -c 'import venv' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || { echo "error: no Python 3.12: install it, or say where it is with PYTHON312=" >&2; exit 1; }

rm -rf "$prefix"
"$python" -m venv "$prefix"
"$prefix/bin/pip" install -qq --disable-pip-version-check pillow typer rich \
  ros-jazzy-{rclpy,rmw-fastrtps-cpp,sensor-msgs,diagnostic-msgs,geometry-msgs,std-srvs} \
  ros-jazzy-{rosidl-default-generators,rosidl-core-generators,python-cmake-module} catkin-pkg \
  ros-jazzy-ament-{package,cmake,cmake-ros,cmake-libraries,cmake-include-directories,cmake-gmock,cmake-gtest,cmake-pytest}

# The wheels remember where Python's and NumPy's headers were on the machine that built them.
headers=$("$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
grep -rl --include='*.cmake' /opt/python/cp312-cp312 "$prefix/share" |
  xargs sed -i "s|/opt/python/cp312-cp312/include/python3.12|$headers|g; s|/opt/python/cp312-cp312|$prefix|g"

source=$prefix/src/vision_msgs
mkdir -p "$source"
PYTHONPATH=ros "$prefix/bin/python" - "$source" <<'PYTHON'
import sys
from pathlib import Path

from detgpt_ros import definitions

folder = Path(sys.argv[1])
files = []
for name, text in definitions.ROS2.items():
    path = folder / "msg" / f"{name.partition('/')[2]}.msg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    files.append(f"msg/{path.name}")
(folder / "package.xml").write_text("""<package format="3">
  <name>vision_msgs</name><version>4.1.1</version><description>vision_msgs</description>
  <maintainer email="detgpt@example.org">The DetGPT authors</maintainer><license>Apache-2.0</license>
  <buildtool_depend>ament_cmake</buildtool_depend><buildtool_depend>rosidl_default_generators</buildtool_depend>
  <depend>std_msgs</depend><depend>geometry_msgs</depend><exec_depend>rosidl_default_runtime</exec_depend>
  <member_of_group>rosidl_interface_packages</member_of_group>
  <export><build_type>ament_cmake</build_type></export>
</package>""")
(folder / "CMakeLists.txt").write_text(f"""cmake_minimum_required(VERSION 3.8)
project(vision_msgs)
find_package(ament_cmake REQUIRED)
find_package(rosidl_default_generators REQUIRED)
find_package(std_msgs REQUIRED)
find_package(geometry_msgs REQUIRED)
rosidl_generate_interfaces(${{PROJECT_NAME}} {" ".join(files)} DEPENDENCIES std_msgs geometry_msgs)
ament_package()
""")
PYTHON

export AMENT_PREFIX_PATH=$prefix PATH=$prefix/bin:$PATH
log=$prefix/build.log
{ cmake -S "$source" -B "$source/build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_INSTALL_PREFIX="$prefix" \
    -DPython3_EXECUTABLE="$prefix/bin/python" -DBUILD_TESTING=OFF &&
  cmake --build "$source/build" --target install --parallel 2; } > "$log" 2>&1 || { tail -30 "$log" >&2; exit 1; }
rm -rf "$prefix/src"
touch "$prefix/.ready"
