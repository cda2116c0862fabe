"""The segmenter protocol: boxes in, the pixels of the thing in each box out. Imports no model code.

A backend is one file of this folder whose class has a `name` and a `segment`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class Segmenter(Protocol):
    """The outline of what stands in each box."""

    name: str

    def segment(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) xyxy in pixels of the image → masks (N, H, W) bool at its size, one per box, in order."""
        ...


class LazySegmenter:
    """The segmenter of a hub id or folder, loaded at its first picture: most wishes are for boxes alone."""

    def __init__(self, name: str, **loading: Any) -> None:
        self.name = name
        self._loading = loading
        self._lock = threading.Lock()
        self._loaded: Segmenter | None = None

    def load(self) -> Segmenter:
        """Load it now, if it is not yet. Raises `ModelError` where that fails."""
        with self._lock:
            if self._loaded is None:
                from detgpt.segmenters.sam2 import Sam2Segmenter

                self._loaded = Sam2Segmenter(self.name, **self._loading)
            return self._loaded

    def segment(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        return self.load().segment(image, boxes)
