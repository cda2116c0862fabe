"""A bank of rendered scenes on disk: training reads pictures and boxes from memory maps instead of painting anew.

    python -m finetune.picto.scenebank build/train --scenes 80000 --seed 1

A bank is a folder: `images.npy` (N, S, S, 3) uint8, `objects.npy` (M, 6) float32 rows of
(scene, class index, x0, y0, x1, y1 in 0..1) sorted by scene, and `places.json`.
Class indices follow the order of `knowledge.yaml`.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from finetune.picto import sprites
from finetune.picto.knowledge import load_knowledge
from finetune.picto.scenes import Scene, make_scene, reading_order

SIDE = 224  # pixels; what both models look at
ASPECTS = ((4, 3), (1, 1), (3, 4), (3, 2))  # shapes of picture that people bring


@dataclass(frozen=True)
class SceneBank:
    images: np.ndarray  # (N, SIDE, SIDE, 3) uint8, memory-mapped
    objects: np.ndarray  # (M, 6): scene, class, x0, y0, x1, y1 in 0..1
    starts: np.ndarray  # (N + 1,) first row of each scene in `objects`
    places: list[str]

    @classmethod
    def open(cls, folder: Path) -> SceneBank:
        images = np.load(folder / "images.npy", mmap_mode="r")
        objects = np.load(folder / "objects.npy")
        starts = np.searchsorted(objects[:, 0], np.arange(len(images) + 1))
        return cls(images, objects, starts, json.loads((folder / "places.json").read_text()))

    def __len__(self) -> int:
        return len(self.images)

    def of(self, scene: int) -> tuple[np.ndarray, np.ndarray]:
        """Class indices (n,) and boxes (n, 4) in 0..1 of one scene."""
        rows = self.objects[self.starts[scene] : self.starts[scene + 1]]
        return rows[:, 1].astype(int), rows[:, 2:]

    def classes_in_reading_order(self, scene: int) -> list[int]:
        """Class indices, each once."""
        classes, boxes = self.of(scene)
        return list(dict.fromkeys(int(classes[i]) for i in reading_order(boxes)))


def scene_for(seed: int, index: int, styles: tuple[str, ...] = sprites.TRAIN_STYLES) -> Scene:
    """Scene `index` of the bank with `seed`, in one of the usual picture shapes and about SIDE² pixels."""
    aspect = ASPECTS[np.random.default_rng((seed, index, 7)).integers(len(ASPECTS))]
    unit = SIDE / (aspect[0] * aspect[1]) ** 0.5
    size = (round(aspect[0] * unit), round(aspect[1] * unit))
    return make_scene((seed, index), size, load_knowledge().classes, styles)


def _render(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    scene = scene_for(seed, index)
    names = list(load_knowledge().classes)
    width, height = scene.image.size
    rows = [
        (index, names.index(o.name), o.box[0] / width, o.box[1] / height, o.box[2] / width, o.box[3] / height)
        for o in scene.objects
    ]
    return (
        np.asarray(scene.image.resize((SIDE, SIDE))),
        np.array(rows, np.float32).reshape(-1, 6),
        scene.place,
    )


def build(
    folder: Annotated[Path, typer.Argument(help="Where the bank is written.")],
    scenes: Annotated[int, typer.Option(help="How many scenes.")] = 80_000,
    seed: Annotated[int, typer.Option(help="Scenes of different seeds never repeat.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Render a bank of scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (scenes, SIDE, SIDE, 3))
    objects, places = [], []
    with ProcessPoolExecutor(workers) as pool:
        rendered = pool.map(partial(_render, seed=seed), range(scenes), chunksize=64)
        for i, (image, rows, place) in enumerate(track(rendered, "rendering scenes", total=scenes)):
            images[i] = image
            objects.append(rows)
            places.append(place)
    images.flush()
    np.save(folder / "objects.npy", np.concatenate(objects))
    (folder / "places.json").write_text(json.dumps(places))


if __name__ == "__main__":
    typer.run(build)
