"""A picture seen another way: mirrored, nearer or farther, in another light; its boxes go along."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveFloat
from torchvision import tv_tensors
from torchvision.transforms import v2

from finetune.recipe import Settings

SMALLEST = 2.0  # pixels: what is left of a box at the edge of a picture must have sides of more


class Augmentation(Settings):
    """How much a picture is varied.

    flip: chance of mirroring it. scale: range of large-scale jitter (Ghiasi et al. 2020,
    https://arxiv.org/abs/2012.07177): the picture is resized by a factor from it, then cut or padded to the size that
    it had. colour: how far brightness, contrast and saturation go from 1, and a quarter of that the hue from 0.
    """

    flip: float = Field(default=0.5, ge=0, le=1)
    scale: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.4)
    colour: float = Field(default=0.2, ge=0, le=1)


def vary(
    image: Image.Image, boxes: np.ndarray, how: Augmentation, fill: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The picture (3, H, W) uint8 of the same size, the boxes (n, 4) xyxy that are still in it, and which they are.

    boxes: (N, 4) xyxy in pixels. fill: colour of what the picture does not reach. The same seed, the same variation.
    """
    width, height = image.size
    steps: list[Any] = [
        v2.RandomHorizontalFlip(how.flip),
        v2.ScaleJitter((width, height), how.scale),  # it takes width first, whatever its name for it
        v2.RandomCrop((height, width), pad_if_needed=True, fill=list(fill)),
        v2.ColorJitter(how.colour, how.colour, how.colour, how.colour / 4),
    ]
    there = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        seen, moved = v2.Compose(steps)(v2.functional.pil_to_tensor(image), there)
    sides = moved[:, 2:] - moved[:, :2]
    kept = (sides > SMALLEST).all(1).numpy()
    return seen, moved.numpy()[kept], kept.nonzero()[0]
