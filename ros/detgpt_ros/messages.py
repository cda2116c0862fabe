"""What the bridge publishes, as messages of ROS 1, ROS 2 or a bag: the same fields, made by each one's own classes.

`make("std_msgs/String", data="…")` comes from the adapter. ROS 1 and ROS 2 differ in `vision_msgs`: a ROS 2
hypothesis holds the name, a ROS 1 hypothesis a number, which `VisionInfo` and the topic `labels` explain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from PIL import Image

from detgpt.results import Detections


class Level(IntEnum):
    """How well it goes; the numbers are those of `diagnostic_msgs/DiagnosticStatus`."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Status:
    """How the bridge is: one line for people, and numbers."""

    level: Level
    message: str
    values: dict[str, str] = field(default_factory=dict)


class Labels:
    """Numbers for names, as ROS 1 wants them; a name keeps its number as long as the bridge runs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def add(self, names: Iterable[str]) -> bool:
        """Know these names; whether one was new."""
        before = len(self.names)
        for name in names:
            self.number(name)
        return len(self.names) > before


class Messages:
    """Messages from results. `make` builds one from its type's name and its fields."""

    def __init__(self, make: Callable[..., Any], *, ros1: bool) -> None:
        self._make = make
        self._ros1 = ros1
        self.labels = Labels()

    def detections(self, header: Any, result: Detections) -> Any:
        """A Detection2DArray; the header is the picture's."""
        make = self._make
        found = [
            make(
                "vision_msgs/Detection2D", header=header, results=[self._hypothesis(label, score)], bbox=self._box(box)
            )
            for box, score, label in result
        ]
        return make("vision_msgs/Detection2DArray", header=header, detections=found)

    def _hypothesis(self, label: str, score: float) -> Any:
        make = self._make
        upright = make("geometry_msgs/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0)
        nowhere = make("geometry_msgs/PoseWithCovariance", pose=make("geometry_msgs/Pose", orientation=upright))
        if self._ros1:
            what: dict[str, Any] = {"id": self.labels.number(label), "score": score}
        else:
            what = {"hypothesis": make("vision_msgs/ObjectHypothesis", class_id=label, score=score)}
        return make("vision_msgs/ObjectHypothesisWithPose", pose=nowhere, **what)

    def _box(self, xyxy: Any) -> Any:
        make = self._make
        x0, y0, x1, y1 = (float(edge) for edge in xyxy)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        if self._ros1:
            centre = make("geometry_msgs/Pose2D", x=x, y=y, theta=0.0)
        else:
            centre = make("vision_msgs/Pose2D", position=make("vision_msgs/Point2D", x=x, y=y), theta=0.0)
        return make("vision_msgs/BoundingBox2D", center=centre, size_x=x1 - x0, size_y=y1 - y0)

    def image(self, header: Any, picture: Image.Image) -> Any:
        return self._make(
            "sensor_msgs/Image",
            header=header,
            height=picture.height,
            width=picture.width,
            encoding="rgb8",
            is_bigendian=0,
            step=3 * picture.width,
            data=picture.tobytes(),
        )

    def annotated(self, header: Any, result: Detections) -> Any:
        return self.image(header, result.draw(min_side=0))  # never enlarged: the camera's calibration stays true

    def text(self, text: str) -> Any:
        return self._make("std_msgs/String", data=text)

    def label_texts(self, header: Any, location: str) -> tuple[Any, Any]:
        """For ROS 1: a VisionInfo that names `location`, and the JSON list of names to publish there."""
        info = self._make(
            "vision_msgs/VisionInfo",
            header=header,
            method="DetGPT",
            database_location=location,
            database_version=len(self.labels.names),
        )
        return info, self.text(json.dumps(self.labels.names, ensure_ascii=False))

    def diagnostics(self, header: Any, status: Status, name: str) -> Any:
        make = self._make
        level = int(status.level)
        values = [make("diagnostic_msgs/KeyValue", key=key, value=value) for key, value in status.values.items()]
        one = make(
            "diagnostic_msgs/DiagnosticStatus",
            level=level,
            name=name,
            message=status.message,
            hardware_id="detgpt",
            values=values,
        )
        return make("diagnostic_msgs/DiagnosticArray", header=header, status=[one])
