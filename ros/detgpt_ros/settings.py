"""What may be set, once for ROS 1 parameters, ROS 2 parameters and the flags of the bag tool.

The parameters are the fields of three dataclasses: `Settings` (the bridge), `Choice` (which models) and `Options`
(how they answer). The models are chosen at the start; everything else may change while the bridge runs.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from detgpt.answer import ParsedAnswer
from detgpt.cli import Choice
from detgpt.errors import InputError
from detgpt.pipeline import DetGPT, Options

TRANSPORTS = ("raw", "compressed")


@dataclass(frozen=True)
class Settings:
    """How the bridge behaves.

    wish: what you need, in words; without wish and names the bridge waits for one.
    names: look for these things without reasoning, as in cup,bottle; instead of a wish.
    rate: most frames answered per second; 0 is as many as the models manage.
    scene_threshold: reason anew when some part of the picture has changed by more than this, in [0, 1].
    max_age: reason anew after this many seconds, even in a still scene; 0 is never.
    reason_interval: least seconds between two reasonings, unless the wish is new.
    lost_after: after this many seconds without a frame the camera counts as lost.
    image_transport: raw (sensor_msgs/Image) or compressed (sensor_msgs/CompressedImage).
    annotate: draw and publish the picture with boxes.
    """

    wish: str = ""
    names: str = ""
    rate: float = 0.0
    scene_threshold: float = 0.1
    max_age: float = 60.0
    reason_interval: float = 2.0
    lost_after: float = 5.0
    image_transport: str = "raw"
    annotate: bool = True

    def __post_init__(self) -> None:
        if self.wish.strip() and self.names.strip():
            raise InputError(f"both a wish ({self.wish!r}) and names ({self.names!r}) are set: empty one of the two")
        for name in ("rate", "max_age", "reason_interval", "lost_after"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value!r} is no time or rate: give 0 or more")
        if not 0 <= self.scene_threshold <= 1:
            raise InputError(f"scene_threshold={self.scene_threshold!r} is outside [0, 1]: give a fraction such as 0.1")
        if self.image_transport not in TRANSPORTS:
            raise InputError(f"image_transport={self.image_transport!r} is unknown: choose raw or compressed")
        if self.names.strip():
            ParsedAnswer.of_names(self.fixed_names)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.names.split(",") if name.strip())

    @property
    def order(self) -> tuple[str, tuple[str, ...]]:
        """What is asked for; when it differs, what was found before says nothing any more."""
        return self.wish.strip(), self.fixed_names


@dataclass(frozen=True)
class Parameter:
    """One thing that may be set. default None: unset, so that the model's own value stays."""

    name: str
    kind: type
    default: Any
    help: str
    group: str


def _parameters(kind: type, group: str, *, unset: bool = False, leave_out: tuple[str, ...] = ()) -> list[Parameter]:
    described = dict(re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE))
    types = get_type_hints(kind)
    return [
        Parameter(
            name=part.name,
            kind=next((t for t in get_args(types[part.name]) if t is not type(None)), types[part.name]),
            default=None if unset else part.default,
            help=" ".join(described[part.name].split()),
            group=group,
        )
        for part in fields(kind)
        if part.name not in leave_out
    ]


PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        *_parameters(Settings, "bridge"),
        *_parameters(Choice, "models", leave_out=("debug",)),
        *_parameters(Options, "options", unset=True),
    )
}


@dataclass(frozen=True)
class Configuration:
    """Everything that is set. `options` holds only what was set, the rest is the model's own."""

    settings: Settings = field(default_factory=Settings)
    options: Mapping[str, Any] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Configuration:
        """From parameters by name; None is unset. Raises `InputError` for a wrong or unknown one."""
        if unknown := sorted(set(values) - set(PARAMETERS)):
            raise InputError(f"unknown parameter {', '.join(unknown)}: the parameters are {', '.join(PARAMETERS)}")
        groups: dict[str, dict[str, Any]] = {"bridge": {}, "models": {}, "options": {}}
        for name, value in values.items():
            parameter = PARAMETERS[name]
            known = _coerced(parameter, value)
            if known is not None:
                groups[parameter.group][name] = known
        Options().updated(groups["options"])  # raises where one is out of range
        return cls(Settings(**groups["bridge"]), groups["options"], Choice(**groups["models"]))

    def changed(self, values: Mapping[str, Any]) -> Configuration:
        """These with `values`. Raises `InputError`, also for what is fixed at the start."""
        now = Configuration.of({**self.values(), **values})
        if (now.choice, now.settings.image_transport) != (self.choice, self.settings.image_transport):
            fixed = ", ".join(sorted(values))
            raise InputError(f"{fixed}: models and image_transport are chosen at the start; start the bridge anew")
        return now

    def values(self) -> dict[str, Any]:
        parts = (self.settings, self.choice)
        known = {part.name: getattr(source, part.name) for source in parts for part in fields(source)}
        return {name: value for name, value in {**known, **self.options}.items() if name in PARAMETERS}

    @property
    def reasons(self) -> bool:
        """Whether a reasoner is needed; names alone need none."""
        return not self.settings.fixed_names

    def load(self) -> DetGPT:
        return self.choice.load({}, reasons=self.reasons)


def _coerced(parameter: Parameter, value: Any) -> Any:
    """The value in its type, however YAML or a command line read it; None where it is unset."""
    if value is None or (value == "" and parameter.default is None):
        return None
    try:
        if parameter.kind is bool and isinstance(value, str):
            return {"true": True, "false": False, "1": True, "0": False}[value.strip().lower()]
        if parameter.kind is int and float(value) != int(value):
            raise ValueError
        return parameter.kind(value)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{parameter.name}={value!r} is no {parameter.kind.__name__}: {parameter.help}") from None
