"""A Grounding DINO to train: one that is trained already, or a fresh one of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, MMGroundingDinoConfig

from detgpt.detectors.checkpoint import load_checkpoint, read_config
from detgpt.detectors.grounding_dino import MODEL_TYPES, check_tokenizer
from detgpt.errors import ModelError


def load_trained(source: str) -> tuple[Any, Any]:
    """Processor and model, in float32, of a folder or hub id. Raises `ModelError`."""
    processor, model = load_checkpoint(source, MODEL_TYPES, "float32", None)
    check_tokenizer(source, processor.tokenizer)
    return processor, model


def make_fresh(source: str, backbone: str | None = None) -> tuple[Any, Any]:
    """The processor of `source`, a folder or hub id, and an untrained model of its config.json, in float32.

    backbone: a trained one to begin with, of the same shape. Raises `ModelError`.
    """
    config = read_config(source, MODEL_TYPES, None)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read the processor beside the config.json of {source}: {error}") from error
    check_tokenizer(source, processor.tokenizer)
    model = AutoModelForZeroShotObjectDetection.from_config(config, dtype=torch.float32)
    open_gates(model)
    if backbone is not None:
        take_backbone(model, backbone)
    return processor, model


@torch.no_grad()
def open_gates(model: Any) -> None:
    """Initial values from which a short training gets somewhere, in place.

    Picture and text are mixed by gates that start at 1e-4 and would take most of a training to open. Grounding DINO's
    class scores are plain dot products of two normalised vectors, so the first loss would be in the hundreds: scale
    the text down on its way out of the encoder. (Not the decoder's norm: boxes are refined before that norm and
    scored after it, by the same head, which works only if the norm keeps the scale.) MM-Grounding-DINO divides the
    products by the root of the width.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("vision_param", "text_param")):
            parameter.fill_(0.1)
    if not isinstance(model.config, MMGroundingDinoConfig):
        model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.weight.fill_(0.1)


def take_backbone(model: Any, source: str) -> None:
    """Give `model` the weights of the trained backbone at `source`. Raises `ModelError` for one of another shape."""
    own = model.model.backbone.conv_encoder.model
    try:
        trained, report = type(own).from_pretrained(
            source, config=model.config.backbone_config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The backbone {source} does not load into this detector: {error}") from error
    if report["missing_keys"]:
        raise ModelError(f"The backbone {source} lacks {min(report['missing_keys'])!r} of this detector's backbone.")
    own.load_state_dict(trained.state_dict(), strict=False)  # frozen batch norms count no batches
