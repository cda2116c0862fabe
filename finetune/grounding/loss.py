"""What a Grounding DINO learns from: pure functions of what it predicts and of what is true.

    predicted = predict(model, inputs)                              # finetune.grounding.predict
    losses = detection_loss(predicted, truths, proposals="matched")
    losses["loss"].backward()

The parts are those of Grounding DINO (Liu et al. 2023, https://arxiv.org/abs/2303.05499): the sigmoid of every query
and token is a class probability, learned by the focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002); boxes
by L1 and generalised IoU; queries are matched one to one with things as in DETR (Carion et al. 2020,
https://arxiv.org/abs/2005.12872), in every decoder layer, with the costs of Deformable DETR (Zhu et al. 2020,
https://arxiv.org/abs/2010.04159), whose two-stage proposals the encoder makes.

The loss inside transformers' Grounding DINO is not used: it mixes up the names of the pictures of a batch, and its
encoder loss is of detached boxes, from which the encoder's heads learn nothing. Left out: the denoising queries of
DINO, which transformers' models do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0  # of costs and losses, as in Deformable DETR
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
IMPOSSIBLE = -20.0  # the logit of a token that is padding

Proposals = Literal["matched", "centres"]


class Truth(TypedDict):
    """The n things of one picture.

    boxes: (n, 4) cxcywh in fractions of the picture. tokens: (n, T), 1 at the prompt's tokens of each thing's name.
    """

    boxes: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Cells:
    """The proposals of the encoder: one for each of the N cells of all its feature levels.

    logits: (B, N, T). boxes: (B, N, 4) cxcywh in fractions of the picture. centres, sizes: (B, N, 2) of the cells, x
    and y in fractions of the picture. levels: (N,), 0 is the finest. usable: (B, N) bool; the others lie in the
    padding or at the very edge, where the model proposes nothing.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    centres: torch.Tensor
    sizes: torch.Tensor
    levels: torch.Tensor
    usable: torch.Tensor


@dataclass(frozen=True)
class Predictions:
    """What a forward pass says of B pictures, asked with prompts of T tokens, in L decoder layers of Q queries.

    logits: (L, B, Q, T). boxes: (L, B, Q, 4) cxcywh in fractions of the picture. text_mask: (B, T) bool, False where
    a prompt is padded. cells: None for a model without proposals (`two_stage: false`).
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    text_mask: torch.Tensor
    cells: Cells | None


def detection_loss(
    predicted: Predictions,
    truths: Sequence[Truth],
    *,
    proposals: Proposals = "matched",
    count: float | torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The loss to minimise under "loss", and its parts: "tokens" and "boxes" of all layers, and "proposals".

    proposals: how the encoder's are taught. "matched": the best Q of them are matched one to one, as the original
    does. "centres": every cell near a thing's centre is to propose it, which teaches a network that knows nothing
    yet much faster. count: things to divide by, else those of `truths`; with several processes their mean over them.
    """
    count = max(1, sum(len(truth["boxes"]) for truth in truths)) if count is None else count
    truths = [{"boxes": t["boxes"].to(predicted.boxes), "tokens": t["tokens"].to(predicted.boxes)} for t in truths]
    layers = [
        matched_losses(logits, boxes, predicted.text_mask, truths)
        for logits, boxes in zip(predicted.logits, predicted.boxes, strict=True)
    ]
    tokens = torch.stack([tokens for tokens, _ in layers]).sum() / count
    boxes = torch.stack([boxes for _, boxes in layers]).sum() / count
    losses = {"tokens": CLASS_WEIGHT * tokens, "boxes": boxes}
    if predicted.cells is not None and proposals == "centres":
        losses["proposals"] = centre_losses(predicted.cells, predicted.text_mask, truths)
    elif predicted.cells is not None:
        best = best_cells(predicted.cells.logits, predicted.text_mask, predicted.boxes.shape[2])
        cell_logits, cell_boxes = (take(x, best) for x in (predicted.cells.logits, predicted.cells.boxes))
        cell_tokens, cell_boxes = matched_losses(cell_logits, cell_boxes, predicted.text_mask, truths)
        losses["proposals"] = (CLASS_WEIGHT * cell_tokens + cell_boxes) / count
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def matched_losses(
    logits: torch.Tensor, boxes: torch.Tensor, text_mask: torch.Tensor, truths: Sequence[Truth]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal loss and weighted box losses of queries (B, Q, T) and (B, Q, 4), matched one to one; sums."""
    scored = logits.detach().masked_fill(~text_mask[:, None], IMPOSSIBLE)
    matches = [match(s, b, truth) for s, b, truth in zip(scored, boxes.detach(), truths, strict=True)]
    target = torch.zeros_like(logits)
    for row, (queries, things) in enumerate(matches):
        target[row, queries] = truths[row]["tokens"][things]
    chosen = torch.cat([boxes[row, queries] for row, (queries, _) in enumerate(matches)])
    wanted = torch.cat([truth["boxes"][things] for truth, (_, things) in zip(truths, matches, strict=True)])
    return focal(logits, target, text_mask[:, None]), box_losses(chosen, wanted)


def focal(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sigmoid focal loss, summed where `valid`, which broadcasts to the shape of `logits`."""
    loss = sigmoid_focal_loss(logits.masked_fill(~valid, 0.0), target, alpha=ALPHA, gamma=GAMMA)
    return (loss * valid).sum()


def box_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weighted L1 and 1 - GIoU of pairs of boxes, (n, 4) cxcywh each; summed."""
    corners = (box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy"))
    l1 = F.l1_loss(predicted, target, reduction="sum")
    return L1_WEIGHT * l1 + GIOU_WEIGHT * generalized_box_iou_loss(*corners, reduction="sum")


@torch.no_grad()
def match(logits: torch.Tensor, boxes: torch.Tensor, truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest pairs of queries, (Q, T) and (Q, 4), and things: indices (m,) of each, m the smaller of Q and n.

    A pair costs what the focal loss would rise by on the tokens of the name, averaged over them, and the box losses.
    """
    probability = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    gain = ALPHA * (1 - probability) ** GAMMA * -probability.log()
    gain = gain - (1 - ALPHA) * probability**GAMMA * -(1 - probability).log()  # (Q, T)
    share = truth["tokens"] / truth["tokens"].sum(1, keepdim=True).clamp(min=1)
    corners = (box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth["boxes"], "cxcywh", "xyxy"))
    cost = CLASS_WEIGHT * gain @ share.T + L1_WEIGHT * torch.cdist(boxes, truth["boxes"], p=1)
    cost = cost - GIOU_WEIGHT * generalized_box_iou(*corners)
    queries, things = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(queries, device=boxes.device), torch.as_tensor(things, device=boxes.device)


def best_cells(logits: torch.Tensor, text_mask: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` cells (B, count) of (B, N, T) with the best tokens: those that become the decoder's queries."""
    return logits.masked_fill(~text_mask[:, None], -torch.inf).amax(-1).topk(count, dim=1).indices


def take(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` (B, k) of `values` (B, N, D)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


def centre_losses(cells: Cells, text_mask: torch.Tensor, truths: Sequence[Truth]) -> torch.Tensor:
    """Focal and box losses of all cells, each to propose the thing whose centre it is near to, per such cell."""
    target = torch.zeros_like(cells.logits)
    wanted, near = [], []
    for row, truth in enumerate(truths):
        owner = near_centre(truth["boxes"], cells.centres[row], cells.sizes[row], cells.levels, cells.usable[row])
        owned = owner >= 0
        target[row, owned] = truth["tokens"][owner[owned]]
        wanted.append(truth["boxes"][owner[owned]])
        near.append(owned)
    tokens = focal(cells.logits, target, text_mask[:, None] & cells.usable[..., None])
    owned = torch.stack(near)
    return (tokens + box_losses(cells.boxes[owned], torch.cat(wanted))) / owned.sum().clamp(min=1)


def near_centre(
    boxes: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor, levels: torch.Tensor, usable: torch.Tensor
) -> torch.Tensor:
    """For each cell the thing (n, 4) whose centre it is near to, or -1: (N,).

    Sampling as in FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355): a thing is taught at the levels where
    it is about 1.4 to 4.5 cells long, in the middle 0.44 of it and at least at the nearest cell of each level. Of
    several things at one cell the smallest counts.
    """
    if not len(boxes):
        return torch.full((len(centres),), -1, device=centres.device)
    length = (boxes[:, None, 2:] / sizes).amax(-1)  # (n, N), in cells
    fits = ((length >= 1.4) | (levels == 0)) & ((length <= 4.5) | (levels == levels.max())) & usable
    offset = (centres - boxes[:, None, :2]).abs()
    claimed = fits & (offset < 0.22 * boxes[:, None, 2:]).all(-1)
    distance = offset.square().sum(-1)
    for level in levels.unique():
        nearest, cell = distance.masked_fill(~(fits & (levels == level)), torch.inf).min(1)
        reached = nearest.isfinite().nonzero()[:, 0]
        claimed[reached, cell[reached]] = True
    area = boxes[:, 2] * boxes[:, 3]
    smallest, owner = torch.where(claimed, area[:, None], torch.inf).min(0)
    return torch.where(smallest.isfinite(), owner, -1)
