"""What can go wrong in a run: it stops with a sentence, and the last checkpoint that was whole is still there.

    train(trainer)      # in the place of trainer.train(); goes on from the last whole checkpoint

NaN or infinity in loss or gradients: before the weights are touched. A full disk: what was half written is removed.
SIGTERM (a scheduler's or a user's): the step is finished and saved. An empty split: before anything starts.
"""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from detgpt.errors import InputError, StoppedError, TrainingError
from finetune.rundir import is_whole, latest


def train(trainer: Any) -> Any:
    """Train to the end, from where an earlier run in this folder left off.

    Returns what `trainer.train` does, or None where the last checkpoint is that of the last step.

    Raises `InputError` for a split without examples, `StoppedError` after SIGTERM, `TrainingError` for what else ends
    a run: all of them leave the last whole checkpoint as it was.
    """
    for split, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise InputError(f"the {split} split has no examples: check its path, and what its records lack")
    folder = Path(trainer.args.output_dir)
    last = _without_halves(folder) if trainer.args.should_save else latest(folder)
    try:
        output = trainer.train(resume_from_checkpoint=str(last) if last else None)
    except BaseException as error:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # closes bars and writers
        if isinstance(error, _Finished):
            if trainer.args.load_best_model_at_end:
                trainer._load_best_model()
            return None
        if not _is_writing(error):
            raise
        raise TrainingError(
            f"a checkpoint could not be written to {folder} ({error}). {_kept(_without_halves(folder))} "
            "Make room (trainer.save_total_limit keeps fewer checkpoints), and run the same command again"
        ) from error
    state = trainer.state
    stopped = any(isinstance(watch, Watch) and watch.told_to_stop for watch in trainer.callback_handler.callbacks)
    if stopped and state.global_step < state.max_steps:
        raise StoppedError(
            f"stopped at step {state.global_step} of {state.max_steps}, as it was told to, and saved in "
            f"{latest(folder)}: the same command goes on from there"
        )
    return output


def _without_halves(checkpoints: Path) -> Path | None:
    """Remove what was not written to its end; the last checkpoint that was."""
    for checkpoint in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    return latest(checkpoints)


class _Finished(Exception):
    """The trainer would do one more step before it sees that all are done."""


class Watch(TrainerCallback):
    """Stops a run whose numbers are none, and one that gets SIGTERM. All processes stop at the same step."""

    def __init__(self, trainer: Any) -> None:
        self.told_to_stop = False
        self._before: Any = signal.getsignal(signal.SIGTERM)
        self._folder = Path(trainer.args.output_dir)
        trainer.args.logging_nan_inf_filter = False  # it puts the average in the place of NaN

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _Finished
        self._before = signal.signal(signal.SIGTERM, self._stop)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            return  # the scaler skips such steps, and lowers its scale until they are none
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not norm.isfinite():
            raise TrainingError(self._no_number("a gradient", state.global_step + 1))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not math.isfinite(kwargs["logs"].get("loss", 0.0)):
            raise TrainingError(self._no_number("the loss", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            told = torch.tensor(float(self.told_to_stop), device=args.device)
            self.told_to_stop = bool(reduce(told, "max"))
        if self.told_to_stop:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _stop(self, signum: int, frame: Any) -> None:
        self.told_to_stop = True

    def _no_number(self, what: str, step: int) -> str:
        return (
            f"{what} is no finite number at step {step}. {_kept(latest(self._folder))} Try a lower "
            "trainer.learning_rate, a longer warm-up, bf16 instead of fp16, or look at the records of that step"
        )


def _kept(checkpoint: Path | None) -> str:
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."


def _is_writing(error: BaseException) -> bool:
    """Whether the system did not take what was written: torch and safetensors have their own errors for that."""
    words = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter", "inline_container", "iostream")
    return any(word in str(error) for word in words)
