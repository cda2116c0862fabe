"""What each way to a faster Grounding DINO on a CPU gives, part by part, on the same tensors.

    python -m benchmarks.detector_candidates

The candidates of a part take turns. Prints a table in Markdown; `docs/performance.md` says what was chosen.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.detector_contenders import random_model
from detgpt.detectors.lean import CHUNK, LowRankFusion, make_lean

TEXT_TOKENS = 12
Candidates = dict[str, Callable[[], Any]]


def feed_forward(tokens: int) -> Candidates:
    """The 256 → 2048 → 256 layers of the encoder on every image token."""
    plain = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256)).eval()
    half = copy.deepcopy(plain).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this interface
        int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear})
    inputs = torch.randn(tokens, 256)
    return {
        "all tokens at once (transformers)": lambda: plain(inputs),
        "in pieces": lambda: [plain(part) for part in inputs.split(CHUNK)],
        "in pieces, bfloat16": lambda: [half(part.bfloat16()).float() for part in inputs.split(CHUNK)],
        "in pieces, dynamic int8": lambda: [int8(part) for part in inputs.split(CHUNK)],
    }


def deformable(model: Any, lean: Any, shapes: list[tuple[int, int]]) -> Candidates:
    """The deformable half of an encoder layer without its feed-forward layers."""
    theirs = model.model.encoder.layers[0].deformable_layer.self_attn
    ours = lean.model.encoder.layers[0].deformable_layer.attention
    tokens = sum(height * width for height, width in shapes)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 256),
        "encoder_hidden_states": torch.randn(1, tokens, 256),
        "position_embeddings": torch.randn(1, tokens, 256),
        "attention_mask": torch.ones(1, tokens, dtype=torch.bool),
        "reference_points": model.model.encoder.get_reference_points(shapes, torch.ones(1, len(shapes), 2), "cpu"),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }
    return {"grid_sample (transformers)": lambda: theirs(**inputs), "embedding bag": lambda: ours(**inputs)}


def fusion(model: Any, tokens: int) -> Candidates:
    """Attention between image and text in an encoder layer."""
    theirs = model.model.encoder.layers[0].fusion_layer.attn
    inputs = torch.randn(1, tokens, 256), torch.randn(1, TEXT_TOKENS, 256)
    ours = LowRankFusion(theirs)
    return {"image projected (transformers)": lambda: theirs(*inputs), "text projected": lambda: ours(*inputs)}


def backbone(model: Any, lean: Any, fast: Any, pixels: torch.Tensor, compiled: bool) -> Candidates:
    """The Swin-T image encoder."""
    plain = model.model.backbone.conv_encoder.model
    candidates: Candidates = {
        "transformers": lambda: plain(pixels),
        "lean": lambda: lean.model.backbone.conv_encoder.model(pixels),
        "lean, bfloat16": lambda: fast.model.backbone.conv_encoder.model(pixels),
    }
    if compiled:
        program = torch.compile(plain)
        candidates["torch.compile"] = lambda: program(pixels)
    return candidates


def whole(model: Any, lean: Any, fast: Any, pixels: torch.Tensor, compiled: bool) -> Candidates:
    """The whole model."""
    ids = torch.tensor([[101, *[2000, 1012] * (TEXT_TOKENS // 2 - 1), 102]])
    inputs = {"pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0]).long(), "input_ids": ids}
    candidates: Candidates = {
        "transformers": lambda: model(**inputs),
        "lean": lambda: lean(**inputs),
        "lean, bfloat16": lambda: fast(**inputs),
    }
    if compiled:
        program = torch.compile(model)
        candidates["torch.compile"] = lambda: program(**inputs)
    return candidates


def table(part: str, candidates: Candidates, repeats: int) -> None:
    """Print the first and the median seconds of each candidate, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values()))[1:])
    for name, took in seconds.items():
        median = statistics.median(took[1:])
        print(f"| {part} | {name} | {took[0]:.2f} | {median:.3f} | {base / median:.1f} |", flush=True)


@torch.inference_mode()
def main(
    short_side: Annotated[int, typer.Option(help="Pixels of the picture's shorter side.")] = 800,
    repeats: Annotated[int, typer.Option(help="Rounds after the first.")] = 3,
    compiled: Annotated[bool, typer.Option(help="Include torch.compile, which compiles for minutes.")] = False,
) -> None:
    """Measure and print."""
    model, lean, fast = random_model(), random_model(), random_model()
    make_lean(lean)
    make_lean(fast, torch.bfloat16)
    pixels = torch.randn(1, 3, short_side, short_side * 4 // 3)
    shapes = [(-(-short_side // step), -(-(short_side * 4 // 3) // step)) for step in (8, 16, 32, 64)]
    tokens = sum(height * width for height, width in shapes)
    print("| part | candidate | first call, s | median, s | times faster |\n|---|---|---|---|---|")
    table("feed-forward", feed_forward(tokens), repeats)
    table("deformable attention", deformable(model, lean, shapes), repeats)
    table("fusion", fusion(model, tokens), repeats)
    table("image encoder", backbone(model, lean, fast, pixels, compiled), repeats)
    table("whole model", whole(model, lean, fast, pixels, compiled), repeats)


if __name__ == "__main__":
    typer.run(main)
