"""The training loop that the tower, the detector and the reasoner of the built-in model share.

One optimiser step at a time, warm-up then cosine, a resumable checkpoint, a line of log: nothing more. (The
stages for other models build on TRL and the Trainer; here two small models on a CPU need neither.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    steps: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.02
    clip: float = 5.0
    floor: float = 0.02  # the last learning rate, as a fraction of `lr`

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, lr: float, slow: str = "", slow_factor: float = 1.0) -> list[dict]:
    """Trainable parameters: no weight decay on vectors, a smaller rate for names that contain `slow`."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, bool(slow) and slow in name), []).append(parameter)
    return [
        {
            "params": p,
            "lr": lr * (slow_factor if is_slow else 1.0),
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (decays, is_slow), p in groups.items()
    ]


def fit(
    model: nn.Module,
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    schedule: Schedule,
    checkpoint: Path,
    *,
    groups: list[dict] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    log_every: int = 50,
) -> None:
    """Train `model` on `loss_of(step)["loss"]`, going on from `checkpoint` if it exists.

    `loss_of` draws its own batch from the step number, so a resumed run sees the data that it would have seen.
    """
    optimizer = torch.optim.AdamW(
        groups or parameter_groups(model, schedule.lr),
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        betas=(0.9, 0.98),
    )
    base = [g["lr"] for g in optimizer.param_groups]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"going on from step {first} of {checkpoint}")
    sums: dict[str, float] = {}
    since = time.perf_counter()
    for step in range(first, schedule.steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule.factor(step)
        parts = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step + 1
        if done % log_every == 0:
            rate = log_every / (time.perf_counter() - since)
            shown = "  ".join(f"{k} {v / log_every:.4f}" for k, v in sums.items())
            print(f"step {done}/{schedule.steps}  {shown}  {rate:.2f} steps/s", flush=True)
            since, sums = time.perf_counter(), {}
        if done % evaluate_every == 0 or done == schedule.steps:
            save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done})
            if evaluate:
                was_training = model.training
                model.eval()
                print(f"step {done}  " + "  ".join(f"{k} {v:.4f}" for k, v in evaluate().items()), flush=True)
                model.train(was_training)
            since = time.perf_counter()


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
