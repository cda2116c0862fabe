"""What of a Grounding DINO is trained, in full, by low-rank adapters or not at all, and how fast."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from finetune.recipe import Settings
from finetune.tuning import Lora, Tune

PartName = Literal["backbone", "text_encoder", "transformer"]
# Small, and shared between layers, which adapters of each layer could not be merged back into.
HEADS = ("bbox_embed", "class_embed")


class Part(Settings):
    """tune: what is trained. rate: its learning rate, as a share of the trainer's."""

    tune: Tune = "full"
    rate: float = Field(default=1.0, gt=0)


class Parts(Settings):
    """backbone: sees the picture. text_encoder: reads the prompt. transformer: all else, from projections to heads.

    The rates are Grounding DINO's own: a tenth for what comes trained on more than detection.
    """

    backbone: Part = Part(tune="full", rate=0.1)
    text_encoder: Part = Part(tune="full", rate=0.1)
    transformer: Part = Part(tune="full", rate=1.0)


def part_of(parameter: str) -> PartName:
    """The part that a parameter or module of that name belongs to."""
    if "model.backbone." in parameter:
        return "backbone"
    return "text_encoder" if "model.text_backbone." in parameter else "transformer"


def set_trainable(model: Any, parts: Parts, lora: Lora) -> Any:
    """Make exactly what `parts` says trainable, in place; where adapters are added the `PeftModel` of it is returned.

    Adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) go into every linear layer and convolution of a
    part. Beside them, the transformer's heads are trained in full.
    """
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and getattr(parts, part_of(name)).tune == "lora"
        and not any(head in name for head in HEADS)
    ]
    wrapper = model
    if adapted:
        from peft import LoraConfig, get_peft_model

        # PEFT asks every transformers model for its word embeddings; these do not say where they are.
        model.get_input_embeddings = model.model.text_backbone.get_input_embeddings
        settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=adapted)
        wrapper = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        tune = getattr(parts, part_of(name)).tune
        is_head = any(head in name for head in HEADS)
        parameter.requires_grad_(tune == "full" or (tune == "lora" and ("lora_" in name or is_head)))
    return wrapper
