"""What one visitor has asked about one picture; every step gives a new value.

The detector is asked once for every box above a low floor, overlapping ones included, before any calibration. What is
shown is chosen from these by the thresholds, so that a slider moves boxes without running a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from detgpt.calibration import Calibration
from detgpt.detectors import Grounding
from detgpt.pipeline import DetGPT, Options, tidy
from detgpt.reasoners import Turn
from detgpt.results import Detections, less_sure

FLOOR = 0.05  # boxes that score less are not kept


@dataclass(frozen=True)
class Conversation:
    """A picture, the wishes so far, and everything that was found for the last one.

    source: the picture's name in the Python call. model: the name of the pair that answers.
    found: all boxes above the floor, with raw scores; `calibration` is that of the model that found them. See `shown`.
    """

    picture: Image.Image
    source: str
    model: str
    turns: tuple[Turn, ...] = ()
    found: Detections | None = None
    calibration: Calibration = field(default_factory=Calibration)

    def ask(self, model: DetGPT, wish: str) -> Iterator[str | Conversation]:
        """The reasoning as it is written, then the conversation with this turn."""
        for event in model.uncalibrated().stream(self.picture, wish, history=self.turns, **_everything(model)):
            if isinstance(event, Detections):
                turns = (*self.turns, Turn(wish, event.answer))
                yield replace(self, turns=turns, found=event, calibration=model.calibration)
            else:
                yield event

    def look_for(self, model: DetGPT, names: Sequence[str]) -> Conversation:
        """Names instead of a wish: no reasoning, and no turn to remember."""
        found = model.uncalibrated().detect(self.picture, names=names, **_everything(model))
        return replace(self, found=found, calibration=model.calibration)

    def anew(self, model: str | None = None) -> Conversation:
        """The same picture, nothing said."""
        return replace(self, model=model or self.model, turns=(), found=None)

    def shown(self, options: Options) -> Detections | None:
        """What `detect` with these options gives, without a model; None before the first answer.

        Suppression goes down the scores and looks only at better boxes, so it may come before or after the
        score threshold.
        """
        if self.found is None:
            return None
        named = [
            replace(t, confidence=self.calibration.of_target(t.confidence), found=False) for t in self.found.targets
        ]
        unsure = less_sure(named, options.min_confidence)
        sure = [target for target in named if target not in unsure]
        names = [target.name for target in sure]
        chosen = self.found.filter(min_score=options.box_threshold, labels=names)
        index = np.array([names.index(label) for label in chosen.labels], dtype=np.int64)
        kept = tidy(Grounding(chosen.boxes, chosen.scores, index), options)
        labels = tuple(names[i] for i in kept.name_index)
        return replace(
            chosen,
            boxes=kept.boxes,
            scores=self.calibration.of_boxes(kept.scores),
            labels=labels,
            targets=tuple(replace(target, found=target.name in labels) for target in sure),
            unsure=unsure,
        )

    def python(self, changed: dict[str, Any]) -> str:
        """The Python call that gives what is shown; `changed` are the options that differ from the model's own."""
        if self.found is None:
            return ""
        picture, *wishes = (_literal(text) for text in (self.source, *(turn.instruction for turn in self.turns)))
        settings = [f"{name}={value!r}" for name, value in changed.items()]
        choice = [] if self.model == "picto" else [f"model={_literal(self.model)}"]
        if self.found.instruction is None:
            asked = f"names={json.dumps([target.name for target in self.found.targets], ensure_ascii=False)}"
            calls = [f"result = detgpt.detect({', '.join([picture, asked, *choice, *settings])})"]
        elif len(wishes) == 1:
            calls = [f"result = detgpt.detect({', '.join([picture, wishes[0], *choice, *settings])})"]
        else:
            calls = [
                f"model = detgpt.DetGPT.from_pretrained({_literal(self.model)})",
                f"chat = model.chat({', '.join([picture, *settings])})",
                *(f"chat.ask({wish})" for wish in wishes[:-1]),
                f"result = chat.ask({wishes[-1]})",
            ]
        return "\n".join(["import detgpt", "", *calls])


def floor(options: Options) -> float:
    """The least score of a box that is kept, given a model's own options."""
    return min(FLOOR, options.box_threshold)


def _everything(model: DetGPT) -> dict[str, Any]:
    # No masks: they would be those of boxes that are mostly not shown.
    lenient = {"box_threshold": floor(model.options), "min_confidence": 0.0, "nms_threshold": 1.0, "share_boxes": True}
    return {**lenient, "masks": False}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a Python string too
