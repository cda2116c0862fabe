"""Masks: which pixels of a picture belong to each thing, as arrays (N, H, W) bool and as run lengths.

Run lengths are COCO's uncompressed form, which needs no library to read or write:
`{"size": [height, width], "counts": [...]}`, the lengths of the runs of equal pixels down the columns, one column
after the other; the first run is of pixels outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from detgpt.errors import InputError

MAX_BYTES = 2**31  # of the masks of one picture, a byte a pixel


def check_room(count: int, image_wh: tuple[int, int]) -> None:
    """Raise `InputError` where `count` masks of a picture of this size would not fit into `MAX_BYTES`."""
    width, height = image_wh
    if count * width * height > MAX_BYTES:
        raise InputError(
            f"{count} masks of {width} x {height} pixels are over the limit of {MAX_BYTES} bytes: "
            "raise box_threshold, or give a smaller image"
        )


def read_only_masks(masks: Any, count: int, image_wh: tuple[int, int]) -> np.ndarray:
    """(count, H, W) bool, read-only; a copy unless it was read-only before, for masks are large.

    Raises `InputError` for another shape or type.
    """
    array = np.asarray(masks)
    wanted = (count, image_wh[1], image_wh[0])
    if array.dtype != bool or array.shape != wanted:
        raise InputError(f"masks must be bool of shape {wanted}, (N, height, width); got {array.dtype} {array.shape}")
    if array.flags.writeable:
        array = array.copy()
        array.setflags(write=False)
    return array


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask (H, W) bool as run lengths."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = np.concatenate([[0], changes, [pixels.size]])
    counts = np.diff(starts).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def rle_to_mask(rle: Mapping[str, Any], image_wh: tuple[int, int]) -> np.ndarray:
    """The inverse, (H, W) bool. Raises `InputError` where the runs are none, or not of a picture of this size."""
    width, height = image_wh
    try:
        size, counts = tuple(rle["size"]), np.array(rle["counts"], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"not the run lengths of a mask ({error}): they need 'size' and a list of 'counts'") from error
    if size != (height, width) or counts.ndim != 1 or (counts < 0).any() or sum(counts.tolist()) != height * width:
        raise InputError(f"the run lengths of a mask must cover {width} x {height} pixels, those of its image")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape((height, width), order="F")
