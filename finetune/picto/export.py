"""Both trained models as one half-precision pair that `DetGPT.from_pretrained` loads (`stage: picto.export`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoProcessor, GroundingDinoForObjectDetection, LlavaForConditionalGeneration

from detgpt.calibration import CALIBRATION_FILE
from detgpt.models import PAIR_FILE
from finetune.recipe import StageConfig


class Config(StageConfig):
    """reasoner, detector: folders of the trained checkpoints. options: of the pair, as `detgpt.models` has them."""

    stage: Literal["picto.export"]
    reasoner: Path
    detector: Path
    options: dict[str, Any] = Field(default_factory=lambda: {"box_threshold": 0.25, "max_new_tokens": 160})


def run(config: Config) -> None:
    parts: dict[str, Any] = {"reasoner": LlavaForConditionalGeneration, "detector": GroundingDinoForObjectDetection}
    for part, model in parts.items():
        source, target = getattr(config, part), config.output / part
        model.from_pretrained(source, dtype=torch.float16).save_pretrained(target)
        AutoProcessor.from_pretrained(source).save_pretrained(target)
    pair = {
        **{part: part for part in parts},
        "options": config.options,
        "knows": "pictograms of 131 everyday things, not photographs",
        "needs": "nothing: it comes with the package",
    }
    (config.output / PAIR_FILE).write_text(json.dumps(pair, indent=2) + "\n")
    (config.output / CALIBRATION_FILE).unlink(missing_ok=True)  # of other weights: `make calibration` fits a new one
