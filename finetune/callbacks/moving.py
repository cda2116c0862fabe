"""The average of the weights over the steps of a run as its result (Izmailov et al. 2018, arXiv:1803.05407).

    average_steps: {every: 10, start: 100}              # in a recipe: of steps 110, 120, … alike
    average_steps: {every: 1, decay: 0.999}             # the later, the more: an exponential moving average

Torch's `AveragedModel` averages, here what trains alone, in the precision in which it trains. What trains goes on from
the last step, not from the average. Adapters (LoRA) are averaged factor by factor, which is not quite the average of
what they make. Statistics of batch norms are those of the last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from detgpt.errors import InputError
from finetune.recipe import Settings

AVERAGE = "average.safetensors"  # in a checkpoint


class AverageSettings(Settings):
    """every: steps from one that counts to the next; the first is as far from `start`. decay: what the average so far
    weighs against the next step; unset: as many as it has steps.
    """

    every: int = Field(default=1, ge=1)
    start: int = Field(default=0, ge=0)
    decay: float | None = Field(default=None, gt=0, lt=1)


class MovingAverage(TrainerCallback):
    """Puts the average in the place of the weights when the training ends; keeps it in checkpoints before.

    It has to be called before what ends a training at its beginning. Raises `InputError` where parameters are sharded
    (FSDP, DeepSpeed), and for settings by which no step counts.
    """

    def __init__(self, trainer: Any, settings: AverageSettings) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("average_steps cannot average sharded parameters: run it with ddp, or leave it out")
        self._settings = settings
        self._now = nn.ParameterList(p for p in trainer.model.parameters() if p.requires_grad)
        decay = settings.decay
        average = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
        self._average = AveragedModel(self._now, multi_avg_fn=average)
        self._save_model = trainer.save_model
        self._should_save = trainer.args.should_save
        trainer.save_model = self._save

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = self._settings.start + self._settings.every
        if first > state.max_steps:
            raise InputError(
                f"average_steps: the first step that counts is step {first}, and there are {state.max_steps}: lower "
                "'start' or 'every'"
            )
        if state.global_step:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._average.load_state_dict(load_file(checkpoint / AVERAGE))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = state.global_step - self._settings.start
        if after > 0 and after % self._settings.every == 0:
            self._average.update_parameters(self._now)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average.n_averaged:
            with torch.no_grad():
                for now, average in zip(self._now.parameters(), self._average.module.parameters(), strict=True):
                    now.copy_(average)

    def _save(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """In the place of the trainer's save_model: a checkpoint is whole when its last file, the state, is there."""
        self._save_model(output_dir, _internal_call)
        if output_dir is not None and _internal_call and self._should_save:
            save_file(self._average.state_dict(), Path(output_dir) / AVERAGE)
