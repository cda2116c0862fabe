"""The built-in world as a training set: rendered scenes with exact boxes in COCO's format (`stage: picto.world`).

The folder holds `images/` and `annotations.json`, whose pictures also say their place. Scenes of different seeds never
repeat; `scene_for` gives scene `index` of a seed to everybody who needs one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.progress import track
from torch.utils.data import Dataset

from finetune.picto import sprites
from finetune.picto.knowledge import load_knowledge
from finetune.picto.scenes import Scene, make_scene, reading_order
from finetune.recipe import StageConfig

SIDE = 224  # pixels; what both models look at
ASPECTS = ((4, 3), (1, 1), (3, 4), (3, 2))  # shapes of picture that people bring
ANNOTATIONS = "annotations.json"


class Config(StageConfig):
    """scenes: how many. workers: processes that render."""

    stage: Literal["picto.world"]
    scenes: int = 80_000
    workers: int = 2


def scene_for(seed: int, index: int, styles: tuple[str, ...] = sprites.TRAIN_STYLES) -> Scene:
    """Scene `index` of `seed`, in one of the usual picture shapes and about SIDE² pixels."""
    aspect = ASPECTS[np.random.default_rng((seed, index, 7)).integers(len(ASPECTS))]
    unit = SIDE / (aspect[0] * aspect[1]) ** 0.5
    size = (round(aspect[0] * unit), round(aspect[1] * unit))
    return make_scene((seed, index), size, load_knowledge().classes, styles)


def run(config: Config) -> None:
    """Render the scenes; a folder that is finished stays as it is."""
    if (config.output / ANNOTATIONS).exists():
        return
    (config.output / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(config.workers) as pool:
        jobs = pool.map(partial(_render, config.output, config.seed), range(config.scenes), chunksize=64)
        rows = list(track(jobs, f"rendering {config.output}", total=config.scenes))
    _write_annotations(config.output, rows)


def _render(folder: Path, seed: int, index: int) -> dict:
    """Save a scene's picture; returns its row of COCO's `images`, with its things as (category id, xywh)."""
    scene = scene_for(seed, index)
    name = f"images/{index:06d}.webp"
    scene.image.save(folder / name, quality=92, method=2)
    ids = {known: i for i, known in enumerate(load_knowledge().classes, start=1)}
    things = [
        (ids[thing.name], [round(x0, 2), round(y0, 2), round(x1 - x0, 2), round(y1 - y0, 2)])
        for thing in scene.objects
        for x0, y0, x1, y1 in [thing.box]
    ]
    width, height = scene.image.size
    return {"id": index, "file_name": name, "width": width, "height": height, "place": scene.place, "things": things}


def _write_annotations(folder: Path, rows: Sequence[dict]) -> None:
    boxes = [(row["id"], *thing) for row in rows for thing in row["things"]]
    document = {
        "images": [{key: value for key, value in row.items() if key != "things"} for row in rows],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image, category, box) in enumerate(boxes, start=1)
        ],
        "categories": [
            {"id": i, "name": known.name, "synonyms": list(known.names[1:])}
            for i, known in enumerate(load_knowledge().classes.values(), start=1)
        ],
    }
    partial_file = folder / f".{ANNOTATIONS}"
    partial_file.write_text(json.dumps(document))
    partial_file.replace(folder / ANNOTATIONS)


@dataclass(frozen=True)
class Picture:
    """What is known of a scene: class indices (n,) in the order of `knowledge.yaml`, boxes (n, 4) xyxy in 0..1."""

    file: Path
    place: str
    classes: np.ndarray
    boxes: np.ndarray

    def classes_in_reading_order(self) -> list[int]:
        """Class indices, each once."""
        return list(dict.fromkeys(int(self.classes[i]) for i in reading_order(self.boxes)))


class World(Dataset):
    """The scenes of a folder: dicts with `image` (SIDE, SIDE, 3) uint8, and `classes` and `boxes` as in `Picture`."""

    def __init__(self, folder: Path):
        document = json.loads((folder / ANNOTATIONS).read_text())
        rows: dict[int, list] = {image["id"]: [] for image in document["images"]}
        for thing in document["annotations"]:
            x, y, w, h = thing["bbox"]
            rows[thing["image_id"]].append((thing["category_id"] - 1, x, y, x + w, y + h))
        self.pictures = []
        for image in document["images"]:
            things = np.array(rows[image["id"]], np.float32).reshape(-1, 5)
            boxes = things[:, 1:] / np.tile([image["width"], image["height"]], 2).astype(np.float32)
            self.pictures.append(Picture(folder / image["file_name"], image["place"], things[:, 0].astype(int), boxes))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        picture = self.pictures[index]
        with Image.open(picture.file) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)))
        return {"image": pixels, "classes": picture.classes, "boxes": picture.boxes}
