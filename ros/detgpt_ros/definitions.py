"""The `vision_msgs` that the bridge publishes, for where that package is not installed: recorded bags, Debian's ROS 1.

Field by field as the package defines them, so that type hashes and bytes are the same: ROS 1 as in Noetic (0.0.x),
ROS 2 as in Humble and later (4.x).
"""

from __future__ import annotations

ROS1 = {
    "vision_msgs/BoundingBox2D": "geometry_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n",
    "vision_msgs/ObjectHypothesisWithPose": "int64 id\nfloat64 score\ngeometry_msgs/PoseWithCovariance pose\n",
    "vision_msgs/Detection2D": (
        "Header header\nObjectHypothesisWithPose[] results\nBoundingBox2D bbox\nsensor_msgs/Image source_img\n"
    ),
    "vision_msgs/Detection2DArray": "Header header\nDetection2D[] detections\n",
    "vision_msgs/VisionInfo": "Header header\nstring method\nstring database_location\nint32 database_version\n",
}

ROS2 = {
    "vision_msgs/Point2D": "float64 x\nfloat64 y\n",
    "vision_msgs/Pose2D": "vision_msgs/Point2D position\nfloat64 theta\n",
    "vision_msgs/BoundingBox2D": "vision_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n",
    "vision_msgs/ObjectHypothesis": "string class_id\nfloat64 score\n",
    "vision_msgs/ObjectHypothesisWithPose": "ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose\n",
    "vision_msgs/Detection2D": (
        "std_msgs/Header header\nObjectHypothesisWithPose[] results\nBoundingBox2D bbox\nstring id\n"
    ),
    "vision_msgs/Detection2DArray": "std_msgs/Header header\nDetection2D[] detections\n",
}
