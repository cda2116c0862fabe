"""A smaller model in the shape of a larger one, to be its student: `stage: distill.student`.

    stage: distill.student
    model: picto
    language: {hidden_size: 128, intermediate_size: 192, num_hidden_layers: 3, num_attention_heads: 4}
    output: runs/fresh

Tokenizer, image processor and image tower are the teacher's. The language model has the teacher's settings but for
those given, and begins with a part of the teacher's weights: of each tensor the first rows and columns, of evenly
spaced layers (weight selection, Xu et al. 2024, arXiv:2311.18823). That is a start, not a model: it has to be taught.
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

_LAYER = re.compile(r"(language_model\.(?:.*\.)?layers|^model\.layers)\.(\d+)\.")


class Config(Checkpoint, StageConfig):
    """model: the teacher. language: settings of its language model's configuration that the student has otherwise."""

    stage: Literal["distill.student"] = "distill.student"
    language: dict[str, int] = Field(min_length=1)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    teacher, processor = load(config, "float32")
    set_seed(config.seed)
    student = smaller(teacher, config.language)
    rundir.start(config, {})

    def write(place: Any) -> None:
        student.save_pretrained(place)
        processor.save_pretrained(place)

    rundir.write_folder(config.output / REASONER, write)
    if rundir.is_pair(config.model):
        rundir.write_pair(config.output, reasoner=REASONER, detector=config.model)
    sizes = {"parameters": language_parameters(student), "parameters_of_teacher": language_parameters(teacher)}
    rundir.finish(config.output, sizes)


def smaller(teacher: Any, language: dict[str, int]) -> Any:
    """A model of the teacher's class with these settings of its language model, and what fits of the teacher's weights.

    Raises `InputError` for a setting that the configuration does not have, or one that is larger than the teacher's.
    """
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    text = config.get_text_config(decoder=True)
    for name, value in language.items():
        theirs = getattr(text, name, None)
        if not isinstance(theirs, int) or isinstance(theirs, bool):
            raise InputError(f"language.{name}: a {text.model_type!r} configuration has no such number")
        if not 1 <= value <= theirs:
            raise InputError(f"language.{name}={value}: the teacher has {theirs}; give no more, and 1 at least")
        setattr(text, name, value)
    if hasattr(text, "num_key_value_heads") and "num_key_value_heads" not in language:
        text.num_key_value_heads = min(text.num_key_value_heads, text.num_attention_heads)
    student = type(teacher)(config)
    student.generation_config = teacher.generation_config
    _select(student, teacher)
    return student


@torch.no_grad()
def _select(student: Any, teacher: Any) -> None:
    """Fill the student's tensors with the first rows and columns of the teacher's, of evenly spaced layers."""
    theirs = teacher.state_dict()
    ours, given = (model.config.get_text_config(decoder=True).num_hidden_layers for model in (student, teacher))

    def source(name: str) -> str:
        def spread(found: re.Match[str]) -> str:
            return f"{found[1]}.{round(int(found[2]) * (given - 1) / max(ours - 1, 1))}."

        return _LAYER.sub(spread, name)

    for name, tensor in student.state_dict().items():
        tensor.copy_(theirs[source(name)][tuple(slice(size) for size in tensor.shape)])


def language_parameters(model: Any) -> int:
    """Of the language model with its embeddings; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.get_decoder().parameters())
