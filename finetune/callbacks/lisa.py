"""LISA: train a few random layers at a time, with the memory of a few (Pan et al. 2024, arXiv:2403.17919).

    language: lisa                                      # in a recipe
    lisa: {layers: 2, every: 20, train_ends: false}     # if wanted: train_ends are the embeddings and the head

Every 20 steps other middle layers of the language model are drawn; the rest have no gradient and no optimiser state.
The embeddings and the head train all the time: they are most of what trains in a small model, and a setting freezes
them. What is no part of the language model (a projector, an image tower) stays as the stage has it. Which layers train
at a step is drawn from the seed and the step alone, so a resumed run goes on with the same.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import TrainerCallback

from detgpt.errors import InputError
from finetune.recipe import Settings


class LisaSettings(Settings):
    """layers: how many train at a time. every: steps until others do. train_ends: embeddings and head train too."""

    layers: int = Field(default=2, ge=1)
    every: int = Field(default=20, ge=1)
    train_ends: bool = True


class Lisa(TrainerCallback):
    """Of the parameters that the stage lets train, freezes those of all but `settings.layers` layers.

    Raises `InputError` for a model of which fewer layers train, and where parameters are sharded (FSDP, DeepSpeed).
    """

    def __init__(self, trainer: Any, settings: LisaSettings) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("lisa cannot freeze a part of sharded parameters: run it with ddp, or leave lisa out")
        self._settings = settings
        self._period: int | None = None
        layers = getattr(trainer.model.get_decoder(), "layers", ())
        self._layers = [parameters for layer in layers if (parameters := _trainable(layer))]
        if len(self._layers) < settings.layers:
            raise InputError(
                f"lisa.layers={settings.layers}, but {len(self._layers)} layers of the language model train: "
                "lower it, or let the language model train"
            )
        ends = [trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()]
        self._ends = [parameter for end in ends if end is not None for parameter in _trainable(end)]
        trainer.args.ddp_find_unused_parameters = True  # what is frozen after DDP took it has no gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        period = state.global_step // self._settings.every
        if period != self._period:
            self._period = period
            self._let_train(
                set(drawn_layers(len(self._layers), self._settings.layers, args.seed, period)), kwargs["optimizer"]
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was given."""
        for parameter in (*self._ends, *(parameter for layer in self._layers for parameter in layer)):
            parameter.requires_grad_(True)

    def _let_train(self, chosen: set[int], optimizer: Any) -> None:
        groups = [(self._settings.train_ends, self._ends), *((i in chosen, p) for i, p in enumerate(self._layers))]
        for trains, parameters in groups:
            for parameter in parameters:
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)


def drawn_layers(layers: int, count: int, seed: int, period: int) -> list[int]:
    """`count` of `layers`, the same for the same seed and period."""
    chance = torch.Generator().manual_seed(seed + period)
    return sorted(torch.randperm(layers, generator=chance)[:count].tolist())


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
