"""The built-in model's eyes: a small ResNet with two transformer layers on top (DPT-hybrid).

    python -m finetune.picto.tower build/train build/val --out build/dense.pt
    python -m finetune.picto.tower build/train build/val --out build/tower.pt \
        --start build/dense.pt --detector build/detector.pt --steps 4500 --lr 1e-3

First the ResNet alone learns to name the thing in the middle of a small cut-out: twelve times cheaper than a scene,
and the features carry over since nothing is resized. Then the tower learns on whole scenes which classes cover each
cell and which have their centre in it. Its ResNet becomes the detector's backbone. The second command takes the ResNet
back once the detector has trained it further: the result is the reasoner's `vision_tower`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, DPTConfig, DPTModel, ResNetConfig

from finetune.picto.knowledge import load_knowledge
from finetune.picto.loop import Schedule, fit
from finetune.picto.scenebank import SIDE, SceneBank

CUT = 64  # pixels of a cut-out's side
GRID = SIDE // 32  # cells a side of the tower's tokens
WIDTH = 256


def backbone_config(out_features: tuple[str, ...]) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, WIDTH],
        depths=[1, 2, 2, 2],
        layer_type="basic",
        out_features=list(out_features),
    )


def tower_config() -> DPTConfig:
    return DPTConfig(
        is_hybrid=True,
        backbone_config=backbone_config(("stage2", "stage3", "stage4")).to_dict(),
        backbone_featmap_shape=[1, WIDTH, GRID, GRID],
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=SIDE,
        patch_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],  # the depth head is not used
    )


class CutClassifier(nn.Module):
    """The tower's ResNet, naming the thing in the middle of a cut-out from its last two stages."""

    def __init__(self, tower: DPTModel, num_classes: int):
        super().__init__()
        self.backbone = tower.embeddings.backbone
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in (128, WIDTH))

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, CUT, CUT) → logits (B, C) of stage 3 and of stage 4."""
        maps = self.backbone(pixel_values).feature_maps[1:]
        return [head(m.mean((2, 3))) for head, m in zip(self.heads, maps, strict=True)]


class DenseTower(nn.Module):
    """The tower with the label heads that only its training needs."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.tower = AutoModel.from_config(tower_config())
        nn.init.trunc_normal_(self.tower.embeddings.position_embeddings, std=0.02)
        self.fine = nn.Conv2d(128, num_classes + 1, 1)  # the class that covers most of a 14 x 14 cell, or none
        self.coarse = nn.Linear(WIDTH, num_classes)  # coverage on the 7 x 7 map, before attention
        last = nn.Linear(WIDTH, 2 * num_classes)  # coverage, centre
        self.tokens = nn.Sequential(nn.LayerNorm(WIDTH), last)
        for head in (self.coarse, last):
            nn.init.constant_(head.bias, -5.0)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) → logits: fine (B, C + 1, 14, 14), coarse, coverage and centre (B, 49, C)."""
        out = self.tower(pixel_values, output_hidden_states=True)
        coverage, centre = self.tokens(out.hidden_states[-1][:, 1:]).chunk(2, dim=-1)
        return (
            self.fine(out.intermediate_activations[1]),
            self.coarse(out.hidden_states[0][:, 1:]),
            coverage,
            centre,
        )

    def look(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) → what the attention layers get (B, 50, W), and how sure each class is there (B, C)."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        centre = self.tokens(hidden[-1][:, 1:]).chunk(2, dim=-1)[1]
        return hidden[0], centre.amax(1).sigmoid()


def pixels(images: np.ndarray) -> torch.Tensor:
    """(B, S, S, 3) uint8 → (B, 3, S, S) in -1..1, channels last in memory: twice as fast on a CPU."""
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return values.div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def augment(
    rng: np.random.Generator, values: torch.Tensor, boxes: list[np.ndarray]
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Mirror, shift by up to 20 pixels and recolour a batch."""
    if rng.random() < 0.5:
        values = values.flip(-1)
        boxes = [b[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0] if len(b) else b for b in boxes]
    dx, dy = (int(v) for v in rng.integers(-20, 21, 2))
    values = F.pad(values, (20, 20, 20, 20), mode="replicate")[..., 20 - dy : 20 - dy + SIDE, 20 - dx : 20 - dx + SIDE]
    shift = np.array([dx, dy, dx, dy]) / SIDE
    boxes = [np.clip(b + shift, 0, 1) for b in boxes]
    return recolour(rng, values), boxes


def recolour(rng: np.random.Generator, values: torch.Tensor) -> torch.Tensor:
    """Another light and other colours for each picture; some fade to grey."""
    gain = torch.from_numpy(rng.normal(1, 0.12, (len(values), 3, 1, 1))).float()
    bias = torch.from_numpy(rng.normal(0, 0.08, (len(values), 3, 1, 1))).float()
    grey = torch.from_numpy(rng.random((len(values), 1, 1, 1)) < 0.3).float() * float(rng.random())
    values = values * gain + bias
    values = values + grey * (values.mean(1, keepdim=True) - values)
    return values.clamp(-1.2, 1.2).contiguous(memory_format=torch.channels_last)


def dominant(coverage: torch.Tensor) -> torch.Tensor:
    """(B, G, G, C) coverage → (B, G, G) the class that covers most of a cell; C where none does."""
    most, which = coverage.max(-1)
    return torch.where(most > 0, which, coverage.shape[-1])


def cell_labels(
    classes: list[np.ndarray], boxes: list[np.ndarray], num_classes: int, grid: int
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


def presence_f1(scores: np.ndarray, truth: np.ndarray, threshold: float = 0.5) -> float:
    """Micro F1 of "this class is in the picture", both (N, C)."""
    said = scores > threshold
    hits = (said & truth).sum()
    return float(2 * hits / max(1, said.sum() + truth.sum()))


def cut_outs(rng: np.random.Generator, bank: SceneBank, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random things of the bank, each a little off the middle of its cut-out: (B, 3, CUT, CUT) and classes (B,)."""
    rows = bank.objects[np.sort(rng.integers(len(bank.objects), size=batch))]
    middle = np.stack([(rows[:, 2] + rows[:, 4]) / 2, (rows[:, 3] + rows[:, 5]) / 2], 1) * SIDE
    corner = np.clip((middle + rng.integers(-8, 9, middle.shape) - CUT // 2).astype(int), 0, SIDE - CUT)
    images = np.stack(
        [bank.images[int(r[0]), y : y + CUT, x : x + CUT] for r, (x, y) in zip(rows, corner, strict=True)]
    )
    return pixels(images), torch.from_numpy(rows[:, 1].astype(int))


def train(
    train_bank: Annotated[Path, typer.Argument()],
    val_bank: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option()] = Path("build/tower.pt"),
    cut_steps: int = 700,
    steps: int = 2400,
    batch: int = 32,
    lr: float = 1.5e-3,
    seed: int = 0,
    start: Annotated[Path | None, typer.Option(help="Go on from this tower, without cut-outs.")] = None,
    detector: Annotated[Path | None, typer.Option(help="Take the ResNet of this trained detector.")] = None,
) -> None:
    """Train the tower; prints presence F1 on fresh scenes."""
    num_classes = len(load_knowledge().classes)
    torch.manual_seed(seed)
    bank, val = SceneBank.open(train_bank), SceneBank.open(val_bank)
    model = DenseTower(num_classes).to(memory_format=torch.channels_last).train()
    classifier = CutClassifier(model.tower, num_classes)  # shares the ResNet

    def cut_loss(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step, 1))
        values, target = cut_outs(rng, bank, batch=192)
        values = recolour(rng, values if rng.random() < 0.5 else values.flip(-1))
        early, late = classifier(values)
        parts = {"early": F.cross_entropy(early, target), "late": F.cross_entropy(late, target)}
        return {
            "loss": parts["early"] + parts["late"],
            **parts,
            "accuracy": (late.argmax(1) == target).float().mean(),
        }

    if start is None:
        fit(classifier, cut_loss, Schedule(cut_steps, 2e-3), out.with_stem("cuts"))
    else:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
        resnet = model.tower.embeddings.backbone
        for part in (
            resnet.embedder,
            resnet.encoder.stages[0],
        ):  # they have learned what they can, and cost most
            part.requires_grad_(False)
    if detector is not None:
        _take_resnet(model, torch.load(detector, weights_only=True)["model"])

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step))
        chosen = np.sort(rng.integers(len(bank), size=batch))
        classes, boxes = zip(*(bank.of(int(i)) for i in chosen), strict=True)
        values, moved = augment(rng, pixels(bank.images[chosen]), list(boxes))
        fine, coarse, coverage, centre = model(values)
        target_fine, _ = cell_labels(list(classes), moved, num_classes, 2 * GRID)
        target_coverage, target_centre = cell_labels(list(classes), moved, num_classes, GRID)
        target_coverage, target_centre = target_coverage.flatten(1, 2), target_centre.flatten(1, 2)
        parts = {
            "fine": F.cross_entropy(fine, dominant(target_fine), label_smoothing=0.05),
            "coarse": _bce(coarse, target_coverage),
            "coverage": _bce(coverage, target_coverage),
            "centre": _bce(centre, target_centre),
        }
        return {"loss": parts["fine"] + 0.5 * parts["coarse"] + parts["coverage"] + parts["centre"], **parts}

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        scores, truth = [], np.zeros((len(val), num_classes), bool)
        for start in range(0, len(val), 64):
            logits = model(pixels(val.images[start : start + 64]))[3]
            scores.append(logits.amax(1).sigmoid().numpy())
        for i in range(len(val)):
            truth[i, val.of(i)[0]] = True
        return {"presence F1": presence_f1(np.concatenate(scores), truth)}

    fit(model, loss_of, Schedule(steps, lr), out, evaluate=evaluate, evaluate_every=300)


def _take_resnet(model: DenseTower, detector: dict[str, torch.Tensor]) -> None:
    prefix = "model.backbone.conv_encoder.model."
    resnet = {k.removeprefix(prefix): v for k, v in detector.items() if k.startswith(prefix)}
    result = model.tower.embeddings.backbone.load_state_dict(resnet, strict=False)
    wrong = [
        *result.unexpected_keys,
        *(k for k in result.missing_keys if not k.endswith("num_batches_tracked")),
    ]
    if wrong:
        raise ValueError(f"the detector's backbone is of another shape than the tower's: {wrong}")


def _bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed and divided by the amount of positives."""
    total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return total / target.sum().clamp(min=1)


if __name__ == "__main__":
    typer.run(train)
