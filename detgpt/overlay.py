"""Masks on a picture: a translucent fill with a firm edge, so that the thing below can still be seen."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

FILL, EDGE = 105, 235  # alpha


def tint(canvas: Image.Image, mask: np.ndarray, colour: str, factor: int = 1, edge: int = 2) -> None:
    """Lay `colour` over the pixels of `mask` (H, W) bool; `canvas` is `factor` times as large as the mask.

    edge: width of the edge, in pixels of the canvas. A mask that the picture cuts off has no edge there.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # Room around it for the edge, and within the picture, whose border is none.
    top, bottom = max(0, rows[0] - edge), min(mask.shape[0], rows[-1] + 1 + edge)
    left, right = max(0, columns[0] - edge), min(mask.shape[1], columns[-1] + 1 + edge)
    part = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    if factor > 1:
        smooth = part.resize((part.width * factor, part.height * factor), Image.Resampling.BICUBIC)
        part = smooth.point(lambda value: 255 * (value > 127))
    # The mean around a pixel is 255 only where the mask is all around it.
    inner = part.filter(ImageFilter.BoxBlur(edge)).point(lambda value: 255 * (value == 255))
    alpha = part.point(lambda value: value * EDGE // 255)
    alpha.paste(FILL, mask=inner)
    canvas.paste(colour, (left * factor, top * factor), alpha)
