"""A ROS image message → an RGB picture, and back. Works on any class that has the fields of the message.

Depth, Bayer and YUV images are refused: the bridge looks at colour or grey pictures of 8 bits.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

from detgpt.errors import ImageError
from detgpt.images import load_image

# Bytes per pixel, and which of them are red, green and blue.
_CHANNELS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),  # what a camera writes into alpha means nothing: it is left out
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}


def picture(message: Any) -> Image.Image:
    """The picture in a `sensor_msgs` Image or CompressedImage. Raises `ImageError`."""
    return raw_picture(message) if hasattr(message, "encoding") else compressed_picture(message)


def raw_picture(message: Any) -> Image.Image:
    """From `encoding`, `width`, `height`, `step` (bytes from row to row, padding included) and `data`."""
    encoding, width, height, step = message.encoding, message.width, message.height, message.step
    if encoding not in _CHANNELS:
        raise ImageError(f"the image has the encoding {encoding!r}. {_remedy(encoding)}")
    channels, rgb = _CHANNELS[encoding]
    data = np.frombuffer(message.data, np.uint8)
    if width * height == 0:
        raise ImageError(f"the image is empty ({width} x {height}). Check the camera's driver.")
    if step < width * channels or len(data) < step * height:
        raise ImageError(
            f"the image says {width} x {height} {encoding} with {step} bytes a row, but holds {len(data)} bytes. "
            "Check the camera's driver."
        )
    rows = data[: step * height].reshape(height, step)[:, : width * channels]
    return load_image(rows.reshape(height, width, channels)[:, :, rgb])


def compressed_picture(message: Any) -> Image.Image:
    """From `data`, a JPEG or PNG file, and `format`, such as "jpeg" or "bgr8; jpeg compressed bgr8"."""
    named = str(message.format).split(";")
    if "compressedDepth" in message.format or re.match(r"(8|16|32|64)[USF]C?\d*$", named[0].strip()):
        raise ImageError(f"the compressed image has the format {message.format!r}. {_remedy('16UC1')}")
    return load_image(bytes(message.data))


def _remedy(encoding: str) -> str:
    known = ", ".join(_CHANNELS)
    if re.match(r"(16|32|64)[USF]|mono16", encoding):
        return f"That is depth or 16-bit data, not a colour picture: subscribe to the colour image ({known})."
    if encoding.startswith("bayer"):
        return f"Subscribe to the image after image_proc's debayering ({known})."
    return f"Let the driver or image_proc publish one of {known}."
