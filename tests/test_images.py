"""Every kind of image input gives the right picture, or an error that names the input and the way out."""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detgpt.download import _is_public
from detgpt.errors import DetGPTError, ImageError, InputError, MissingExtraError
from detgpt.images import MAX_PIXELS, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(width: int = 64, height: int = 32) -> Image.Image:
    """Red, green on top; blue, white below: no two of its eight orientations look the same."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def assert_same(image: Image.Image, expected: Image.Image) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def assert_alike(image: Image.Image, expected: Image.Image) -> None:
    """The same but for what a lossy format smears along the edges."""
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).mean() < 12


PNG = encoded(quadrants(), "PNG")


# ------------------------------------------------------------------------------- the same picture, any way in


def test_every_way_in_gives_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    array = np.asarray(quadrants())
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = {
        "str": str(path),
        "Path": path,
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "BytesIO": io.BytesIO(PNG),
        "data URL": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data URL, line breaks": "DATA:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data URL, escaped": "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B"),
        "PIL": quadrants(),
        "PIL, lazy": Image.open(path),
        "uint8 array": array,
        "BGR array turned round": array[..., ::-1][..., ::-1],
        "float32 array": array.astype(np.float32) / 255,
        "float16 array": (array / 255).astype(np.float16),
        "RGBA array": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        "CHW tensor": chw,
        "HWC tensor": chw.permute(1, 2, 0),
        "float tensor": chw / 255,
        "bfloat16 tensor": (chw / 255).bfloat16(),
        "tensor with gradient": (chw / 255).requires_grad_(),
    }
    for name, source in sources.items():
        picture = load_image(source)
        assert type(picture) is Image.Image, name
        assert_same(picture, quadrants())


def test_open_file_is_read_from_its_start_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "a.png").open("rb") as file:
        file.read(10)
        assert_same(load_image(file), quadrants())
        assert not file.closed
    written = io.BytesIO()
    written.write(b"just text")
    with pytest.raises(ImageError, match="is text, not an image"):
        load_image(written)


class Pipe(io.RawIOBase):
    """A stream that cannot seek, like standard input."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self.content.readinto(memoryview(buffer)[:7])  # streams may give less than was asked


def test_stream_that_cannot_seek() -> None:
    assert_same(load_image(Pipe(PNG)), quadrants())
    with pytest.raises(ImageError, match=r"image stream is over 20 bytes.*max_bytes"):
        load_image(Pipe(PNG), max_bytes=20)
    endless = Pipe(bytes(10_000))
    with pytest.raises(ImageError, match="over 20 bytes"):
        load_image(endless, max_bytes=20)
    assert endless.content.tell() < 100  # it stopped at the limit


def test_grey_arrays_and_tensors() -> None:
    grey = np.array([[0, 128], [64, 255]], np.uint8)
    expected = Image.fromarray(np.dstack([grey] * 3))
    for source in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert_same(load_image(source), expected)
    assert_same(load_image(grey / 255), expected)


def test_a_tensor_that_reads_both_ways_is_channels_first() -> None:
    tensor = torch.zeros(3, 5, 3)
    tensor[0] = 1
    assert_same(load_image(tensor), Image.new("RGB", (3, 5), RED))


def test_the_result_is_independent_of_the_source() -> None:
    image, array, grey = quadrants(), np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
    loaded = [load_image(source) for source in (image, array, grey)]
    image.paste(BLUE, (0, 0, 64, 32))
    array[:], grey[:] = 255, 255
    assert loaded[0].getpixel((0, 0)) == RED
    assert loaded[1].getpixel((0, 0)) == loaded[2].getpixel((0, 0)) == (0, 0, 0)


# -------------------------------------------------------------------------------- orientation, modes, formats


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    # Stored so that a viewer that applies `orientation` shows the quadrants upright.
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
             7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = quadrants()
    if orientation in turns:
        stored = stored.transpose(Image.Transpose[turns[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, format, exif=exif)
    upright = load_image(content)
    assert_alike(upright, quadrants())
    assert_same(load_image(upright), upright)  # once is enough
    assert_same(load_image(Image.open(io.BytesIO(content))), upright)


def test_damaged_exif_does_not_spoil_the_picture() -> None:
    assert_same(load_image(encoded(quadrants(), "PNG", exif=b"Exif\0\0nonsense")), quadrants())


def clear_red(mode: str) -> Image.Image:
    """Left half opaque red, right half fully transparent red."""
    image = Image.new("RGBA", (8, 4), (*RED, 255))
    image.paste((*RED, 0), (4, 0, 8, 4))
    return image if mode == "RGBA" else image.convert(mode)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (4, 0, 8, 4))
    return image


@pytest.mark.parametrize(
    "content",
    [
        encoded(clear_red("RGBA"), "PNG"),
        encoded(clear_red("RGBA"), "WEBP", lossless=True),
        encoded(palette_with_transparency(), "PNG", transparency=1),
        encoded(palette_with_transparency(), "GIF", transparency=1),
        encoded(palette_with_transparency().convert("RGB"), "PNG", transparency=GREEN),
    ],
    ids=["RGBA PNG", "RGBA WebP", "palette PNG", "palette GIF", "RGB PNG with a colour key"],
)
def test_transparency_lies_on_white(content: bytes) -> None:
    image = load_image(content)
    assert (image.getpixel((0, 0)), image.getpixel((7, 3))) == (RED, WHITE)


def test_half_transparency_is_blended() -> None:
    assert load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 127))).getpixel((0, 0)) == (255, 128, 128)
    assert load_image(Image.new("LA", (2, 2), (0, 127))).getpixel((0, 0)) == (128, 128, 128)
    rgba = np.zeros((2, 2, 4), np.float32)
    assert load_image(rgba).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_keeps_its_shades(format: str) -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    options = {"irreversible": False} if format == "JPEG2000" else {}
    image = load_image(encoded(Image.fromarray(values), format, **options))
    assert np.asarray(image)[..., 0].tolist() == [[0, 100], [200, 255]]


def test_float_tiff_follows_the_rule_for_float_arrays() -> None:
    values = np.array([[0, 0.5], [1, 0.25]], np.float32)
    image = load_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[..., 0].tolist() == [[0, 128], [255, 64]]
    with pytest.raises(ImageError, match=r"0\.\.300"):
        load_image(encoded(Image.fromarray(values * 300), "TIFF"))


def test_32_bit_integers_are_refused() -> None:
    with pytest.raises(ImageError, match="outside 16 bits"):
        load_image(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_colour_modes(mode: str) -> None:
    source = quadrants().convert(mode)
    assert_same(load_image(source), source.convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "MPO", "AVIF"])
def test_file_formats(format: str) -> None:
    assert_alike(load_image(encoded(quadrants(), format)), quadrants())


def test_cmyk_jpeg() -> None:
    assert_alike(load_image(encoded(quadrants().convert("CMYK"), "JPEG")), quadrants())


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert_same(load_image(content), frames[0])


def test_one_pixel_and_very_wide_images() -> None:
    assert_same(load_image(encoded(Image.new("RGB", (1, 1), RED), "PNG")), Image.new("RGB", (1, 1), RED))
    assert load_image(encoded(Image.new("L", (20_000, 100)), "PNG")).size == (20_000, 100)


# -------------------------------------------------------------------------------------------- what is refused


def test_pixel_limit_holds_for_every_kind_of_input(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(PNG)
    array = np.asarray(quadrants())
    for source in (path, PNG, quadrants(), array, array / 255, torch.from_numpy(array.copy())):
        with pytest.raises(ImageError, match=r"64 x 32 = 2048 pixels, over the limit of 2047.*max_pixels"):
            load_image(source, max_pixels=2047)
        assert load_image(source, max_pixels=2048).size == (64, 32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_decompression_bomb_is_refused_before_it_unpacks(side: int) -> None:
    ppm = f"P6 {side} {side} 255\n".encode()  # a header alone: whoever decodes it fails with another error
    with pytest.raises(ImageError, match=f"over the limit of {MAX_PIXELS}"):
        load_image(ppm + bytes(100))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_file_is_an_error_not_a_grey_picture(format: str, part: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8))
    content = encoded(noise, format)
    load_image(content)
    with pytest.raises(ImageError, match="the image bytes"):
        load_image(content[: int(len(content) * part)])


def test_damaged_bytes_never_raise_anything_else() -> None:
    random = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM"):
        content = np.frombuffer(encoded(quadrants(), format), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            places = random.integers(0, min(len(damaged), 200), 6)
            damaged[places] = random.integers(0, 256, 6)
            try:
                load_image(damaged.tobytes(), max_pixels=100_000)
            except ImageError as error:
                assert "the image bytes" in str(error)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"I am thirsty.\nBring me a drink.\n", "is text, not an image"),
        (b"<!DOCTYPE html><html><body>sign in</body></html>", "is a web page"),
        (b'<?xml version="1.0"?>\n<svg width="10"/>', "is an SVG drawing. Export it as PNG"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is text"),
        (bytes(range(256)), "is not an image in a supported format.*Convert it"),
        (HEIC, "is a HEIC.*Convert it to JPEG or PNG, or `pip install pillow-heif`"),
    ],
    ids=["empty", "text", "html", "svg", "pdf", "postscript", "binary", "heic"],
)
def test_a_file_that_is_no_image(tmp_path: Path, content: bytes, says: str) -> None:
    if content is HEIC and "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed and reads it")
    path = tmp_path / "kitchen.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"kitchen\.jpg' {says}"):
        load_image(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing.png' does not exist. Check the path"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match=r"is a directory. Pass the path of one image file"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"cannot be opened|does not exist"):
        load_image("A" * 5000)
    with pytest.raises(ImageError, match=r"cannot be opened|does not exist"):
        load_image("a\0b.png")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is not a regular file"):
        load_image(tmp_path / "pipe.png")


def test_text_mode_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with (tmp_path / "a.txt").open() as file, pytest.raises(ImageError, match="mode 'rb'"):
        load_image(file)
    with pytest.raises(ImageError, match="mode 'rb'"):
        load_image(io.StringIO("hello"))


def test_closed_pil_image_and_closed_file() -> None:
    lazy = Image.open(io.BytesIO(encoded(quadrants(), "JPEG")))
    lazy.close()
    with pytest.raises(ImageError, match="the PIL image"):
        load_image(lazy)
    file = io.BytesIO(PNG)
    file.close()
    with pytest.raises(ImageError, match="closed"):
        load_image(file)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((0, 0, 3), np.uint8), "empty"),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((3, 5, 5, 3), np.uint8), r"\(3, 5, 5, 3\).*not one image"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\).*Pass one \(H, W\)"),
        (np.zeros(5, np.uint8), "not one image"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.array([[0.0, np.inf]]), "infinity"),
        (np.full((4, 4, 3), 200.0), r"200\.\.200.*\[0, 1\].*uint8"),
        (np.full((4, 4, 3), -1.0), "normalisation"),
        (np.zeros((4, 4, 3), np.int64), "int64.*wrong dtype. Pass uint8"),
        (np.zeros((4, 4), bool), "bool.*wrong dtype"),
        (np.full((4, 4), "x", object), "object.*wrong dtype"),
        (torch.zeros(2, 3, 8, 8), r"tensor of shape \(2, 3, 8, 8\).*not one image"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "tensor.*int32.*wrong dtype"),
        (Image.new("RGB", (0, 4)), "the PIL image is empty"),
        (None, "cannot read an image from NoneType.*Pass a path"),
        ([[0, 1], [1, 0]], "cannot read an image from list"),
        (7, "cannot read an image from int"),
        ("", "is a directory|does not exist"),
    ],
)
def test_wrong_sources(source: object, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:text/plain;base64,aGVsbG8=", "starts 'data:text/plain;base64'. Write it as data:image/png"),
        ("data:image/png,hello", "Write it as"),
        ("data:image/png;base64", "Write it as"),
        ("data:image/png;base64,@@@", "damaged base64"),
        ("data:image/png;base64,", "the data: URL is empty"),
        ("data:image/png;base64,aGVsbG8=", "the data: URL is text"),
    ],
)
def test_wrong_data_urls(url: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(url)


def test_data_url_over_the_limit() -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert load_image(url, max_bytes=len(PNG)).size == (64, 32)
    for max_bytes in (10, len(PNG) - 1):
        with pytest.raises(ImageError, match=f"the data: URL is over {max_bytes} bytes.*max_bytes"):
            load_image(url, max_bytes=max_bytes)


# ------------------------------------------------------------------------------------------------------- URLs

Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A real HTTP server on this machine whose pages are functions; it remembers what it was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((self.path, dict(self.headers)))
                page = site.pages.get(self.path, lambda handler: handler.send_error(404))
                try:
                    page(self)
                except OSError:
                    self.close_connection = True  # the client hung up, as it should

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def content(body: bytes, kind: str = "image/png", announce: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body) if announce is None else announce))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def redirect(to: str, status: int = 302) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def fetch(url: str, **options: object) -> Image.Image:
    return load_image(url, allow_private_urls=True, **options)  # type: ignore[arg-type]


def test_url_gives_the_picture(site: Site) -> None:
    site.pages["/a.png"] = content(PNG)
    site.pages["/b%20c.png?size=1&q=%C3%A9"] = content(PNG)
    assert_same(fetch(site.url("/a.png#top")), quadrants())
    assert_same(fetch(site.url("/b c.png?size=1&q=é")), quadrants())
    assert_same(fetch(site.url("/b%20c.png?size=1&q=%C3%A9")), quadrants())  # escaped already
    assert site.requests[0][1]["Host"] == site.host


def test_chunked_and_unannounced_bodies(site: Site) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(PNG), 50):
            piece = PNG[start : start + 50]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    def unannounced(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)

    site.pages.update({"/chunked": chunked, "/unannounced": unannounced})
    for path in site.pages:
        assert_same(fetch(site.url(path)), quadrants())
        with pytest.raises(ImageError, match="over 100 bytes"):
            fetch(site.url(path), max_bytes=100)


def test_login_in_the_url_is_sent_to_its_host_only_and_never_shown(site: Site) -> None:
    site.pages["/start"] = redirect(site.url("/a.png"))
    site.pages["/a.png"] = content(PNG)
    url = f"http://robot:s3cr%40t@{site.host}"
    fetch(url + "/start")
    assert [headers.get("Authorization") for _, headers in site.requests] == [
        "Basic " + base64.b64encode(b"robot:s3cr@t").decode(),
        None,
    ]
    with pytest.raises(ImageError, match="status 404") as caught:
        fetch(url + "/missing?token=abc")
    assert "/missing?..." in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("robot", "s3cr", "abc"))


def test_urls_that_give_no_image(site: Site) -> None:
    site.pages["/page"] = content(b"<html>hello</html>", "text/html")
    site.pages["/empty"] = content(b"")
    site.pages["/cut"] = content(PNG[:100], announce=len(PNG))
    site.pages["/nonsense"] = lambda handler: handler.wfile.write(b"SSH-2.0-server\r\n")
    site.pages["/loop"] = redirect("/loop", 301)
    site.pages["/to-file"] = redirect("file:///etc/passwd")
    site.pages["/to-bad"] = redirect("http://[::1")
    for path, says in {
        "/gone": "/gone' answers with HTTP status 404",
        "/page": "/page' is a web page, not an image",
        "/empty": "/empty' is empty",
        "/cut": "/cut' cannot be fetched",
        "/nonsense": "/nonsense' cannot be fetched",
        "/loop": "redirects more than 5 times",
        "/to-file": "not an http: or https: URL",
        "/to-bad": "cannot be fetched",
    }.items():
        with pytest.raises(ImageError, match=says):
            fetch(site.url(path))
    assert sum(path == "/loop" for path, _ in site.requests) == 6  # the first request and five redirects


def test_redirects_are_followed(site: Site) -> None:
    for status in (301, 302, 303, 307, 308):
        site.pages[f"/{status}"] = redirect("a.png", status)  # relative, as servers may send it
    site.pages["/a.png"] = content(PNG)
    for status in (301, 302, 303, 307, 308):
        assert_same(fetch(site.url(f"/{status}")), quadrants())


def test_too_large_a_download_stops_early(site: Site) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(bytes(2**16))

    site.pages.update({"/endless": endless, "/announced": content(b"", announce=10**12)})
    for path in site.pages:
        with pytest.raises(ImageError, match=f"{path}' is over 1000000 bytes.*max_bytes"):
            fetch(site.url(path), max_bytes=1_000_000)


@pytest.mark.parametrize("drip", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
def test_a_slow_drip_meets_the_time_limit(site: Site, drip: bytes) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(drip)
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    site.pages["/slow"] = slow
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"/slow' took over 0\.4 s.*max_seconds"):
        fetch(site.url("/slow"), max_seconds=0.4)
    assert time.monotonic() - started < 4  # the server goes on for 5 s


def test_a_closed_port_and_an_unknown_host() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ImageError, match=f"127.0.0.1:{port}/a.png' cannot be fetched.*refused"):
        fetch(f"http://127.0.0.1:{port}/a.png")
    with pytest.raises(ImageError, match=r"cannot be fetched|took over"):
        fetch("http://no-such-host.invalid/a.png", max_seconds=3)


def test_a_slow_name_server_meets_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: time.sleep(1) or [])
    with pytest.raises(ImageError, match="took over"):
        load_image("http://example.com/a.png", max_seconds=0.2)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/a.png", "'ftp://host/a.png' is not an http: or https: URL. Download it"),
        ("file:///etc/passwd", "is not an http: or https: URL"),
        ("s3://bucket/a.png", "is not an http: or https: URL"),
        ("http:///a.png", "names no host"),
        ("http://host:99999/a.png", "is not a valid URL"),
        ("http://[::1/a.png", "the URL is not a valid URL"),
    ],
)
def test_urls_of_another_kind(url: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(url)


# ------------------------------------------------------------------------------------------ private addresses


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_reachable_by_any_spelling(site: Site, host: str) -> None:
    with pytest.raises(ImageError, match=r"non-public address.*allow_private_urls"):
        load_image(f"http://{host}:{site.port}/a.png")
    assert not site.requests


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "127.8.8.8", "0.0.0.0", "100.64.0.1", "100.100.100.200",
        "169.254.169.254", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "fe80::1",
        "fe80::1%lo", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::",
        "2001:0:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not _is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "151.101.1.140", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert _is_public(address)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Answer the name look-ups one after the other, as a name server under an attacker's hand would."""
    remaining, asked = list(answers), []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: object, **options: object) -> list:
        if not host.endswith(".example"):
            return real(host, port, *args, **options)  # type: ignore[arg-type]
        asked.append(host)
        addresses = remaining.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_with_one_private_address_among_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ["8.8.8.8", "10.0.0.5"])
    with pytest.raises(ImageError, match=r"'pictures.example' has the non-public address 10\.0\.0\.5"):
        load_image("http://pictures.example/a.png")


def test_a_dead_address_leaves_the_next_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/a.png"] = content(PNG)
    resolve_to(monkeypatch, ["::1", "127.0.0.1"])  # the site listens on the second alone
    assert_same(fetch(f"http://camera.example:{site.port}/a.png"), quadrants())


@pytest.fixture
def public_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The local site, dressed up as the public address 8.8.8.8; only the network beneath is faked."""
    real = socket.create_connection

    def create_connection(address: tuple[str, int], *args: object, **options: object) -> socket.socket:
        assert address[0] == "8.8.8.8", f"connects to {address[0]}"
        return real(("127.0.0.1", site.port), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_connection", create_connection)
    return site


def test_the_address_that_was_checked_is_the_one_connected_to(
    public_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    public_site.pages["/a.png"] = content(PNG)
    asked = resolve_to(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])  # DNS rebinding: the second answer is private
    assert_same(load_image("http://pictures.example/a.png"), quadrants())
    assert asked == ["pictures.example"]
    assert public_site.requests[0][1]["Host"] == "pictures.example"


@pytest.mark.parametrize("target", ["http://127.0.0.1/latest", "http://[::1]/", "http://169.254.169.254/latest"])
def test_a_redirect_to_a_private_address_is_refused(
    public_site: Site, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    public_site.pages["/a.png"] = redirect(target)
    real = socket.getaddrinfo
    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: public if host == "pictures.example" else real(host, *a, **k),
    )
    with pytest.raises(ImageError, match="non-public address"):
        load_image("http://pictures.example/a.png")
    assert [path for path, _ in public_site.requests] == ["/a.png"]


def test_proxies_from_the_environment_are_ignored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    site.pages["/a.png"] = content(PNG)
    assert_same(fetch(site.url("/a.png")), quadrants())


def test_https_checks_the_certificate_against_the_name(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    name = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make.split(), *name, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    asked: list[str | None] = []
    context.sni_callback = lambda sock, name, context: asked.append(name)
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    site.pages["/a.png"] = content(PNG)

    with pytest.raises(ImageError, match="certificate"):
        fetch(f"https://localhost:{site.port}/a.png")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert_same(fetch(f"https://localhost:{site.port}/a.png"), quadrants())
    assert asked[-1] == "localhost"
    with pytest.raises(ImageError, match="certificate"):
        fetch(f"https://127.0.0.1:{site.port}/a.png")


# ----------------------------------------------------------------------------------------- errors and imports


def test_the_errors_can_be_caught_as_what_they_are() -> None:
    assert issubclass(ImageError, InputError) and issubclass(InputError, (DetGPTError, ValueError))
    missing = MissingExtraError("openai", "openai")
    assert isinstance(missing, ImportError)
    assert str(missing) == "openai is not installed. Install it with: pip install 'detgpt[openai]'"


def test_a_missing_extra_survives_the_way_back_from_a_worker() -> None:
    back = pickle.loads(pickle.dumps(MissingExtraError("gradio", "demo")))
    assert (back.package, back.extra, str(back)) == (
        "gradio",
        "demo",
        str(MissingExtraError("gradio", "demo")),
    )


def test_reading_images_imports_no_model_code() -> None:
    code = (
        "import sys; from detgpt.images import load_image; import numpy as np; load_image(np.zeros((2, 2)));"
        "print([m for m in ('torch', 'torchvision', 'transformers', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
