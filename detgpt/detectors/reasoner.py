"""A multimodal model's own boxes: Qwen-VL, InternVL and others answer in text where a thing is.

    DetGPT(reasoner="Qwen/Qwen3-VL-4B-Instruct", detector="reasoner")

One model then both names and boxes, without a detector beside it. What the numbers in its text mean differs from family
to family: `CONVENTIONS` is the one place that says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from detgpt.answer import visible
from detgpt.boxes import concatenate, within_image
from detgpt.detectors import Grounding
from detgpt.detectors.spans import check_query
from detgpt.errors import InputError, ModelError
from detgpt.reasoners import RawAnswer, Reasoner, Request

COORDINATES = {
    "thousandths": "0 to 1000 across the image, whatever its size",
    "resized": "pixels of the image as the model's processor resizes it",
    "original": "pixels of the image itself",
}
# Family (model_type in config.json; a served model is recognised by its name) → what its coordinates are.
CONVENTIONS = {
    "qwen2_vl": "thousandths",  # github.com/QwenLM/Qwen3-VL/issues/866, an answer of its maintainers
    "qwen2_5_vl": "resized",  # github.com/QwenLM/Qwen3-VL/issues/676, 866 and 947
    "qwen3_vl": "thousandths",  # github.com/QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb; its thread 1486
    "qwen3_5": "thousandths",  # github.com/QwenLM/Qwen3.8-Flash-Next/issues/4
    "internvl": "thousandths",  # internvl.readthedocs.io, chat data format; github.com/OpenGVLab/InternVL/issues/1009
}
PROMPT = """Locate every instance that belongs to the following categories: {names}. Report bbox coordinates in JSON \
format, for example [{{"bbox_2d": [x0, y0, x1, y1], "label": {first}}}], or [] if there is none."""


class ReasonerDetector:
    """Boxes from the text of `reasoner`; safe to call from several threads, as the reasoner is.

    coordinates: what its numbers mean, a key of `COORDINATES`; unless given, by the model's family in `CONVENTIONS`.
    max_new_tokens: the longest answer to one question; boxes complete by then count. A box takes about 30 tokens.
    max_questions_per_pass: bounds memory; so many questions go to the reasoner together.

    A box's score is the geometric mean of the probabilities of the tokens that wrote its four numbers.

    Raises `InputError` for a family whose convention is unknown or a wrong argument.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        *,
        coordinates: str | None = None,
        max_new_tokens: int = 1024,
        max_questions_per_pass: int = 8,
    ) -> None:
        self.name = reasoner.name
        self.coordinates = coordinates or _convention(getattr(reasoner, "family", reasoner.name))
        if self.coordinates not in COORDINATES:
            raise InputError(f"coordinates must be one of {', '.join(COORDINATES)}, not {coordinates!r}")
        if max_questions_per_pass < 1:
            raise InputError(f"max_questions_per_pass must be at least 1, not {max_questions_per_pass}")
        self._reasoner: Any = reasoner
        self._max_new_tokens = max_new_tokens
        self._max_questions = max_questions_per_pass

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        """Look for `names[i]` in `images[i]`; one `Grounding` per image, boxes in that image's pixels.

        `prompting="separate"` asks for each name by itself, `"joint"` for all names of an image in one answer.
        `text_threshold` has no meaning here. Boxes whose label is no name that was asked for, without area, or outside
        the image are left out.
        Raises `InputError` for a wrong argument, `ModelError` for a reasoner without token probabilities.
        """
        check_query(images, names, box_threshold, text_threshold, prompting)
        questions = [(i, asked) for i, every in enumerate(names) for asked in _questions(every, prompting)]
        requests = [Request(images[i], _prompt([name for _, name in asked]), verbatim=True) for i, asked in questions]
        parts: list[list[Grounding]] = [[] for _ in images]
        for (i, asked), answer in zip(questions, self._answers(requests), strict=True):
            parts[i].append(self._ground(answer, images[i], asked, box_threshold))
        return [concatenate(part) for part in parts]

    def _answers(self, requests: list[Request]) -> Iterator[RawAnswer]:
        for start in range(0, len(requests), self._max_questions):
            some = requests[start : start + self._max_questions]
            yield from self._reasoner.reason(some, max_new_tokens=self._max_new_tokens)

    def _ground(
        self, answer: RawAnswer, image: Image.Image, asked: list[tuple[int, str]], box_threshold: float
    ) -> Grounding:
        """The boxes of one answer that carry a name of `asked` and reach the threshold."""
        if answer.tokens is None and answer.text:
            raise ModelError(
                f"{self.name!r} gives no token probabilities, so its boxes would have no scores: "
                "use a server that returns logprobs, load the model here, or take another detector"
            )
        index: dict[str | None, int] = {_normal(name): i for i, name in reversed(asked)}
        if len(asked) == 1:
            index[None] = asked[0][0]  # a box without a label can only be the one thing that was asked for
        kept = [
            (box.xyxy, score, index[_normal(box.label)])
            for box in read_boxes(answer.text)
            if _normal(box.label) in index and (score := _score(answer, box.span)) >= box_threshold
        ]
        if not kept:
            return concatenate([])
        boxes, scores, name_index = zip(*kept, strict=True)
        to_pixels = np.tile(np.divide(image.size, self._frame(image)), 2)
        grounding = Grounding(
            (np.array(boxes) * to_pixels).astype(np.float32),
            np.array(scores, np.float32),
            np.array(name_index, np.int64),
        )
        return within_image(grounding, image.size)

    def _frame(self, image: Image.Image) -> tuple[int, int]:
        """Width and height that the model's numbers count in."""
        if self.coordinates == "thousandths":
            return 1000, 1000
        return image.size if self.coordinates == "original" else self._reasoner.input_size(image)


def _convention(family: str) -> str:
    squeezed = re.sub(r"[^a-z0-9]", "", family.lower())  # "Qwen/Qwen2.5-VL-7B" and "qwen2.5vl:7b" hold "qwen25vl"
    for known, coordinates in CONVENTIONS.items():
        if known.replace("_", "") in squeezed:
            return coordinates
    raise InputError(
        f"it is unknown what the coordinates of {family!r} mean: take a model of {', '.join(CONVENTIONS)}, "
        f"or give ReasonerDetector(reasoner, coordinates=…), one of {', '.join(COORDINATES)}"
    )


def _questions(names: Sequence[str], prompting: str) -> list[list[tuple[int, str]]]:
    """Names, with their indices, that are asked for together."""
    numbered = list(enumerate(names))
    return [[one] for one in numbered] if prompting == "separate" or not numbered else [numbered]


def _prompt(names: Sequence[str]) -> str:
    if not all(name.strip() for name in names):
        raise InputError(f"names={list(names)!r} holds an empty one: give at least one word for each")
    quoted = [json.dumps(name, ensure_ascii=False) for name in names]
    return PROMPT.format(names=", ".join(quoted), first=quoted[0])


def _score(answer: RawAnswer, span: tuple[int, int]) -> float:
    start, end = span
    logprobs = [token.logprob for token in answer.tokens or () if token.start < end and start < token.end]
    return math.exp(sum(logprobs) / len(logprobs))


def _normal(name: str | None) -> str | None:
    return name if name is None else " ".join(name.split()).casefold()


# --- what the answer holds ---


@dataclass(frozen=True)
class WrittenBox:
    """Four numbers as a model wrote them at the characters `span`; label None: it wrote none beside them."""

    xyxy: tuple[float, float, float, float]
    label: str | None
    span: tuple[int, int]


# Every repetition is bounded, so no text makes the search backtrack far.
_NUMBER = r"\s{0,9}([-+]?\d{1,7}(?:\.\d{0,9})?)\s{0,9}"
_STRING = r"\s{0,9}(?:\"((?:[^\"\\\n]|\\.){0,300})\"|'((?:[^'\\\n]|\\.|'(?=\w)){0,300})')"
_MARKS = re.compile(
    rf"(?P<open>\{{)|(?P<close>\}})|[\[(]{','.join([_NUMBER] * 4)}[\])]"
    rf"|[\"'](?:label|name|object|category)[\"']\s{{0,9}}:{_STRING}|<ref>(?P<ref>[^<]{{0,300}})</ref>"
)


def read_boxes(text: str) -> list[WrittenBox]:
    """All boxes that `text` holds, in order: JSON objects with a box and a label, `<ref>…</ref><box>…</box>`, or lists.

    Reads what follows a thought in <think>. Never raises; linear in the length of `text`.
    """
    return list(_boxes(text))


def _boxes(text: str) -> Iterator[WrittenBox]:
    begin, end, _ = visible(text)
    label: str | None = None
    waiting: list[re.Match[str]] = []  # the boxes of the object at hand, whose label may come last

    def written() -> Iterator[WrittenBox]:
        for box in waiting:
            xyxy = float(box[3]), float(box[4]), float(box[5]), float(box[6])
            yield WrittenBox(xyxy, label, (box.start(3), box.end(6)))
        waiting.clear()

    for mark in _MARKS.finditer(text, begin, end):
        if mark["open"] or mark["close"] or mark["ref"] is not None:
            yield from written()
            label = mark["ref"]
        elif mark[3] is not None:
            waiting.append(mark)
        else:
            label = _unescaped(mark[7] if mark[7] is not None else mark[8])
    yield from written()


def _unescaped(raw: str) -> str:
    try:
        return str(json.loads(f'"{raw}"', strict=False))
    except ValueError:  # not JSON: the backslashes are the model's own
        return raw
