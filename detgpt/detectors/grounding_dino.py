"""Grounding DINO through transformers: Grounding DINO, MM-Grounding-DINO and LLMDet checkpoints.

    GroundingDinoDetector("IDEA-Research/grounding-dino-base").detect([image], [["cup", "cold bottle"]])

Left out on purpose: code from a checkpoint's repository (`trust_remote_code`) and pickled weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from detgpt.detectors import Grounding
from detgpt.detectors.checkpoint import check_is_fast, load_checkpoint
from detgpt.detectors.lean import bfloat16_is_faster, make_lean
from detgpt.detectors.remembered import Remembered
from detgpt.detectors.spans import (
    Prompt,
    TokenScores,
    check_query,
    ground_images,
    known_offsets,
    known_tokens,
    make_prompts,
)
from detgpt.device import choose_device
from detgpt.errors import InputError, ModelError
from detgpt.images import image_key

RUNTIMES = ("auto", "torch", "lean")
PRECISIONS = ("exact", "fast")
MODEL_TYPES = ("grounding-dino", "mm-grounding-dino")
# transformers writes these ids into the text masks, whatever tokenizer the checkpoint brings.
SPECIAL_IDS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Encoded:
    """An image after the image encoder."""

    pixel_mask: torch.Tensor  # (H, W) bool
    feature_maps: list[tuple[torch.Tensor, torch.Tensor]]  # per level: (C, h, w) and its mask (h, w)


class GroundingDinoDetector:
    """A Grounding DINO of the transformers family, loaded once; safe to call from several threads."""

    def __init__(
        self,
        model_id_or_folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        max_prompts_per_pass: int = 4,
        runtime: str = "auto",
        precision: str = "exact",
        remembered_images: int = 4,
    ) -> None:
        """Load a checkpoint by its hub id or from a local folder.

        `device` None: CUDA where there is one, else the CPU. `dtype` None: float32, whatever the checkpoint
        was saved in (a half-precision file would otherwise run, slowly, in half precision on the CPU).
        `max_prompts_per_pass` bounds memory: that many prompts, or images, go through the network together.
        `runtime="lean"` computes the same with less work on a CPU (see `detgpt.detectors.lean`), "torch" is the
        model as transformers has it, "auto" is lean where that can be. `precision="fast"` lets the lean runtime
        use bfloat16 where this CPU is faster with it; on a GPU it warns, and `dtype` is the choice there. The
        features of the last `remembered_images` images are kept, so that asking again about one of them does not
        run the image encoder again; 0 keeps none. Raises `InputError` for settings that exclude each other.
        Raises `ModelError` when the checkpoint is missing, incomplete or of another kind.
        """
        _check_choice("runtime", runtime, RUNTIMES)
        _check_choice("precision", precision, PRECISIONS)
        if max_prompts_per_pass < 1:
            raise InputError(f"max_prompts_per_pass must be at least 1, got {max_prompts_per_pass}.")
        if remembered_images < 0:
            raise InputError(f"remembered_images must be at least 0, got {remembered_images}.")
        self.name = str(model_id_or_folder)
        self.device = choose_device(device)
        self.max_prompts_per_pass = max_prompts_per_pass
        self.processor, self.model = load_checkpoint(self.name, MODEL_TYPES, dtype, revision)
        check_tokenizer(self.name, self.processor.tokenizer)
        self.model.to(self.device).eval()
        self.runtime = _choose_runtime(runtime, precision, self.device, self.model.dtype)
        if self.runtime == "lean":
            make_lean(self.model, _lean_dtype(precision))
        self._images: Remembered[_Encoded] = Remembered(remembered_images)
        self._lock = threading.Lock()

    def detect(
        self,
        images: Sequence[Image.Image],
        names: Sequence[Sequence[str]],
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        """Look for `names[i]` in `images[i]`; one `Grounding` per image, boxes in that image's pixels.

        `prompting="separate"`: each name is a prompt of its own, so what else is asked does not change its
        boxes; the image encoder still runs once per image. A box needs a name score of `box_threshold`.
        `prompting="joint"`: the names share one prompt (a second one past the checkpoint's `max_text_len`
        tokens). A box needs `box_threshold` at the prompt's best token and `text_threshold` at its name.
        Raises `InputError` for thresholds outside [0, 1], another `prompting`, or a name that it cannot read.
        """
        check_query(images, names, box_threshold, text_threshold, prompting)
        with self._lock, torch.inference_mode():
            known, max_tokens = partial(known_tokens, self.processor.tokenizer), self.model.config.max_text_len
            return ground_images(
                images,
                [make_prompts(asked, prompting, known, max_tokens) for asked in names],
                encode=self._encode,
                fuse=self._fuse,
                max_prompts_per_pass=self.max_prompts_per_pass,
                box_threshold=box_threshold,
                text_threshold=text_threshold if prompting == "joint" else None,
            )

    def _encode(self, images: list[Image.Image]) -> list[_Encoded]:
        return self._images.get(
            [image_key(image) for image in images], lambda new: self._run_image_encoder([images[i] for i in new])
        )

    def _run_image_encoder(self, images: list[Image.Image]) -> list[_Encoded]:
        pixels = self.processor.image_processor(images=images, do_pad=True, return_tensors="pt")
        pixel_values = pixels["pixel_values"].to(self.device, self.model.dtype)
        pixel_mask = pixels["pixel_mask"].to(self.device)
        levels = self.model.model.backbone.conv_encoder(pixel_values, pixel_mask)
        # Cloned, so that remembering one image does not keep the batch that it came in.
        return [
            _Encoded(pixel_mask[row].bool(), [(maps[row].clone(), mask[row].clone()) for maps, mask in levels])
            for row in range(len(images))
        ]

    def _fuse(self, encoded: list[_Encoded], rows: list[int], prompts: list[Prompt]) -> Iterator[TokenScores]:
        # Shorter prompts are padded. The padding is masked in the text encoder, in both directions of the
        # fusion and in the decoder, and its logits are -inf, so that a prompt's scores do not depend on it.
        tokenizer = self.processor.tokenizer
        tokens = tokenizer(
            [prompt.text for prompt in prompts],
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        offsets = known_offsets(tokenizer, tokens)
        del tokens["offset_mapping"]
        levels = zip(*(encoded[row].feature_maps for row in rows), strict=True)
        features = [
            (torch.stack([maps for maps, _ in level]), torch.stack([mask for _, mask in level])) for level in levels
        ]
        pixel_mask = torch.stack([encoded[row].pixel_mask for row in rows])
        with _replaying(self.model.model.backbone, features):
            output = self.model(
                # With the encoder's features at hand only the shape of the pixels is still read.
                pixel_values=features[0][0].new_empty(1).expand(len(rows), 3, *pixel_mask.shape[1:]),
                pixel_mask=pixel_mask,
                **tokens.to(self.device),
                return_dict=True,
            )
        probabilities = output.logits.float().sigmoid().cpu().numpy()
        boxes = output.pred_boxes.float().cpu().numpy()
        return (TokenScores(*row) for row in zip(offsets, probabilities, boxes, strict=True))


class _Replay(nn.Module):
    """Stands in for the image encoder and returns what that already computed."""

    def __init__(self, feature_maps: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> list[Any]:
        return self.feature_maps


@contextmanager
def _replaying(backbone: nn.Module, feature_maps: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Let the model's own forward run on features computed before. Hold the detector's lock."""
    encoder = backbone.conv_encoder
    backbone.conv_encoder = _Replay(feature_maps)
    try:
        yield
    finally:
        backbone.conv_encoder = encoder


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{argument} must be one of {', '.join(choices)}, got {value!r}.")


def _choose_runtime(runtime: str, precision: str, device: torch.device, dtype: torch.dtype) -> str:
    lean_can = device.type == "cpu" and dtype == torch.float32
    if lean_can and runtime != "torch":
        return "lean"
    if runtime == "lean":
        raise InputError(f"runtime='lean' is for float32 on a CPU, not for {dtype} on {device}: use 'auto'.")
    if precision == "fast" and (runtime == "torch" or dtype != torch.float32):
        told = "runtime='torch'" if runtime == "torch" else f"dtype={str(dtype).removeprefix('torch.')!r}"
        raise InputError(f"precision='fast' is for the lean runtime in float32: give it or {told}, not both.")
    if precision == "fast":
        _log.warning("precision='fast' is for the lean runtime on a CPU; on %s choose a dtype instead.", device)
    return "torch"


def _lean_dtype(precision: str) -> torch.dtype:
    if precision == "fast" and bfloat16_is_faster():
        return torch.bfloat16
    if precision == "fast":
        _log.warning("This CPU is not faster in bfloat16, so precision='fast' runs like 'exact'.")
    return torch.float32


def check_tokenizer(source: str, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer that this detector, or transformers' text masks, cannot work with."""
    check_is_fast(source, tokenizer)
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_IDS}
    if found != SPECIAL_IDS:
        raise ModelError(
            f"The tokenizer in {source} numbers its special tokens {found}; Grounding DINO in transformers "
            f"needs {SPECIAL_IDS}, those of bert-base-uncased. Renumber the vocabulary and train again."
        )
