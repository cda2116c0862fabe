"""What each way to a faster Grounding DINO on a CPU gives, part by part, on the same tensors.

    python -m benchmarks.detector_candidates
    python -m benchmarks.detector_candidates --only "image encoder" --only "whole model" --compiled --onnx

The candidates of a part take turns. Prints a table in Markdown; `docs/performance.md` says what was chosen. `--onnx`
needs `pip install onnxruntime onnxscript`. ONNX Runtime gets the image encoder only: torch exports no whole Grounding
DINO of transformers (no rule for `cummax` and `_is_all_true`).
"""

from __future__ import annotations

import copy
import statistics
import tempfile
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


def backbone(model: Any, lean: Any, fast: Any, pixels: torch.Tensor, compiled: bool, onnx: bool) -> Candidates:
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
    if onnx:
        session = onnx_session(lambda images: tuple(plain(images).feature_maps), pixels)
        candidates["ONNX Runtime"] = lambda: session.run(None, {"images": pixels.numpy()})
    return candidates


def onnx_session(function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Any:
    """`function` of one tensor in ONNX Runtime, which reads it under the name "images"."""
    import onnxruntime

    class Exported(nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            return function(images)

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        torch.onnx.export(Exported().eval(), (images,), file, dynamo=True, input_names=["images"])
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


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
    onnx: Annotated[bool, typer.Option(help="Include ONNX Runtime.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="These parts, as the table calls them; else all.")] = None,
) -> None:
    """Measure and print."""
    model, lean, fast = random_model(), random_model(), random_model()
    make_lean(lean)
    make_lean(fast, torch.bfloat16)
    pixels = torch.randn(1, 3, short_side, short_side * 4 // 3)
    shapes = [(-(-short_side // step), -(-(short_side * 4 // 3) // step)) for step in (8, 16, 32, 64)]
    tokens = sum(height * width for height, width in shapes)
    print("| part | candidate | first call, s | median, s | times faster |\n|---|---|---|---|---|")
    parts: dict[str, Callable[[], Candidates]] = {
        "feed-forward": lambda: feed_forward(tokens),
        "deformable attention": lambda: deformable(model, lean, shapes),
        "fusion": lambda: fusion(model, tokens),
        "image encoder": lambda: backbone(model, lean, fast, pixels, compiled, onnx),
        "whole model": lambda: whole(model, lean, fast, pixels, compiled),
    }
    for name in only or parts:
        table(name, parts[name](), repeats)


if __name__ == "__main__":
    typer.run(main)
