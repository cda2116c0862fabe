"""The built-in model's detector: a small `GroundingDinoForObjectDetection`, trained from scratch.

    python -m finetune.picto.detector build/train build/val --tower build/tower.pt --out build/detector.pt

The loss is ours, since the one in transformers numbers the names of a batch wrongly for more than two images and
gives the encoder's proposals no useful gradient: focal on the tokens of each name, L1 and GIoU on boxes, Hungarian
matching for every decoder layer, and all cells near a thing's centre for the proposals.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection

from finetune.picto.knowledge import Knowledge, load_knowledge
from finetune.picto.loop import Schedule, fit, parameter_groups
from finetune.picto.scenebank import SIDE, SceneBank
from finetune.picto.tower import augment, backbone_config, pixels

WIDTH = 128
MAX_TEXT = 96  # tokens of a prompt
# transformers' Grounding DINO writes these ids into its text masks.
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


def make_tokenizer(knowledge: Knowledge, folder: Path) -> BertTokenizer:
    """A WordPiece vocabulary: every word of a name is one token, anything else is spelled letter by letter."""
    words = sorted(
        {w for c in knowledge.classes.values() for name in c.names for w in name.lower().replace("-", " ").split()}
    )
    letters = [*string.ascii_lowercase, *string.digits, "-", "'", "&"]
    tokens = [*letters, *(f"##{c}" for c in string.ascii_lowercase + string.digits), *words]
    tokens = [t for t in dict.fromkeys(tokens) if t not in SPECIAL_IDS]
    vocabulary = {i: t for t, i in SPECIAL_IDS.items()}
    free = (i for i in range(SPECIAL_IDS["?"]) if i not in vocabulary)
    vocabulary.update({next(free): t for t in tokens})
    last = max(vocabulary)
    lines = [vocabulary.get(i, f"[unused{i}]") for i in range(last + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(file), do_lower_case=True, model_max_length=MAX_TEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def detector_config(vocabulary: int) -> GroundingDinoConfig:
    return GroundingDinoConfig(
        backbone_config=backbone_config(("stage3", "stage4")).to_dict(),
        text_config={
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": MAX_TEXT,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        num_queries=40,
        encoder_layers=2,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_attention_heads=4,
        d_model=WIDTH,
        dropout=0.0,
        fusion_droppath=0.0,
        num_feature_levels=3,
        max_text_len=MAX_TEXT,
    )


def make_detector(vocabulary: int, tower: dict[str, torch.Tensor] | None = None) -> GroundingDinoForObjectDetection:
    """A fresh detector; `tower` is the state of a trained `DenseTower`, whose ResNet becomes the backbone."""
    model = GroundingDinoForObjectDetection(detector_config(vocabulary))
    with torch.no_grad():
        # Fusion starts at 1e-4 and would take most of a short training to open. Class scores are plain dot products
        # of two normalised vectors, so the first loss would be in the hundreds: scale the text down, on its way out
        # of the encoder. (Not the decoder's norm: its boxes are refined before that norm and scored after it, by the
        # same head, which then works only if the norm keeps the scale.)
        for name, parameter in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                parameter.fill_(0.1)
        model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.weight.fill_(0.1)
    if tower is not None:
        prefix = "tower.embeddings.backbone."
        resnet = {k.removeprefix(prefix): v for k, v in tower.items() if k.startswith(prefix)}
        backbone = model.model.backbone.conv_encoder.model
        missing = backbone.load_state_dict(
            {k: v for k, v in resnet.items() if not k.endswith("num_batches_tracked")}, strict=False
        ).missing_keys
        if missing:
            raise ValueError(f"the tower lacks {missing}: it is of another shape than the detector's backbone")
    return model  # transformers leaves the stem and the first stage frozen, which a trained ResNet can bear


@dataclass(frozen=True)
class Prompts:
    """Names as token ids; spans are the tokens of each name."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    spans: list[list[tuple[int, int]]]


def encode_prompts(tokenizer: BertTokenizer, names: Sequence[Sequence[str]]) -> Prompts:
    """The same ids as the tokenizer gives for "cup . bottle . ", with the token range of each name."""
    rows, spans = [], []
    for asked in names:
        ids, ranges = [SPECIAL_IDS["[CLS]"]], []
        for name in asked:
            tokens = tokenizer(name, add_special_tokens=False)["input_ids"]
            ranges.append((len(ids), len(ids) + len(tokens)))
            ids += [*tokens, SPECIAL_IDS["."]]
        rows.append([*ids, SPECIAL_IDS["[SEP]"]])
        spans.append(ranges)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return Prompts(input_ids, (input_ids != 0).long(), spans)


def draw_names(rng: np.random.Generator, knowledge: Knowledge, present: Sequence[int]) -> tuple[list[str], list[int]]:
    """What to ask about a scene: some that is there and some that is not, in any order; names and their classes."""
    here = [int(c) for c in rng.permutation(sorted(set(present)))]
    if rng.random() < 0.25:  # one name, as prompting="separate" asks
        chosen = here[:1] if rng.random() < 0.65 and here else [int(rng.integers(len(knowledge.classes)))]
    else:
        chosen = here[: int(rng.integers(1, 8))] + [
            int(c) for c in rng.integers(len(knowledge.classes), size=rng.integers(1, 7))
        ]
    chosen = [int(c) for c in rng.permutation(list(dict.fromkeys(chosen)))]
    classes = list(knowledge.classes.values())
    names = [c.names[0] if rng.random() < 0.75 else str(rng.choice(c.names)) for c in (classes[i] for i in chosen)]
    return names, chosen


@dataclass(frozen=True)
class Truth:
    """What one prompt should find: boxes (n, 4) cxcywh in 0..1, and their tokens (n, T) as 0/1."""

    boxes: torch.Tensor
    tokens: torch.Tensor


def make_truth(
    spans: Sequence[tuple[int, int]],
    chosen: Sequence[int],
    classes: np.ndarray,
    boxes: np.ndarray,
    length: int,
) -> Truth:
    kept, rows = [], []
    for name, box in zip(classes, boxes, strict=True):
        if int(name) in chosen and box[2] - box[0] > 0.02 and box[3] - box[1] > 0.02:
            first, last = spans[chosen.index(int(name))]
            row = torch.zeros(length)
            row[first:last] = 1
            rows.append(row)
            kept.append(box)
    if not kept:
        return Truth(torch.zeros(0, 4), torch.zeros(0, length))
    return Truth(box_convert(torch.tensor(np.array(kept)).float(), "xyxy", "cxcywh"), torch.stack(rows))


def focal(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sigmoid focal loss (alpha 0.25, gamma 2), summed where `valid`."""
    loss = sigmoid_focal_loss(logits.masked_fill(~valid, 0.0), target, alpha=0.25, gamma=2)
    return (loss * valid).sum()


def box_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """5 L1 + 2 (1 - GIoU), summed over pairs of (n, 4) cxcywh boxes."""
    corners = (box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy"))
    return 5 * F.l1_loss(predicted, target, reduction="sum") + 2 * generalized_box_iou_loss(*corners, reduction="sum")


@torch.no_grad()
def match(logits: torch.Tensor, boxes: torch.Tensor, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Hungarian matching of queries (Q) to things (n): class, L1 and GIoU costs as in DETR's descendants."""
    if not len(truth.boxes):
        return np.zeros(0, int), np.zeros(0, int)
    p = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    gain = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()  # (Q, T)
    share = truth.tokens / truth.tokens.sum(1, keepdim=True)
    cost = 2 * gain @ share.T + 5 * torch.cdist(boxes, truth.boxes, p=1)
    cost = cost - 2 * generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth.boxes, "cxcywh", "xyxy")
    )
    return linear_sum_assignment(cost.numpy())


def near_centre(truth: Truth, centres: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """For each proposal cell the thing whose centre it is near to, or -1. `centres` (N, 2) in 0..1, `levels` (N,)."""
    owner = torch.full((len(centres),), -1)
    for i in torch.argsort(-truth.boxes[:, 2] * truth.boxes[:, 3]).tolist():  # small things claim last
        x, y, w, h = truth.boxes[i].tolist()
        side = max(w, h)
        wanted = {0} if side < 0.2 else {0, 1} if side < 0.32 else {1}
        for level in wanted:
            at = levels == level
            offset = (centres - torch.tensor([x, y])).abs()
            inside = at & (offset[:, 0] < 0.22 * w) & (offset[:, 1] < 0.22 * h)
            nearest = torch.where(at, offset.square().sum(1), torch.inf).argmin()
            owner[inside] = i
            owner[nearest] = i
    return owner


@functools.cache
def proposal_grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Centres (N, 2) and levels (N,) of the encoder's cells, in its order."""
    centres, levels = [], []
    for level, stride in enumerate((16, 32, 64)):
        n = -(-SIDE // stride)
        ys, xs = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        centres.append((torch.stack([xs, ys], -1).flatten(0, 1) + 0.5) / n)
        levels.append(torch.full((n * n,), level))
    return torch.cat(centres), torch.cat(levels)


def detector_loss(
    model: GroundingDinoForObjectDetection, values: torch.Tensor, prompts: Prompts, truths: list[Truth]
) -> dict[str, torch.Tensor]:
    mask = prompts.attention_mask
    out = model.model(pixel_values=values, input_ids=prompts.input_ids, attention_mask=mask)
    length = mask.shape[1]
    valid = mask.bool()[:, None]  # (B, 1, T)
    count = max(1, sum(len(t.boxes) for t in truths))

    usable = out.enc_outputs_coord_logits.isfinite().all(-1)  # cells at the very edge are left out by the model
    owners = torch.stack([near_centre(t, *proposal_grid()) for t in truths]).masked_fill(~usable, -1)
    near = owners >= 0
    target = torch.zeros(*near.shape, length)
    for i, truth in enumerate(truths):
        target[i, near[i]] = truth.tokens[owners[i, near[i]]]
    wanted = torch.cat([t.boxes[o[n]] for t, o, n in zip(truths, owners, near, strict=True)])
    proposals = focal(out.enc_outputs_class[..., :length], target, valid & usable[..., None])
    proposals = proposals + box_losses(out.enc_outputs_coord_logits[near].sigmoid(), wanted)
    proposals = proposals / max(1, int(near.sum()))

    tokens, boxes = torch.zeros(()), torch.zeros(())
    reference = out.init_reference_points
    for level in range(out.intermediate_hidden_states.shape[1]):
        hidden = out.intermediate_hidden_states[:, level]
        logits = model.class_embed[level](hidden, out.encoder_last_hidden_state_text, valid[:, 0])[..., :length]
        predicted = (model.bbox_embed[level](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()
        reference = out.intermediate_reference_points[:, level]
        scored = logits.detach().masked_fill(~valid, -20.0)
        matches = [match(s, p, t) for s, p, t in zip(scored, predicted.detach(), truths, strict=True)]
        target = torch.zeros(*logits.shape)
        for i, (queries, things) in enumerate(matches):
            target[i, queries] = truths[i].tokens[things]
        tokens = tokens + focal(logits, target, valid) / count
        chosen = torch.cat([predicted[i, queries] for i, (queries, _) in enumerate(matches)])
        wanted = torch.cat([t.boxes[things] for t, (_, things) in zip(truths, matches, strict=True)])
        boxes = boxes + box_losses(chosen, wanted) / count
    return {"loss": proposals + 2 * tokens + boxes, "proposals": proposals, "tokens": tokens, "boxes": boxes}


def train(
    train_bank: Annotated[Path, typer.Argument()],
    val_bank: Annotated[Path, typer.Argument()],
    tower: Annotated[Path, typer.Option(help="A checkpoint of finetune.picto.tower.")] = Path("build/tower.pt"),
    out: Annotated[Path, typer.Option()] = Path("build/detector.pt"),
    steps: int = 3000,
    batch: int = 16,
    lr: float = 6e-4,
    seed: int = 0,
    start: Annotated[Path | None, typer.Option(help="Go on from the weights of this detector.")] = None,
) -> None:
    """Train the detector; prints AP50 on fresh scenes, asked for present and absent names."""
    torch.manual_seed(seed)
    knowledge = load_knowledge()
    bank, val = SceneBank.open(train_bank), SceneBank.open(val_bank)
    tokenizer = make_tokenizer(knowledge, out.parent / "tokenizer")
    state = torch.load(tower, weights_only=True)["model"]
    model = make_detector(len(tokenizer), state).to(memory_format=torch.channels_last).train()

    if start is not None:
        model.load_state_dict(torch.load(start, weights_only=True)["model"])

    def batch_of(rng: np.random.Generator, source: SceneBank, chosen: np.ndarray, moving: bool):
        classes, boxes = (list(x) for x in zip(*(source.of(int(i)) for i in chosen), strict=True))
        values = pixels(source.images[chosen])
        if moving:
            values, boxes = augment(rng, values, boxes)
        asked, indices = zip(*(draw_names(rng, knowledge, c) for c in classes), strict=True)
        prompts = encode_prompts(tokenizer, asked)
        length = prompts.input_ids.shape[1]
        truths = [
            make_truth(s, k, c, b, length) for s, k, c, b in zip(prompts.spans, indices, classes, boxes, strict=True)
        ]
        return values, prompts, truths

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step, 2))
        return detector_loss(model, *batch_of(rng, bank, np.sort(rng.integers(len(bank), size=batch)), True))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng((seed, 3))
        found: list[tuple[float, bool]] = []
        total = 0
        for start in range(0, 320, 32):
            values, prompts, truths = batch_of(rng, val, np.arange(start, start + 32), False)
            out = model(pixel_values=values, input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)
            for i, truth in enumerate(truths):
                found += _judge(out.logits[i].sigmoid(), out.pred_boxes[i], prompts.spans[i], truth)
                total += len(truth.boxes)
        return {"AP50": average_precision(found, total)}

    groups = parameter_groups(model, lr, slow="conv_encoder", slow_factor=0.2)
    fit(
        model,
        loss_of,
        Schedule(steps, lr, clip=1.0),
        out,
        groups=groups,
        evaluate=evaluate,
        evaluate_every=400,
    )


def _judge(
    scores: torch.Tensor, boxes: torch.Tensor, spans: Sequence[tuple[int, int]], truth: Truth
) -> list[tuple[float, bool]]:
    """Score and correctness (IoU ≥ 0.5 with a thing not yet taken) of every (query, name) of one picture."""
    judged = []
    xyxy = box_convert(boxes, "cxcywh", "xyxy")
    for first, last in spans:
        mine = truth.tokens[:, first] == 1 if len(truth.tokens) else torch.zeros(0, dtype=torch.bool)
        things = box_convert(truth.boxes[mine], "cxcywh", "xyxy")
        best = scores[:, first:last].amax(1)
        taken = [False] * len(things)
        for q in torch.argsort(-best)[:12].tolist():
            hit = False
            if len(things):
                a = xyxy[q][None]
                wh = (torch.minimum(a[:, 2:], things[:, 2:]) - torch.maximum(a[:, :2], things[:, :2])).clamp(min=0)
                inter = wh.prod(1)
                area = (a[:, 2:] - a[:, :2]).prod(1) + (things[:, 2:] - things[:, :2]).prod(1) - inter
                for t in torch.argsort(-(inter / area)).tolist():
                    if inter[t] / area[t] >= 0.5 and not taken[t]:
                        taken[t] = hit = True
                        break
            judged.append((float(best[q]), hit))
    return judged


def average_precision(found: Sequence[tuple[float, bool]], total: int) -> float:
    """Area under the precision-recall curve of (score, correct) pairs."""
    hits = np.array([hit for _, hit in sorted(found, key=lambda f: -f[0])], float)
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hits).sum() / max(1, total))


if __name__ == "__main__":
    typer.run(train)
