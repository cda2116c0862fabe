"""A smaller or deeper model in the shape of another, to be its student or its teacher: `stage: distill.fresh`.

    stage: distill.fresh
    model: picto
    language: {hidden_size: 128, intermediate_size: 192, num_hidden_layers: 3, num_attention_heads: 4}
    output: runs/fresh

Tokenizer, image processor and image tower are the other's. The language model has its settings but for those given,
and begins with its weights:

    smaller      of each tensor the first rows and columns, of evenly spaced layers (weight selection, Xu et al. 2024,
                 arXiv:2311.18823). That is a start, not a model: it has to be taught.
    more layers  each added one is a copy of the one before it whose outputs are zero (block expansion, LLaMA Pro, Wu
                 et al. 2024, arXiv:2401.02415). It says what the other says, and has room to learn more.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import set_seed

from detgpt.errors import InputError
from finetune import rundir
from finetune.loading import Checkpoint, load
from finetune.recipe import StageConfig
from finetune.stages.reasoner import REASONER

LAYERS = "num_hidden_layers"
OUTPUTS = {"o_proj", "down_proj"}  # of a layer: what they give is added to what the layer gets
_LAYER = re.compile(r"(?P<layers>language_model\.(?:.*\.)?layers|^model\.layers)\.(?P<layer>\d+)\.")


class Config(Checkpoint, StageConfig):
    """model: the other one. language: settings of its language model's configuration that the new one has otherwise."""

    stage: Literal["distill.fresh"] = "distill.fresh"
    language: dict[str, int] = Field(min_length=1)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    other, processor = load(config, "float32")
    set_seed(config.seed)
    model = resized(other, config.language)
    rundir.start(config, {})

    def write(place: Any) -> None:
        model.save_pretrained(place)
        processor.save_pretrained(place)

    rundir.write_folder(config.output / REASONER, write)
    if rundir.is_pair(config.model):
        rundir.write_pair(config.output, reasoner=REASONER, detector=config.model)
    rundir.finish(
        config.output, {"parameters": language_parameters(model), "parameters_of_other": language_parameters(other)}
    )


def resized(other: Any, language: dict[str, int]) -> Any:
    """A model of the other's class with these settings of its language model, and what fits of the other's weights.

    Raises `InputError` for a setting that the configuration does not have, or one that is larger than the other's and
    not the number of layers.
    """
    config = type(other.config).from_dict(other.config.to_dict())
    text = config.get_text_config(decoder=True)
    for name, value in language.items():
        theirs = getattr(text, name, None)
        if not isinstance(theirs, int) or isinstance(theirs, bool):
            raise InputError(f"language.{name}: a {text.model_type!r} configuration has no such number")
        if value < 1 or (value > theirs and name != LAYERS):
            raise InputError(f"language.{name}={value}: {theirs} is the other's; give no more, and 1 at least")
        setattr(text, name, value)
    if hasattr(text, "num_key_value_heads") and "num_key_value_heads" not in language:
        text.num_key_value_heads = min(text.num_key_value_heads, text.num_attention_heads)
    model = type(other)(config)
    model.generation_config = other.generation_config
    _fill(model, other)
    return model


@torch.no_grad()
def _fill(model: Any, other: Any) -> None:
    """The model's tensors with the first rows and columns of the other's; an added layer changes nothing."""
    ours, given = (one.config.get_text_config(decoder=True).num_hidden_layers for one in (model, other))
    theirs = other.state_dict()
    source = [round(layer * (given - 1) / max(ours - 1, 1)) for layer in range(ours)]
    if ours > given:
        source = [layer * given // ours for layer in range(ours)]
        if not {part for name in theirs if _LAYER.search(name) for part in name.split(".")} >= OUTPUTS:
            ends = " and ".join(sorted(OUTPUTS))
            raise InputError(f"language.{LAYERS}={ours}: layers are added to models whose blocks end in {ends}")
    for name, tensor in model.state_dict().items():
        its = _LAYER.sub(lambda found: f"{found['layers']}.{source[int(found['layer'])]}.", name)
        tensor.copy_(theirs[its][tuple(slice(size) for size in tensor.shape)])
        found = _LAYER.search(name)
        layer = int(found["layer"]) if found else 0
        if layer > 0 and source[layer] == source[layer - 1] and OUTPUTS & {*name.split(".")}:
            tensor.zero_()


def language_parameters(model: Any) -> int:
    """Of the language model with its embeddings; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.get_decoder().parameters())
