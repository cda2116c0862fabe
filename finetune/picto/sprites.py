"""The pictograms of the built-in world: one atlas image a drawing style, made once from open icon sets.

    python -m finetune.picto.sprites        # remake the atlases; needs npm and `pip install resvg-py`

The atlases are part of the project, so rendering scenes needs neither. Licences are in `STYLES` and in
`sprites/index.json`; `OpenMoji` is never trained on: it is the held-out style of the evaluation.
"""

from __future__ import annotations

import functools
import io
import json
import math
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "sprites"
SIZE = 128  # pixels of one pictogram, square
COLUMNS = 12

STYLES = {
    "noto": ("@iconify-json/noto", "Noto Emoji, Google", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji", "Twemoji, Twitter and contributors", "CC-BY-4.0"),
    "fluent": ("@iconify-json/fluent-emoji", "Fluent Emoji, Microsoft", "MIT"),
    "openmoji": ("@iconify-json/openmoji", "OpenMoji, HfG Schwäbisch Gmünd", "CC-BY-SA-4.0"),
}
TRAIN_STYLES = ("noto", "twemoji", "fluent")
HELD_OUT_STYLE = "openmoji"


@functools.cache
def load(style: str) -> dict[str, Image.Image]:
    """The pictograms of a style by picture name: RGBA, cropped to what is drawn. A style may be in a folder."""
    file = FOLDER / f"{style}.webp"
    pictures = json.loads((file.parent / "index.json").read_text())["pictures"]
    with Image.open(file) as opened:
        atlas = opened.convert("RGBA")
    cells = {}
    for i, picture in enumerate(pictures):
        x, y = i % COLUMNS * SIZE, i // COLUMNS * SIZE
        cell = atlas.crop((x, y, x + SIZE, y + SIZE))
        cells[picture] = cell.crop(cell.getchannel("A").point(lambda a: 255 * (a > 100)).getbbox())
    return cells


def build(pictures: list[str], folder: Path = FOLDER, styles: Sequence[str] = tuple(STYLES)) -> None:
    """Fetch the icon sets, draw `pictures` in every style and write the atlases and their index."""
    folder.mkdir(exist_ok=True)
    for style in styles:
        icons = _fetch(STYLES[style][0])
        rows = math.ceil(len(pictures) / COLUMNS)
        atlas = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
        for i, picture in enumerate(pictures):
            atlas.paste(_draw(icons, picture), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
        atlas.save(folder / f"{style}.webp", quality=88, method=6)
        print(f"{style}: {len(pictures)} pictograms")
    described = {style: STYLES[style] for style in styles}
    sources = {style: {"package": p, "by": by, "licence": lic} for style, (p, by, lic) in described.items()}
    index = {"pictures": pictures, "sources": sources}
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def _fetch(package: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            icons = tar.extractfile("package/icons.json")
            if icons is None:
                raise FileNotFoundError(f"{package} has no icons.json")
            return json.load(icons)


def _draw(icons: dict, picture: str) -> Image.Image:
    import resvg_py

    while picture in icons.get("aliases", {}):
        picture = icons["aliases"][picture]["parent"]
    icon = icons["icons"][picture]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    return square


if __name__ == "__main__":
    from finetune.picto.knowledge import load_knowledge

    build(sorted({c.picture for c in load_knowledge().classes.values()}))
