"""Stay near the model before while tuning: what averaging the two afterwards competes with.

    anchor: {kind: l2, weight: 0.01}                                   # in a recipe: near what the run starts from
    anchor: {kind: distill, weight: 0.5, model: models/instructed}     # near another model

To the loss is added, and logged as `anchor`,

    l1         weight · Σ |θ − θ₀|       over all weights that train
    l2         weight · Σ (θ − θ₀)²      as well (L2-SP, Li et al. 2018, arXiv:1802.01483)
    distill    weight · mean of KL(π₀ ‖ π) over the answers' tokens, on the batch's own inputs (Li & Hoiem 2016,
               arXiv:1606.09282)

Where adapters (LoRA) train, θ is the weight that they make, W + scale · B · A, and not their factors. The loss of an
evaluation is without the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import reduce
from pydantic import Field
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from detgpt.errors import InputError
from finetune.answering import answering
from finetune.averaging.adapter import of_base
from finetune.batching import IGNORED
from finetune.loading import Checkpoint, load
from finetune.tuning import has_adapters


class AnchorSettings(Checkpoint):
    """kind, weight: what is added to the loss. The rest is the model to stay near; unset: as the run's own."""

    kind: Literal["l1", "l2", "distill"]
    weight: float = Field(gt=0)


# (model, batch, answers' tokens of the whole step if the trainer counts them) → the trainer's loss, and the distance
# from the model before, which is to be added to it.
Tie = Callable[[Any, dict[str, Any], Any], tuple[torch.Tensor, torch.Tensor]]


class Anchor(TrainerCallback):
    """Adds the distance to the training loss of `trainer`, which has not begun yet, and to its logs.

    run: what the trained model was loaded from. dtype: for a model to distil from whose settings name none.

    Raises `InputError` where parameters are sharded, and for a model that is not like the trained one, `ModelError` for
    one that does not load.
    """

    def __init__(self, trainer: Any, settings: AnchorSettings, run: Checkpoint, dtype: str) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("anchor cannot compare sharded parameters: run it with ddp, or leave anchor out")
        self._trainer = trainer
        self._weight = settings.weight
        self._plain_loss = trainer.compute_loss
        is_start = (settings.source, settings.revision) == (run.source, run.revision)
        if settings.kind == "distill":
            teacher = None if is_start and has_adapters(trainer.model) else load(settings, settings.dtype or dtype)[0]
            self._tie: Tie = Distillation(trainer, teacher)
        else:
            start = None if is_start else dict(load(settings, "float32")[0].named_parameters())
            self._tie = Distance(trainer, DISTANCES[settings.kind], start)
        self._start_over(trainer.args, trainer.state)
        trainer.compute_loss = self._loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_over(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.global_step - self._step_then
        if "loss" in kwargs["logs"] and steps:
            added = float(reduce(self._added, "mean")) / steps
            kwargs["logs"]["anchor"] = state.log_history[-1]["anchor"] = added
            self._start_over(args, state)

    def _start_over(self, args: Any, state: Any) -> None:
        self._added = torch.zeros((), device=args.device)  # to the losses of the steps since the last log
        self._step_then = state.global_step

    def _loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """In the place of the trainer's compute_loss."""
        if not model.training:
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, distance = self._tie(model, inputs, num_items_in_batch)
        added = self._weight * distance
        self._added += added.detach() / _divided_by(self._trainer, num_items_in_batch)
        return loss + added


class Distance:
    """Between the weights that train and those before. start: these by their names; None: those of now."""

    def __init__(self, trainer: Any, kind: Callable[[torch.Tensor], torch.Tensor], start: Any) -> None:
        self._trainer = trainer
        self._plain_loss = trainer.compute_loss
        self._kind = kind
        self._moving = list(_moving(trainer.model, start))

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self._plain_loss(model, inputs, num_items_in_batch=items)
        # Every batch of a step adds its share, for the trainer adds the batches up.
        share = _divided_by(self._trainer, items) / self._trainer.current_gradient_accumulation_steps
        return loss, share * self.of_now()

    def of_now(self) -> torch.Tensor:
        """The sum over all weights. Differences are computed again for the gradient: they are as large as the model."""
        every = (checkpoint(self._of, at, use_reentrant=False, preserve_rng_state=False) for at in self._moving)
        return torch.stack([*every]).sum()

    def _of(self, moving: Moving) -> torch.Tensor:
        now = moving.now()
        return self._kind(now if moving.start is None else now - moving.start)


class Moving(NamedTuple):
    """A tensor that training moves. now: what it is, differentiable. start: what it was; None: zero."""

    now: Callable[[], torch.Tensor]
    start: torch.Tensor | None


DISTANCES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "l1": lambda difference: difference.abs().sum(),
    "l2": lambda difference: difference.square().sum(),
}


class Distillation:
    """From the answers of `teacher`; None: the trained model without its adapters."""

    def __init__(self, trainer: Any, teacher: Any) -> None:
        self._trainer = trainer
        self._teacher = None
        if teacher is not None:
            ours, theirs = (len(model.get_output_embeddings().weight) for model in (trainer.model, teacher))
            if ours != theirs:
                raise InputError(
                    f"anchor.model has logits of {theirs} tokens, the trained model of {ours}: only a model of the "
                    "same family and tokenizer can be distilled from"
                )
            self._teacher = teacher.to(trainer.args.device).eval().requires_grad_(False)

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {**inputs, "use_cache": False}
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORED
        with torch.no_grad(), self._trainer.accelerator.autocast(), self._before() as before:
            theirs = before(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        # Not SFTTrainer's own, which makes no logits: the loss is the same.
        loss, outputs = Trainer.compute_loss(
            self._trainer, model, inputs, return_outputs=True, num_items_in_batch=items
        )
        total = divergence(theirs[:, :-1][learned], outputs.logits[:, :-1][learned])
        if items is None:
            return loss, total / learned.sum().clamp(min=1)
        processes = self._trainer.accelerator.num_processes if self._trainer.args.average_tokens_across_devices else 1
        return loss, total * processes / items

    def _before(self) -> AbstractContextManager[Any]:
        if self._teacher is not None:
            return nullcontext(self._teacher)
        return _without_adapters(self._trainer.accelerator.unwrap_model(self._trainer.model))


def divergence(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """The sum of KL(before ‖ now) over tokens; logits (tokens, vocabulary)."""
    ours, theirs = (logits.float().log_softmax(dim=-1) for logits in (now, before))
    return kl_div(ours, theirs, reduction="sum", log_target=True)


def _divided_by(trainer: Any, items: Any) -> int:
    """What the trainer divides the loss of a batch by: the batches of a step, unless the loss already is."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return 1 if scaled else trainer.current_gradient_accumulation_steps


@contextmanager
def _without_adapters(model: Any) -> Iterator[Any]:
    with answering(model), model.disable_adapter():
        yield model


def _moving(model: Any, start: Mapping[str, torch.Tensor] | None) -> Iterator[Moving]:
    """Every weight that trains; of a layer with adapters, what they add to its own."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            moved = None
            if start is not None:
                own = dequantize_module_weight(layer.get_base_layer())
                moved = _like(own, f"{name}.weight", start) - own
            yield Moving(partial(layer.get_delta_weight, layer.active_adapters[0]), moved)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            before = parameter.detach().clone() if start is None else _like(parameter, name, start)
            yield Moving(partial(_itself, parameter), before)


def _itself(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _like(weight: torch.Tensor, name: str, start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight of that name before, where `weight` is."""
    before = start.get(of_base(name))
    if before is None or before.shape != weight.shape:
        raise InputError(
            f"anchor.model has no weight {of_base(name)!r} of the shape {list(weight.shape)}: give a model of the "
            "architecture of the one that is trained"
        )
    return before.detach().to(weight.device)
