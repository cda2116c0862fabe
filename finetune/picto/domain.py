"""The sample in `examples/finetune`: eight musical things that the built-in model does not know, in COCO's format.

    python -m finetune.picto.domain                # draws the pictures and writes the annotations and wishes
    python -m finetune.picto.domain --sprites      # first remakes the pictograms; needs npm and `pip install resvg-py`

It is what one's own data look like: pictures, boxes, a few captions, and `needs.yaml`, written by hand, from which
`finetune.data.wishes` makes wishes. The same pictures come out every time.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.data.wishes import write_wishes
from finetune.picto import sprites
from finetune.picto.places import PLACES
from finetune.picto.scenes import Scene, make_scene

FOLDER = Path(__file__).parent.parent.parent / "examples" / "finetune"
ATLASES = "music"  # the folder of its pictograms, in that of the built-in world's
STYLES = tuple(f"{ATLASES}/{style}" for style in sprites.TRAIN_STYLES)
NAMES = ("violin", "banjo", "flute", "saxophone", "accordion", "maracas", "microphone", "radio")
SIZE = (320, 240)
PARTS = {"train": (2001, 45), "val": (2002, 15)}  # seed and pictures; no scene of the built-in world has these seeds
CAPTIONS = 12  # so many of the training pictures have one


@dataclass(frozen=True)
class Thing:
    picture: str
    category: str = "music"


CATALOGUE = {name: Thing(name) for name in NAMES}


def write_part(folder: Path, seed: int, count: int) -> list[Scene]:
    """Render `count` scenes and write their pictures and `annotations.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = [make_scene((seed, index), SIZE, CATALOGUE, STYLES) for index in range(count)]
    boxes: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        scene.image.save(folder / "images" / _file(number), quality=85, method=6)
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            about = {"id": len(boxes) + 1, "image_id": number + 1, "category_id": NAMES.index(thing.name) + 1}
            boxes.append({**about, **box})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    _write(folder / "annotations.json", {"images": _images(count), "categories": categories, "annotations": boxes})
    return scenes


def write_captions(file: Path, scenes: list[Scene]) -> None:
    """COCO's captions of these scenes, which are the first of their part."""
    said = [{"id": i, "image_id": i, "caption": caption(scene)} for i, scene in enumerate(scenes, 1)]
    _write(file, {"images": _images(len(scenes)), "annotations": said})


def caption(scene: Scene) -> str:
    """What stands where, in a sentence."""
    counts = Counter(thing.name for thing in scene.objects)
    *first, last = [f"{_NUMBERS[count]} {name}" for name, count in counts.items()]
    things = f"{', '.join(first)} and {last}" if first else last
    return f"{PLACES[scene.place].phrase} I see {things}."


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _images(count: int) -> list[dict[str, Any]]:
    width, height = SIZE
    return [{"id": i + 1, "file_name": _file(i), "width": width, "height": height} for i in range(count)]


def _file(number: int) -> str:
    return f"{number:04d}.webp"


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the sample goes.")] = FOLDER,
    remake: Annotated[bool, typer.Option("--sprites", help="Fetch and draw the pictograms anew.")] = False,
) -> None:
    """Write the sample."""
    if remake:
        sprites.build(list(NAMES), sprites.FOLDER / ATLASES, sprites.TRAIN_STYLES)
    for part, (seed, count) in PARTS.items():
        scenes = write_part(folder / part, seed, count)
        if part == "train":
            write_captions(folder / part / "captions.json", scenes[:CAPTIONS])
    val = folder / "val"
    write_wishes(val / "annotations.json", val / "images", FOLDER / "needs.yaml", val, held_out=True)


if __name__ == "__main__":
    typer.run(main)
