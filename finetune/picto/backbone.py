"""The ResNet that both of the built-in models see with, taught by labels before anything is detected.

`stage: picto.backbone` has two lessons, a recipe each. "cuts": name the thing in the middle of a small cut-out, twelve
times cheaper than a scene, and the features carry over since nothing is resized. "scenes": say which class covers each
cell of a scene. Both leave the ResNet with its heads, and in `detector/` a fresh Grounding DINO that sees with it,
for `stage: detector` to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone

from finetune import rundir
from finetune.picto.dense import augment, cell_labels, dominant, pixels, presence_f1, recolour
from finetune.picto.fresh import RESNET_WIDTHS, resnet_config, write_detector
from finetune.picto.knowledge import load_knowledge
from finetune.picto.training import LessonConfig, generator, learn
from finetune.picto.world import SIDE, World

CUT = 64  # pixels of a cut-out's side
WEIGHTS = "backbone.safetensors"


class Config(LessonConfig):
    """lesson: see above. start: the folder of an earlier lesson."""

    stage: Literal["picto.backbone"]
    lesson: Literal["cuts", "scenes"]
    start: Path | None = None


class LabelledResNet(nn.Module):
    """The ResNet with a label head on each of its last two stages."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = AutoBackbone.from_config(resnet_config("stage3", "stage4"))
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes + 1, 1) for width in RESNET_WIDTHS[-2:])

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, S, S) → class logits (B, C + 1, S/16, S/16) and (B, C + 1, S/32, S/32); class C is nothing."""
        maps = self.backbone(pixel_values).feature_maps
        return [head(features) for head, features in zip(self.heads, maps, strict=True)]


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config)
    torch.manual_seed(config.seed)
    model = LabelledResNet(len(load_knowledge().classes))
    if config.start is not None:
        load_model(model, str(config.start / WEIGHTS))
    collate, loss = (cut_outs, cut_loss) if config.lesson == "cuts" else (scenes, scene_loss)
    validation = World(config.validation_world)
    metrics = learn(
        model,
        config,
        train=World(config.world),
        collate=collate,
        loss=loss,
        measure=lambda: {"presence_f1": presence(model, validation)},
    )
    save_model(model, str(config.output / WEIGHTS))
    rundir.write_folder(config.output / "detector", lambda place: write_detector(place, model.backbone.state_dict()))
    rundir.finish(config.output, metrics)


def cut_outs(scenes: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Every thing of the scenes, a little off the middle of its cut-out: pixels (N, 3, CUT, CUT), classes (N,)."""
    rng = generator()
    images, classes = [], []
    for scene in scenes:
        middle = (scene["boxes"][:, :2] + scene["boxes"][:, 2:]) / 2 * SIDE
        corners = np.clip((middle + rng.integers(-8, 9, middle.shape) - CUT // 2).astype(int), 0, SIDE - CUT)
        images += [scene["image"][y : y + CUT, x : x + CUT] for x, y in corners]
        classes.append(scene["classes"])
    values = pixels(np.stack(images))
    values = recolour(rng, values if rng.random() < 0.5 else values.flip(-1))
    return {"pixel_values": values, "labels": torch.from_numpy(np.concatenate(classes))}


def cut_loss(logits: Sequence[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
    return sum((F.cross_entropy(level.mean((2, 3)), classes) for level in logits), torch.zeros(()))


def scenes(scenes: Sequence[dict]) -> dict:
    """Moved and recoloured scenes: pixels (B, 3, S, S), and the class of each cell of both levels (B, G, G)."""
    values, boxes = augment(generator(), pixels(np.stack([s["image"] for s in scenes])), [s["boxes"] for s in scenes])
    classes = [s["classes"] for s in scenes]
    num_classes = len(load_knowledge().classes)
    labels = [dominant(cell_labels(classes, boxes, num_classes, SIDE // stride)[0]) for stride in (16, 32)]
    return {"pixel_values": values, "labels": labels}


def scene_loss(logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> torch.Tensor:
    losses = (F.cross_entropy(level, cells, label_smoothing=0.05) for level, cells in zip(logits, labels, strict=True))
    return sum(losses, torch.zeros(()))


def presence(model: LabelledResNet, world: World) -> float:
    """F1 of what the fine level sees anywhere in the scenes of `world`."""
    scores, truth = [], np.zeros((len(world), model.num_classes), bool)
    for start in range(0, len(world), 64):
        rows = [world[i] for i in range(start, min(len(world), start + 64))]
        fine = model(pixels(np.stack([row["image"] for row in rows])))[0]
        scores.append(fine.softmax(1)[:, :-1].amax((2, 3)).numpy())
        for i, row in enumerate(rows, start):
            truth[i, row["classes"]] = True
    return presence_f1(np.concatenate(scores), truth)
