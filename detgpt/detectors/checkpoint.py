"""Loading a detector's checkpoint through transformers: of the right kind, whole, and running no code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor, PreTrainedConfig

from detgpt.errors import InputError, ModelError

_NEEDS = (
    "Check the hub id or the folder, which must hold config.json, model.safetensors, and the files of the "
    "processor and the tokenizer."
)


def read_model_type(source: str, revision: str | None = None) -> str:
    """The `model_type` that a checkpoint's config.json names. Raises `ModelError` where there is no such file."""
    try:
        described, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot load a detector from {source}: {error} {_NEEDS}") from error
    return str(described.get("model_type", ""))


def read_config(source: str, model_types: Sequence[str], revision: str | None) -> Any:
    """A checkpoint's config. Raises `ModelError` for one of another kind than `model_types`."""
    model_type = read_model_type(source, revision)
    if model_type not in model_types:
        raise ModelError(f"{source} is a model of type {model_type!r}; this detector reads {', '.join(model_types)}.")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read the config.json of {source}: {error}") from error


def load_checkpoint(
    source: str, model_types: Sequence[str], dtype: str | torch.dtype | None, revision: str | None
) -> tuple[Any, Any]:
    """Processor and model of a checkpoint of one of `model_types`, in `dtype`; None: float32.

    Raises `InputError` for something that is no dtype and `ModelError` for a checkpoint that is missing, of
    another kind, without a fast tokenizer, or lacks tensors that its config asks for.
    """
    resolved = _torch_dtype(dtype)
    config = read_config(source, model_types, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
            source, config=config, dtype=resolved, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"Cannot load a detector of type {config.model_type} from {source}: {error} {_NEEDS}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"The weights in {source} lack {len(missing)} tensors of its config.json, such as {missing[0]}; "
            "they would run as random numbers. Download the checkpoint again or use its own config."
        )
    check_is_fast(source, getattr(processor, "tokenizer", None))
    return processor, model


def check_is_fast(source: str, tokenizer: Any) -> None:
    """Raise `ModelError` for no tokenizer, or one that does not say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} lacks a fast tokenizer, which finds the names' tokens; add tokenizer.json.")


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(resolved, torch.dtype):
        raise InputError(f"dtype must name a torch dtype such as 'float32' or 'bfloat16', got {dtype!r}.")
    return resolved
