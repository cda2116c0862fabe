"""The built-in reasoner's eyes (`stage: picto.tower`): a ResNet with transformer layers on top, a DPT-hybrid.

It learns on whole scenes which classes cover each cell and which have their centre in it, so that its tokens tell what
is where before a language model reads them. The ResNet comes from the trained detector, where it has learned to find
small things, too. With the tower stay its heads, which say how well a scene can be read: see `lessons`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText

from finetune import rundir
from finetune.picto.dense import augment, cell_labels, dominant, pixels, presence_f1, sparse_bce
from finetune.picto.fresh import GRID, TOWER_WIDTH, tower_config
from finetune.picto.knowledge import load_knowledge
from finetune.picto.training import LessonConfig, generator, learn
from finetune.picto.world import World

WEIGHTS = "tower.safetensors"
RESNET_IN_DETECTOR = "model.backbone.conv_encoder.model."


class Config(LessonConfig):
    """detector: folder of the trained detector, whose ResNet the tower starts with.

    start: folder of a reasoner, whose tower to go on with instead.
    anchor: how strongly its tokens are then held to what they were, so that the language model still reads them.
    """

    stage: Literal["picto.tower"]
    detector: Path
    start: Path | None = None
    anchor: float = Field(default=0.0, ge=0)


class DenseTower(nn.Module):
    """The tower with the label heads that only its training needs."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.tower = AutoModel.from_config(tower_config())
        nn.init.trunc_normal_(self.tower.embeddings.position_embeddings, std=0.02)
        self.early = nn.Linear(TOWER_WIDTH, num_classes + 1)  # the class that covers most of a cell, before attention
        last = nn.Linear(TOWER_WIDTH, 2 * num_classes)  # coverage, centre
        self.tokens = nn.Sequential(nn.LayerNorm(TOWER_WIDTH), last)
        nn.init.constant_(last.bias, -5.0)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) → logits (B, cells, …): the class before attention (C + 1), coverage and centre (C)."""
        return self.read(self.tower(pixel_values, output_hidden_states=True).hidden_states)

    def read(self, hidden: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of the tower's hidden states."""
        coverage, centre = self.tokens(hidden[-1][:, 1:]).chunk(2, dim=-1)
        return self.early(hidden[0][:, 1:]), coverage, centre

    def look(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) → how sure each class is there, (B, C) in 0..1."""
        return self(pixel_values)[2].amax(1).sigmoid()


class Anchored(nn.Module):
    """A tower in training that also says how far its tokens have gone from where they were, of their variance."""

    def __init__(self, model: DenseTower):
        super().__init__()
        self.model = model
        self.before = copy.deepcopy(model.tower).requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.model.tower(pixel_values, output_hidden_states=True).hidden_states
        with torch.no_grad():
            before = self.before.eval()(pixel_values, output_hidden_states=True).hidden_states[-1]
        return *self.model.read(hidden), (hidden[-1] - before).square().mean() / before.var()


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config)
    torch.manual_seed(config.seed)
    model = DenseTower(len(load_knowledge().classes))
    if config.start is None:
        take_resnet(model, load_file(config.detector / "model.safetensors"))
    else:
        reasoner = AutoModelForImageTextToText.from_pretrained(config.start, dtype=torch.float32)
        model.tower.load_state_dict(reasoner.model.vision_tower.state_dict())
    resnet = model.tower.embeddings.backbone
    for part in (resnet.embedder, resnet.encoder.stages[0]):  # they have learned what they can, and cost most
        part.requires_grad_(False)
    anchored = config.start is not None and config.anchor > 0
    validation = World(config.validation_world)
    metrics = learn(
        Anchored(model) if anchored else model,
        config,
        train=World(config.world),
        collate=scenes,
        loss=partial(anchored_loss, strength=config.anchor) if anchored else dense_loss,
        measure=lambda: {"presence_f1": presence_f1(*look_at(model, validation), threshold=0.35)},
    )
    save_model(model, str(config.output / WEIGHTS))
    rundir.finish(config.output, metrics)


def take_resnet(model: DenseTower, detector: dict[str, torch.Tensor]) -> None:
    """Give the tower the detector's ResNet. Raises `ValueError` where its shape is another."""
    resnet = {k.removeprefix(RESNET_IN_DETECTOR): v for k, v in detector.items() if k.startswith(RESNET_IN_DETECTOR)}
    wanted = model.tower.embeddings.backbone.state_dict()
    missing = [name for name in wanted if name not in resnet and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"the detector's backbone lacks {missing}: it is of another shape than the tower's")
    model.tower.embeddings.backbone.load_state_dict({k: resnet.get(k, v) for k, v in wanted.items()})


def scenes(scenes: Sequence[dict]) -> dict:
    """Moved and recoloured scenes with their cells' labels, coverage and centre (B, cells, C)."""
    values, boxes = augment(generator(), pixels(np.stack([s["image"] for s in scenes])), [s["boxes"] for s in scenes])
    labels = cell_labels([s["classes"] for s in scenes], boxes, len(load_knowledge().classes), GRID)
    return {"pixel_values": values, "labels": [cells.flatten(1, 2) for cells in labels]}


def dense_loss(logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> torch.Tensor:
    (early, *late), coverage = logits, labels[0]
    first = F.cross_entropy(early.flatten(0, 1), dominant(coverage).flatten(), label_smoothing=0.05)
    return first + sum(sparse_bce(said, true) for said, true in zip(late, labels, strict=True))


def anchored_loss(output: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    *logits, distance = output
    return dense_loss(logits, labels) + strength * distance


@torch.inference_mode()
def look_at(model: DenseTower, world: World) -> tuple[np.ndarray, np.ndarray]:
    """How sure the tower is of each class in each scene (N, C), and what is there, (N, C) bool."""
    scores, truth = [], np.zeros((len(world), model.num_classes), bool)
    for start in range(0, len(world), 64):
        rows = [world[i] for i in range(start, min(len(world), start + 64))]
        scores.append(model.look(pixels(np.stack([row["image"] for row in rows]))).numpy())
        for i, row in enumerate(rows, start):
            truth[i, row["classes"]] = True
    return np.concatenate(scores), truth
