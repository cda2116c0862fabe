"""A low-rank adapter (LoRA) in PEFT's format as the tuned model: W + scale · B · A, a few rows at a time.

What was trained beside the adapters ("modules_to_save", biases) is in the same file, whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText as AutoModelThatSees

from detgpt.errors import ModelError
from finetune.averaging.weights import Stored

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Adapter:
    """The base model with an adapter, tensor by tensor. Only the adapter itself is in memory.

    Raises `ModelError` for an adapter of another kind, or with a tensor that has no place in the base model.
    """

    def __init__(self, folder: Path, base: Path, tensors: Mapping[str, Stored]) -> None:
        self._config = _read_config(folder / CONFIG)
        left = {of_base(name): value for name, value in load_file(folder / WEIGHTS).items()}
        self._whole: dict[str, torch.Tensor] = {}
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, parameter in parameter_names(base, tensors).items():
            layer = parameter.removesuffix(".weight")
            if parameter in left:
                self._whole[name] = left.pop(parameter)
            elif f"{layer}.lora_A.weight" in left:
                down, up = (left.pop(f"{layer}.lora_{factor}.weight").float() for factor in "AB")
                self._factors[name] = self._of_layer(layer, down, up)
        for name in left:
            raise ModelError(
                f"{folder / WEIGHTS}: {name!r} fits no linear layer of {base}: it is an adapter of another model, or "
                "more than LoRA (DoRA, embeddings): merge it with PEFT's merge_and_unload, and give the result"
            )
        for name, tensor in tensors.items():
            shape = self._shape(name)
            if shape is not None and shape != tensor.shape:
                raise ModelError(f"{name!r} has the shape {list(tensor.shape)} in {base}, {list(shape)} in {folder}")

    def reader(self, name: str) -> AbstractContextManager[Callable[[slice, torch.Tensor], torch.Tensor]]:
        """What gives rows of the tensor, (rows, elements of a row), in the dtype of the base model's."""
        return nullcontext(partial(self._rows, name))

    def _rows(self, name: str, which: slice, base: torch.Tensor) -> torch.Tensor:
        if name in self._whole:
            whole = self._whole[name]
            return whole.reshape(len(whole) if whole.ndim else 1, -1)[which].to(base.dtype)
        if name in self._factors:
            left, right = self._factors[name]
            return (base + left[which] @ right).to(base.dtype)  # added in float32, rounded once
        return base

    def _of_layer(self, layer: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices, whose product is what the layer's weight grows by."""
        from peft.utils.other import get_pattern_key

        rank = len(down)
        patterns: dict[str, float] = self._config.get("alpha_pattern") or {}
        alpha: float = patterns.get(get_pattern_key(list(patterns), layer), self._config["lora_alpha"])
        up = up * (alpha / (sqrt(rank) if self._config.get("use_rslora") else rank))
        return (down.T, up.T) if self._config.get("fan_in_fan_out") else (up, down)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self._factors:
            left, right = self._factors[name]
            return len(left), right.shape[1]
        return tuple(self._whole[name].shape) if name in self._whole else None


def of_base(name: str) -> str:
    """What the base model calls the parameter, or the layer that an adapter's factor is of."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def parameter_names(folder: Path, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """What the model in `folder` calls each of the tensors in its files, where families were renamed since."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with torch.device("meta"):
        model: Any = (AutoModelThatSees if sees else AutoModelForCausalLM).from_config(config)
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in tensors}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA" or "lora_alpha" not in config:
            raise ModelError(f"{file} is an adapter of type {config['peft_type']}: only LoRA is merged on the way")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file} cannot be read as the configuration of an adapter: {error!r}") from error
    return config
