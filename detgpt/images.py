"""Any image input becomes one RGB `PIL.Image`, under limits.

`load_image` takes a path, an http(s) or data: URL, bytes, a binary file, a PIL image, a NumPy array or a
torch tensor. Whatever cannot become a faithful picture raises `ImageError`.

Left out on purpose: PostScript and metafiles (Pillow starts other programs for them), and colour management by
ICC profiles.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from detgpt.download import MAX_SECONDS, download, over_limit, quoted, shown_url
from detgpt.errors import ImageError

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_BYTES", "MAX_PIXELS", "PICTURE_SUFFIXES", "ImageSource", "image_key", "load_image"]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor"

MAX_PIXELS = 64_000_000  # width x height; only the product counts, so 20,000 x 100 is fine
MAX_BYTES = 32 * 2**20  # of a download, a data: URL, or a stream that cannot seek

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "MPO")


def image_key(image: Image.Image) -> str:
    """The same for images of the same size and pixels, whatever object or file they came from, and for no others."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    allow_private_urls: bool = False,
) -> Image.Image:
    """Read any image input as a new RGB picture, upright and without transparency.

    Args:
        source: one of
            - a path (str or path-like), an `http:`/`https:` URL, or a base64 `data:image/...` URL;
            - bytes of an image file, or a binary file open for reading;
            - a PIL image of any mode;
            - a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4);
            - a torch tensor (H, W), (C, H, W) or (H, W, C) with C in 1, 3, 4, on any device; (C, H, W) where
              both readings fit.
            Arrays and tensors hold RGB, not OpenCV's BGR (`bgr[..., ::-1]` converts), as uint8 in 0..255 or
            as floats in [0, 1].
        max_pixels: largest width x height, checked before pixels are decoded.
        max_bytes: largest download, data: URL or unseekable stream, in bytes.
        max_seconds: longest download in seconds, redirects included.
        allow_private_urls: also fetch from private, loopback and other non-public addresses, for a camera on
            the robot's own network. Leave it off where strangers choose the URL.

    Returns:
        A new `PIL.Image.Image` in mode RGB that shares no memory with `source`. EXIF orientation is applied
        and the EXIF dropped, transparency lies on white, an animation gives its first frame, 16-bit values
        are scaled from 0..65535.

    Raises:
        ImageError: the input is of no supported kind, cannot be read or fetched, or is over a limit.
    """
    if isinstance(source, Image.Image):
        with _decoding("the PIL image", max_pixels):
            return _to_rgb(source, "the PIL image", max_pixels)
    if isinstance(source, np.ndarray):
        return _array_to_image(source, "the array", max_pixels)
    if hasattr(source, "detach") and hasattr(source, "is_floating_point"):  # a torch tensor, without torch
        return _array_to_image(_tensor_to_array(source), "the tensor", max_pixels)

    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), "the image bytes", max_pixels)
    if isinstance(source, str) and re.match(r"data:", source, re.IGNORECASE):
        return _decode(io.BytesIO(_data_url_bytes(source, max_bytes)), "the data: URL", max_pixels)
    if isinstance(source, str) and re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        body = download(source, max_bytes, max_seconds, allow_private_urls)
        return _decode(io.BytesIO(body), shown_url(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        with _open_file(Path(source)) as file:
            return _decode(file, quoted(source), max_pixels)
    if hasattr(source, "read"):
        with _decoding("the image file object", max_pixels):
            return _decode(_seekable(source, max_bytes), "the image file object", max_pixels)
    raise ImageError(
        f"cannot read an image from {type(source).__name__}. "
        "Pass a path, URL, bytes, binary file, PIL image, NumPy array or torch tensor."
    )


# -------------------------------------------------------------------------------------------- files and bytes


def _open_file(path: Path) -> BinaryIO:
    name = quoted(path)
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a directory. Pass the path of one image file.")
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise ImageError(f"{name} is not a regular file. Pass an image file, or an open binary stream.")
        return path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist. Check the path, seen from {Path.cwd()}.") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be opened: {error}. Check the path and its permissions.") from error


def _seekable(stream: Any, max_bytes: int) -> BinaryIO:
    """The stream itself, at its start; where it cannot seek, a copy of up to `max_bytes` of it."""
    try:
        seekable = stream.seekable()
    except AttributeError:
        seekable = False
    if seekable:
        stream.seek(0)
        return stream
    chunks, size = [], 0
    while size <= max_bytes and (chunk := stream.read(2**16)):
        _require_bytes(chunk)
        chunks.append(chunk)
        size += len(chunk)
    if size > max_bytes:
        raise over_limit("the image stream", max_bytes)
    return io.BytesIO(b"".join(chunks))


def _require_bytes(chunk: object) -> None:
    if not isinstance(chunk, bytes):
        kind = type(chunk).__name__
        raise ImageError(f"the image file object gives {kind}, not bytes. Open the file with mode 'rb'.")


def _data_url_bytes(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[^,]+;base64", header, re.IGNORECASE):
        raise ImageError(f"the data: URL starts {header[:60]!r}. Write it as data:image/png;base64,<data>.")
    try:
        body = base64.b64decode(b"".join(unquote_to_bytes(payload).split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"the data: URL holds damaged base64: {error}. Encode the image again.") from error
    if len(body) > max_bytes:
        raise over_limit("the data: URL", max_bytes)
    return body


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Decode a file that stands at its start and can seek."""
    with _decoding(name, max_pixels):
        head = file.read(512)
        _require_bytes(head)
        file.seek(0)
        if _HEIF.match(head):
            _register_heif()
        Image.init()
        try:
            picture = Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
        except UnidentifiedImageError:
            raise ImageError(f"{name} {_what_it_is(head)}") from None
        with picture:
            return _to_rgb(picture, name, max_pixels)


# What Pillow's decoders raise on damaged files.
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    OverflowError, RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


@contextlib.contextmanager
def _decoding(name: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever reading and decoding raise into `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limits = f"the limit of {max_pixels} pixels, or Pillow's own (PIL.Image.MAX_IMAGE_PIXELS)"
        raise ImageError(f"{name} is over {limits}. Scale it down.") from None
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged, cut short or closed: {error}. Get it anew.") from error


_HEIF = re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL)


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _what_it_is(head: bytes) -> str:
    """Name what a file that is no readable image starts with, and what to do about it."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty (0 bytes). Save or download the image again."
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "is an unreadable AVIF image. Convert it to JPEG or PNG, or `pip install 'pillow>=11.3'`."
    if _HEIF.match(head) and "HEIF" not in Image.OPEN:
        return "is a HEIC/HEIF image. Convert it to JPEG or PNG, or `pip install pillow-heif`."
    if b"<svg" in start:
        return "is an SVG drawing. Export it as PNG."
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image. Pass the address of the picture itself."
    if start.startswith(b"%pdf"):
        return "is a PDF. Export the page as PNG."
    if not re.search(rb"[\x00-\x08\x0e-\x1a]", head):
        return "is text, not an image. Pass a JPEG, PNG, WebP, GIF, BMP or TIFF file."
    return "is not an image in a supported format, or its start is damaged. Convert it to JPEG or PNG."


# ---------------------------------------------------------------------------------------------- pixels to RGB

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(*image.size, name, max_pixels)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))  # after load, which turns a TIFF by itself
    rgb = _flatten(image, name, max_pixels)
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # the EXIF in it would turn the picture once more when it is loaded again
    return rgb


def _flatten(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.mode == "F":
        return _array_to_image(np.asarray(image), name, max_pixels)
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what Pillow makes of 16-bit PGM
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} holds values outside 16 bits. Scale it to 8 bits per channel.")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # damaged EXIF says nothing about an otherwise good picture
        return 1


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height == 0:
        raise ImageError(f"{name} is empty ({width} x {height}). Pass an image of at least 1 x 1 pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width} x {height} = {width * height} pixels, over the limit of {max_pixels}. "
            "Scale it down, or raise max_pixels."
        )


def _tensor_to_array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    array = tensor.numpy()
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return array.transpose(1, 2, 0)
    return array


def _array_to_image(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    name = f"{name} of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"{name} is not one image. Pass one (H, W), (H, W, 3) or (H, W, 4).")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (np.isfinite(low) and np.isfinite(high)):  # min and max pass NaN on
            raise ImageError(f"{name} holds NaN or infinity. Replace them, for example with nan_to_num.")
        if low < -1e-3 or high > 1 + 1e-3:  # resampling overshoots a little
            raise ImageError(
                f"{name} holds {low:g}..{high:g}. Undo any normalisation and scale floats to [0, 1], "
                "or pass uint8 in 0..255."
            )
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{name} is of the wrong dtype. Pass uint8 in 0..255 or floats in [0, 1].")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name, max_pixels)
