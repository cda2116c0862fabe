"""Dense labels of scenes: which class covers each cell and which has its centre there; and what training does to
pictures on the way. The lessons of the ResNet and of the reasoner's tower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from finetune.picto.world import SIDE

SHIFT = 20  # pixels that a picture may be moved by


def pixels(images: np.ndarray) -> torch.Tensor:
    """(B, S, S, 3) uint8 → (B, 3, S, S) in -1..1, channels last in memory: twice as fast on a CPU."""
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return values.div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def augment(
    rng: np.random.Generator, values: torch.Tensor, boxes: Sequence[np.ndarray]
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Mirror, shift and recolour a batch of pictures (B, 3, S, S) with their boxes in 0..1."""
    if rng.random() < 0.5:
        values = values.flip(-1)
        boxes = [b[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0] if len(b) else b for b in boxes]
    dx, dy = (int(v) for v in rng.integers(-SHIFT, SHIFT + 1, 2))
    values = F.pad(values, (SHIFT,) * 4, mode="replicate")
    values = values[..., SHIFT - dy : SHIFT - dy + SIDE, SHIFT - dx : SHIFT - dx + SIDE]
    shift = np.array([dx, dy, dx, dy]) / SIDE
    return recolour(rng, values), [np.clip(b + shift, 0, 1) for b in boxes]


def recolour(rng: np.random.Generator, values: torch.Tensor) -> torch.Tensor:
    """Another light and other colours for each picture; some fade to grey."""
    gain = torch.from_numpy(rng.normal(1, 0.12, (len(values), 3, 1, 1))).float()
    bias = torch.from_numpy(rng.normal(0, 0.08, (len(values), 3, 1, 1))).float()
    grey = torch.from_numpy(rng.random((len(values), 1, 1, 1)) < 0.3).float() * float(rng.random())
    values = values * gain + bias
    values = values + grey * (values.mean(1, keepdim=True) - values)
    return values.clamp(-1.2, 1.2).contiguous(memory_format=torch.channels_last)


def cell_labels(
    classes: Sequence[np.ndarray], boxes: Sequence[np.ndarray], num_classes: int, grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft coverage and centre labels, each (B, grid, grid, C) in 0..1."""
    coverage = np.zeros((len(classes), grid, grid, num_classes), np.float32)
    centre = np.zeros_like(coverage)
    edges = np.arange(grid + 1) / grid
    for i, (names, rects) in enumerate(zip(classes, boxes, strict=True)):
        for name, (x0, y0, x1, y1) in zip(names, rects, strict=True):
            if x1 - x0 < 0.02 or y1 - y0 < 0.02:
                continue  # shifted out of the picture
            across = np.clip(np.minimum(x1, edges[1:]) - np.maximum(x0, edges[:-1]), 0, None)
            down = np.clip(np.minimum(y1, edges[1:]) - np.maximum(y0, edges[:-1]), 0, None)
            smaller = min(1 / grid**2, (x1 - x0) * (y1 - y0))
            part = np.clip(np.outer(down, across) / (0.6 * smaller), 0, 1)
            coverage[i, :, :, name] = np.maximum(coverage[i, :, :, name], np.where(part > 0.25, part, 0))
            centre[i, min(grid - 1, int((y0 + y1) / 2 * grid)), min(grid - 1, int((x0 + x1) / 2 * grid)), name] = 1
    return torch.from_numpy(coverage), torch.from_numpy(centre)


def dominant(coverage: torch.Tensor) -> torch.Tensor:
    """(…, C) coverage → (…) the class that covers most of a cell; C where none does."""
    most, which = coverage.max(-1)
    return torch.where(most > 0, which, coverage.shape[-1])


def sparse_bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed and divided by the amount of positives: most cells lack most classes."""
    total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return total / target.sum().clamp(min=1)


def presence_f1(scores: np.ndarray, truth: np.ndarray, threshold: float = 0.5) -> float:
    """Micro F1 of "this class is in the picture", both (N, C)."""
    said = scores > threshold
    hits = (said & truth).sum()
    return float(2 * hits / max(1, said.sum() + truth.sum()))
