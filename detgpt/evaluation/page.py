"""The look of the HTML pages: one file that holds everything, pictures too, and asks no server for anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from detgpt.draw import draw

PICTURE_WH = 560, 420  # pixels that every picture is made to fit, twice its size on a screen; about 30 kB each
TEXT_SIZE, LINE_WIDTH = 24, 4
LONGEST_TEXT = 400  # characters of a reasoning


def page(title: str, subtitle: str, body: str) -> str:
    """The whole page; `body` is HTML."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="grey">{escape(subtitle)}</p>
{body}</main>
</body>
</html>
"""


def drawn(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[str],
    names: Sequence[str],
    scores: np.ndarray | None = None,
) -> Image.Image:
    """The picture at the page's size with its boxes, (N, 4) xyxy in its own pixels; `names` decide the colours."""
    factor = min(PICTURE_WH[0] / image.width, PICTURE_WH[1] / image.height)
    fitted = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    return draw(
        fitted, boxes * factor, labels, scores, names=names, text_size=TEXT_SIZE, line_width=LINE_WIDTH, min_side=0
    )


def figure(image: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    told = escape(caption)
    return f'<figure><img src="{url}" alt="{told}" loading="lazy"><figcaption>{told}</figcaption></figure>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text; the first row and the first column are headings."""
    head, *body = (
        "<tr>" + "".join(_table_cell(cell, header=number == 0 or i == 0) for i, cell in enumerate(row)) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} …"


def _table_cell(text: str, header: bool) -> str:
    return f"<th>{escape(text)}</th>" if header else f"<td>{escape(text)}</td>"
