"""transformers' `Trainer`, told how a Grounding DINO's loss is computed and what its predictions are."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from finetune.grounding.evaluation import best_boxes
from finetune.grounding.loss import Proposals, detection_loss
from finetune.grounding.parts import Parts, part_of
from finetune.grounding.predict import predict
from finetune.grounding.questions import INPUTS


class DetectorTrainer(Trainer):
    """Adds the loss, whose parts it logs; learning rates by part; and boxes, with names and scores, as predictions."""

    loss_is_scaled_for_ga = False  # a mean over the things of a batch

    def __init__(self, *, parts: Parts, proposals: Proposals, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts, self.proposals = parts, proposals
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self._batches = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        predicted = predict(model, {key: inputs[key] for key in INPUTS})
        things = sum(len(truth["boxes"]) for truth in inputs["truths"])
        # As in DETR: with several processes, the mean of what they have, so that every thing weighs the same.
        count = self.accelerator.reduce(torch.tensor(float(things), device=predicted.boxes.device), "mean").clamp(min=1)
        with torch.autocast(predicted.boxes.device.type, enabled=False):
            losses = detection_loss(predicted, inputs["truths"], proposals=self.proposals, count=count)
        if model.training:
            self._batches += 1
            for name, value in losses.items():
                self._sums[name] = self._sums[name].to(value.device) + value.detach()
        return (losses["loss"], predicted) if return_outputs else losses["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._batches:
            parts = {f"loss_{name}": float(value) / self._batches for name, value in self._sums.items()}
            logs = {**logs, **{name: value for name, value in parts.items() if name != "loss_loss"}}
            self._sums.clear()
            self._batches = 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        network: Any = model if model is not None else self.model
        decaying = set(self.get_decay_parameter_names(network))
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                rate = getattr(self.parts, part_of(name)).rate
                groups[rate, self.args.weight_decay if name in decaying else 0.0].append(parameter)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, network)
        self.optimizer = optimizer(
            [
                {"params": parameters, "lr": self.args.learning_rate * rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # transformers writes a Swin's weights under names of old, under which the Trainer would not find them again:
        # a resumed run would go on with the image encoder that it began with.
        network: Any = self.model
        network.save_pretrained = partial(network.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del network.save_pretrained

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, predicted = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, best_boxes(predicted.logits[-1], predicted.boxes[-1], inputs["asked"]), inputs["questions"]
