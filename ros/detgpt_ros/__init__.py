"""The ROS bridge of DetGPT: pictures in, boxes and reasons out, for ROS 1, ROS 2 and recorded bags.

`python ros/detgpt_bridge.py` starts it. Read in this order: `lookout.py` (when to reason, when to detect),
`live.py` (threads, dropped frames, failures), `messages.py` (what is published), then the adapters `ros1.py`,
`ros2.py` and `bag.py`. Only the adapters import ROS.
"""
