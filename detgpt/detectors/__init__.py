"""The detector protocol: names in, scored boxes out. Imports no model code.

A backend is one file of this folder whose class has a `name` and a `detect`. It thresholds and says which
name each box belongs to; suppressing duplicates is left to `detgpt.boxes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Grounding:
    """What a detector found for the names it was asked about, in one image.

    `boxes` (N, 4) float32 xyxy in pixels of the given image, `scores` (N,) float32 in [0, 1],
    `name_index` (N,) int64 into the names asked. Order: descending score, ties by name index.
    """

    boxes: np.ndarray
    scores: np.ndarray
    name_index: np.ndarray


class Detector(Protocol):
    """Open-vocabulary detection of names in images."""

    name: str

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        """Return one `Grounding` per image; `names[i]` are the names to look for in `images[i]`.

        `prompting="separate"`: what else is asked does not change a name's boxes; "joint": it may.

        Raises `InputError` for thresholds outside [0, 1] or an unknown `prompting`, and, before any work on the
        images, `UnreadableNameError` for a name that it cannot read, such as an empty one.
        """
        ...
