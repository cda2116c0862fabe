"""A forward pass of transformers' Grounding DINO or MM-Grounding-DINO, with all that its loss is of.

The models return the last layer's boxes only. The others come from the slot that transformers has for a model's loss,
the cells of the encoder from a hook on it, so that a pass is one call of the model as it is: in half precision, under
PEFT, gradient checkpointing and the wrappers of distributed training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GroundingDinoForObjectDetection, MMGroundingDinoForObjectDetection

from finetune.grounding.loss import Cells, Predictions

GROUNDING_DINO = (GroundingDinoForObjectDetection, MMGroundingDinoForObjectDetection)


def network_of(model: nn.Module) -> Any:
    """The Grounding DINO in `model`, whatever it is wrapped in."""
    return next(module for module in model.modules() if isinstance(module, GROUNDING_DINO))


def predict(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Predictions:
    """Run `model` on what its processor makes of pictures and prompts; all in float32.

    inputs: pixel_values, pixel_mask, input_ids, attention_mask and token_type_ids.
    """
    network = network_of(model)
    layers: dict[str, torch.Tensor] = {}
    encoder: dict[str, Any] = {}

    def keep_layers(logits: torch.Tensor, *_: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any], None]:
        layers.update(logits=kwargs["outputs_class"], boxes=kwargs["outputs_coord"])
        return logits.new_zeros(()), {}, None

    hook = network.model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoder.update(kwargs), with_kwargs=True
    )
    own_loss = network.loss_function
    network.loss_function = keep_layers
    try:
        output = model(**inputs, labels=[], return_dict=True)
    finally:
        hook.remove()
        network.loss_function = own_loss
    text_mask = inputs["attention_mask"].bool()
    tokens = text_mask.shape[1]
    cells = None
    if output.enc_outputs_class is not None:
        cells = make_cells(
            output.enc_outputs_class[..., :tokens].float(),
            output.enc_outputs_coord_logits.float(),
            encoder["vision_attention_mask"],
            encoder["spatial_shapes_list"],
        )
    return Predictions(layers["logits"][..., :tokens].float(), layers["boxes"].float(), text_mask, cells)


def make_cells(
    logits: torch.Tensor, box_logits: torch.Tensor, padding: torch.Tensor, shapes: Iterable[tuple[int, int]]
) -> Cells:
    """Where the cells of the encoder are: `padding` (B, N) is True outside the pictures, `shapes` are (height, width).

    Fractions are of each picture without its padding, as the model has its boxes.
    """
    centres, sizes, levels = [], [], []
    start = 0
    for level, (height, width) in enumerate(shapes):
        inside = ~padding[:, start : start + height * width].view(-1, height, width)
        start += height * width
        cells = torch.stack([inside[:, 0].sum(1), inside[:, :, 0].sum(1)], -1)[:, None]  # (B, 1, 2) across and down
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        middle = torch.stack([x, y], -1).flatten(0, 1).to(box_logits) + 0.5
        centres.append(middle / cells)
        sizes.append((1 / cells).expand(-1, height * width, -1))
        levels.append(torch.full((height * width,), level, device=padding.device))
    usable = box_logits.isfinite().all(-1)
    return Cells(logits, box_logits.sigmoid(), torch.cat(centres, 1), torch.cat(sizes, 1), torch.cat(levels), usable)
