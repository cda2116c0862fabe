"""What comes from visitors and goes back to them: pictures read by `load_image`, errors in words, files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from detgpt.download import quoted
from detgpt.errors import DetGPTError, ImageError
from detgpt.images import load_image

MAX_SIDE = 12_000  # pixels; more than any camera's picture has


@dataclass(frozen=True)
class Upload:
    """A checked picture, and its file's name."""

    image: Image.Image
    name: str


def read_upload(payload: dict[str, Any] | None) -> Upload | None:
    """The picture that a `gr.Image` holds; raises `gr.Error`, which the page shows, where it cannot be read.

    The component hands on its raw payload (`preprocess=False`), because it would itself open the file in its own
    way and fail without a word. Gradio has by then checked that the path is one of its uploads.
    """
    if payload is None:
        return None
    source = payload["path"] or payload["url"]
    name = payload["orig_name"] or ("picture" if source.startswith("data:") else Path(source).name)
    try:
        image = load_image(source)
        if max(image.size) > MAX_SIDE:
            size = "{:,} x {:,}".format(*image.size)
            raise ImageError(f"{quoted(source)} is {size} pixels; the limit is {MAX_SIDE:,} a side. Scale it down.")
    except ImageError as error:
        # The visitor knows the file by its own name, not by its place on the server.
        raise shown_error(str(error).replace(quoted(source), quoted(name)), "This picture cannot be used") from error
    return Upload(image, name)


def file_for(component: gr.components.Component, name: str) -> Path:
    """A place for a file that this component gives out; Gradio deletes it when its time is over."""
    cache = Path(component.GRADIO_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=cache)) / name
    component.temp_files.add(str(path))
    return path


def shown_error(error: DetGPTError | str, title: str = "That did not work") -> gr.Error:
    """An error of the library as a message on the page, without a traceback."""
    return gr.Error(str(error), title=title, print_exception=False)
