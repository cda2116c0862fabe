"""Pictures of two things that no model has met, drawn with their boxes, as a COCO set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("blorb", "zwick")


def write_set(folder: Path, pictures: int, seed: int, names: tuple[str, str] = NAMES) -> dict[str, Path]:
    """Write `annotations.json` and `images/`; the setting of a recipe that names them."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(pictures):
        size = (240, 200) if number % 2 else (200, 240)
        image = Image.fromarray(rng.integers(90, 170, (6, 6, 3), np.uint8)).resize(size)
        for name, (x, y, radius) in zip(rng.integers(2, size=3), _places(rng, size), strict=False):
            _draw(ImageDraw.Draw(image), name, x, y, radius)
            box = [x - radius, y - radius, 2 * radius, 2 * radius]
            annotations.append({"image_id": number, "category_id": int(name), "bbox": box, "id": len(annotations) + 1})
        image.save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return {"annotations": folder / "annotations.json", "images": folder / "images"}


def _places(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float, float]]:
    """Centres and radii of one to three things that do not touch."""
    places: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(1, 4))):
        radius = float(rng.uniform(14, 30))
        x, y = (float(rng.uniform(radius, side - radius)) for side in size)
        if all(abs(x - a) > radius + c or abs(y - b) > radius + c for a, b, c in places):
            places.append((x, y, radius))
    return places


def _draw(draw: ImageDraw.ImageDraw, kind: int, x: float, y: float, radius: float) -> None:
    if kind == 0:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(200, 40, 160))
        draw.ellipse((x - radius / 2, y - radius / 2, x + radius / 2, y + radius / 2), fill=(250, 230, 60))
    else:
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=(20, 150, 160))
