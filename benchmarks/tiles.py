"""What `tiles` brings in large pictures of small things: `python -m benchmarks.tiles`.

Each picture is a patchwork of scenes of the built-in world, so its things are small and their boxes exactly known;
it is asked for some of the names in it. The detector sees the whole at the size at which it was trained to see one
scene. "alone", for comparison: each scene cut out exactly and asked for the same names. Writes
`benchmarks/results/tiles.md`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from detgpt import DetGPT
from detgpt.boxes import iou_matrix
from finetune.picto.knowledge import load_knowledge
from finetune.picto.scenes import make_scene

RESULTS = Path(__file__).parent / "results"
SCENE = (512, 384)  # pixels of one scene


def patchwork(seed: int, across: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """A picture of `across` x `across` scenes, and the boxes (N, 4) of every name in it."""
    picture = Image.new("RGB", (SCENE[0] * across, SCENE[1] * across))
    boxes: dict[str, list[np.ndarray]] = {}
    for place in range(across**2):
        origin = SCENE[0] * (place % across), SCENE[1] * (place // across)
        scene = make_scene((90, seed, place), SCENE, load_knowledge().classes)
        picture.paste(scene.image, origin)
        for thing in scene.objects:
            boxes.setdefault(thing.name, []).append(np.array(thing.box) + np.tile(origin, 2))
    return picture, {name: np.array(found) for name, found in boxes.items()}


def matches(found: np.ndarray, truth: np.ndarray) -> int:
    """How many true boxes have a found box of their own at IoU 0.5."""
    free = np.ones(len(truth), bool)
    for overlaps in iou_matrix(found, truth):
        best = int(np.argmax(overlaps * free))
        if free[best] and overlaps[best] >= 0.5:
            free[best] = False
    return int((~free).sum())


def alone(model: DetGPT, picture: Image.Image, names: list[str]) -> dict[str, np.ndarray]:
    """The boxes of each name where every scene of the patchwork is a picture of its own."""
    origins = [(x, y) for y in range(0, picture.height, SCENE[1]) for x in range(0, picture.width, SCENE[0])]
    scenes = [picture.crop((x, y, x + SCENE[0], y + SCENE[1])) for x, y in origins]
    results = model.detect_batch([(scene, names) for scene in scenes])
    return {
        name: np.concatenate(
            [
                result.filter(labels=name).boxes + np.tile(np.array(origin, np.float32), 2)
                for result, origin in zip(results, origins, strict=True)
            ]
        )
        for name in names
    }


def in_tiles(model: DetGPT, picture: Image.Image, names: list[str], tiles: int) -> dict[str, np.ndarray]:
    """The boxes of each name with that many tiles."""
    result = model.detect(picture, names=names, tiles=tiles)
    return {name: result.filter(labels=name).boxes for name in names}


def measure(model: DetGPT, tiles: int | None, across: int, pictures: int, names: int) -> str:
    """One row of the table; tiles None: each scene alone."""
    hits = truths = boxes = 0
    seconds = []
    for seed in range(pictures):
        picture, truth = patchwork(seed, across)
        asked = sorted(truth)[:: max(1, len(truth) // names)][:names]
        start = time.perf_counter()
        found = alone(model, picture, asked) if tiles is None else in_tiles(model, picture, asked, tiles)
        seconds.append(time.perf_counter() - start)
        for name in asked:
            hits += matches(found[name], truth[name])
            truths += len(truth[name])
            boxes += len(found[name])
    recall, precision = hits / truths, hits / max(1, boxes)
    return (
        f"| {across} x {across} | {tiles or 'alone'} | {truths} | {boxes} | {recall:.1%} | {precision:.1%} "
        f"| {statistics.median(seconds):.2f} s |"
    )


def main(
    pictures: Annotated[int, typer.Option(help="Pictures per row.")] = 8,
    names: Annotated[int, typer.Option(help="Names asked of each picture.")] = 4,
) -> None:
    """Measure and write the table."""
    model = DetGPT.from_pretrained("picto")
    table = [
        "| scenes | tiles | things | boxes | recall | precision | a picture, median |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for across in (1, 2, 3):
        for tiles in (1, across, across + 1, None) if across > 1 else (1, 2, 3):
            table.append(measure(model, tiles, across, pictures, names))
            print(table[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tiles.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    typer.run(main)
