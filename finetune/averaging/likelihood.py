"""How likely texts are under the average of two models, as a differentiable function of its ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from detgpt.errors import InputError
from finetune.averaging.ratios import owners
from finetune.batching import IGNORED, Batch


class Averaged:
    """The average of `base` and `tuned`, both frozen, in which every one of `groups` of blocks has its own ratio.

    What each tensor takes is what `finetune.averaging.average` writes for the same ratios. mean: of the ratios, which
    everything outside the groups takes. Raises `InputError` for models of different parameters.
    """

    def __init__(self, base: Any, tuned: nn.Module, groups: Sequence[str], mean: float) -> None:
        self._model = base.eval().requires_grad_(False)
        ours, theirs = weights(base), weights(tuned.requires_grad_(False))
        for name in [*ours, *theirs]:
            here, there = ours.get(name), theirs.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise InputError(f"base and tuned differ in {name!r}: only models of one architecture have an average")
        owner = owners({name: value.shape for name, value in ours.items()}, groups)
        self._learned = [
            (name, groups.index(group), ours[name], theirs[name]) for name, group in owner.items() if group is not None
        ]
        self._fixed = {
            name: torch.lerp(ours[name], theirs[name], mean)
            for name, group in owner.items()
            if group is None and ours[name].is_floating_point()
        }

    def log_likelihood(self, ratios: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum over the batch's examples of the logarithm of their answers' probability.

        ratios: (groups,). batch: of `finetune.batching`, whose `labels` say which tokens are the answers'.
        """
        ratios = ratios.to(self._model.device, torch.float32)
        state = {name: torch.lerp(ours, theirs, ratios[group]) for name, group, ours, theirs in self._learned}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = functional_call(self._model, self._fixed | state, kwargs=inputs).logits
        return log_probabilities(logits, batch["labels"]).sum()


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, L − 1): of every token after the first, given those before; 0 where `labels` (B, L) leave it out.

    logits: (B, L, vocabulary).
    """
    following = labels[:, 1:]
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -loss.view(following.shape)


def weights(model: nn.Module) -> dict[str, Any]:
    """The parameters, tied ones once, and the buffers that a checkpoint has."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: value for name, value in model.named_buffers() if name in kept}
