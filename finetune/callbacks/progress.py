"""How a run goes: a bar with the time left on a terminal, and a line at every logging step.

    step 20 of 200: loss 1.2345, 5,120 tokens/s, 12.3 images/s, 0:03:20 left

Where answers are compared or scored, it has the margin, the accuracy or the reward as well, and what an anchor adds to
the loss.
Tokens are those of the examples, not of padding; both rates are of all processes together. They go into the logs, so
TensorBoard has them too.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from detgpt import terminal

# What a line shows of a trainer's logs, where they have it → its name there.
SHOWN = {
    "loss": "loss",
    "anchor": "anchor",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
}


class Progress(TrainerCallback):
    """Counts what goes through the model in training, and shows it."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._seen = torch.zeros(2, dtype=torch.long)  # tokens, images
        self._since, self._step_then = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hook = kwargs["model"].register_forward_pre_hook(self._count, with_kwargs=True)
        self._open.callback(hook.remove)
        if state.is_world_process_zero:
            self._move = self._open.enter_context(terminal.progress("training"))
            self._move(state.global_step, state.max_steps)
        self._start_over(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._move(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        steps = state.global_step - self._step_then
        if "loss" in logs and steps:
            seconds = time.perf_counter() - self._since
            tokens, images = reduce(self._seen.to(args.device), "sum").tolist()
            logs["tokens_per_second"] = tokens / seconds
            logs["images_per_second"] = images / seconds
            left = timedelta(seconds=round(seconds / steps * (state.max_steps - state.global_step)))
            if state.is_world_process_zero:
                terminal.note(_line(state, logs, left))
        elif state.is_world_process_zero and (evaluated := _numbers(logs, "eval_")):
            terminal.note(f"step {state.global_step} of {state.max_steps}: {evaluated}")
        self._start_over(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    def _start_over(self, state: Any) -> None:
        self._seen.zero_()
        self._since, self._step_then = time.perf_counter(), state.global_step

    def _count(self, model: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():  # an answer that is written on the way teaches nothing yet
            config = getattr(model, "config", None)  # a network without one sees no images
            self._seen += torch.tensor([count_tokens(inputs), count_images(inputs, config)])


def count_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch of `finetune.batching`, without padding."""
    if inputs.get("attention_mask") is not None:
        return int(inputs["attention_mask"].sum())
    # Packed: padding has position 0 and 0 (or the next row) behind it; an example has two tokens at least.
    places = inputs["position_ids"]
    places = places[0] if places.ndim == 3 else places
    padding = (places == 0) & (places.roll(-1, dims=-1) == 0)
    return int(places.numel() - padding.sum())


def count_images(inputs: dict[str, Any], config: Any) -> int:
    """Images of a batch: the family says how many there are, or each is one run of image tokens."""
    for name in ("image_grid_thw", "image_sizes"):
        if inputs.get(name) is not None:
            return len(inputs[name])
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.ndim == 5:  # (images, tiles, channels, height, width)
        return len(pixels)
    is_image = inputs["input_ids"] == config.image_token_id
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return int(starts.sum())


def _line(state: Any, logs: dict[str, Any], left: timedelta) -> str:
    rates = [f"{logs['tokens_per_second']:,.0f} tokens/s"]
    if logs["images_per_second"]:
        rates.append(f"{logs['images_per_second']:.1f} images/s")
    numbers = [f"{short} {logs[name]:.4f}" for name, short in SHOWN.items() if name in logs]
    where = f"step {state.global_step} of {state.max_steps}"
    return f"{where}: {', '.join(numbers)}, {', '.join(rates)}, {left} left"


def _numbers(logs: dict[str, Any], prefix: str) -> str:
    shown = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if not _is_speed(name))


def _is_speed(name: str) -> bool:
    return name in ("runtime", "samples_per_second", "steps_per_second")
