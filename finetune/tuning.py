"""What of a model is trained: its parts in full, by low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), or not.

model = tuned(model, {Group.VISION: "frozen", Group.PROJECTOR: "full", Group.LANGUAGE: "lora"}, Lora(r=16))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detgpt.errors import InputError
from finetune.parts import PROJECTOR, VISION, part_of, parts_of
from finetune.recipe import Settings
from finetune.scoring import SCORE

Tune = Literal["full", "lora", "frozen"]


class Group(str, Enum):
    """Parts that are trained alike; the language model with its embeddings and its head."""

    VISION = VISION
    PROJECTOR = PROJECTOR
    LANGUAGE = "language"


class Lora(Settings):
    """Adapters of rank `r`, scaled by alpha / r, in every linear layer of a part but the head."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


def tuned(model: Any, how: Mapping[Group, Tune], lora: Lora) -> Any:
    """Make exactly what `how` says trainable, in float32; `model` itself, or the `PeftModel` of it with adapters.

    Beside adapters, "full" is a copy of each module of the part, which is kept with the adapters; a parameter of the
    part that is in no such module (LLaVA-NeXT's `image_newline`) stays as it is. Batch norms that do not train keep
    their statistics, too. The head of a model that scores always trains. Raises `ModelError` for an architecture whose
    parts are not known, `InputError` for one without a part that is to be trained.
    """
    names = [name for name, _ in model.named_parameters()]
    there = {group_of(part) for part in parts_of(names)}
    for group, tune in how.items():
        if tune != "frozen" and group not in there:
            raise InputError(f"{group.value}={tune!r}, but this {model.config.model_type} model has no such part")
    if "lora" in how.values():
        from peft import get_peft_model

        model = get_peft_model(model, _adapters(model, how, lora))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(how[group_of(part_of(name))] == "full" or name.startswith(f"{SCORE}."))
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and how[group_of(part_of(name))] != "full":
            module.register_forward_pre_hook(_as_trained)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model


def has_adapters(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def group_of(part: str) -> Group:
    """The group of a part of `finetune.parts`."""
    return Group(part) if part in (VISION, PROJECTOR) else Group.LANGUAGE


def modules_of(model: nn.Module, groups: Collection[Group]) -> list[str]:
    """The modules that hold nothing but these parts, each as large as can be; of lists, their elements."""

    def walk(module: nn.Module, name: str) -> Iterator[str]:
        owners = {group_of(part_of(f"{name}.{inner}")) for inner, _ in module.named_parameters()}
        if owners and owners <= set(groups) and name and not isinstance(module, nn.ModuleList):
            yield name
        elif owners & set(groups):
            for inner, child in module.named_children():
                yield from walk(child, f"{name}.{inner}" if name else inner)

    return list(walk(model, ""))


def _as_trained(batch_norm: nn.Module, _: Any) -> None:
    """Before every pass, for the Trainer sets the whole model to training."""
    batch_norm.eval()


def _adapters(model: nn.Module, how: Mapping[Group, Tune], lora: Lora) -> Any:
    from peft import LoraConfig

    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (part := part_of(f"{name}.weight")) != "head"
        and how[group_of(part)] == "lora"
    ]
    full = modules_of(model, [group for group, tune in how.items() if tune == "full"])
    head = [SCORE] if hasattr(model, SCORE) else []
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapted,
        modules_to_save=[*full, *head] or None,
        task_type=None if head else "CAUSAL_LM",
    )
