"""Temperature scaling that stays in the weights: a model whose every probability is softmax(logits / T).

    temper(model, 1.3)

The last norm's weights are divided by T, and with them all logits (Guo et al. 2017, arXiv:1706.04599, who scale the
logits themselves). What the model says by greedy decoding stays the same, and no runtime has to know of T.
"""

from __future__ import annotations

from typing import Any

import torch

from detgpt.errors import ModelError
from finetune.answering import answering
from finetune.parts import HEAD, part_of

HEADS = ("lm_head", "embed_out")  # the layer of logits, of which only a bias is divided
TOLERANCE = 1e-2  # of the logits' range: half precision has no more


@torch.no_grad()
def temper(model: Any, temperature: float) -> None:
    """Divide the logits of `model` by `temperature`, in place.

    Raises `ModelError`, and leaves the model as it was, where its last norm does not scale them.
    """
    before = _probe(model)
    divided = [
        parameter
        for name, parameter in model.named_parameters()
        if part_of(name) == HEAD and not (set(name.split(".")) & set(HEADS) and name.endswith("weight"))
    ]
    for parameter in divided:
        parameter.div_(temperature)
    if not torch.allclose(_probe(model) * temperature, before, rtol=0, atol=TOLERANCE * float(before.abs().max())):
        for parameter in divided:
            parameter.mul_(temperature)
        raise ModelError(
            f"the logits of a {model.config.model_type!r} model are not scaled by its last norm, so a temperature "
            "cannot be written into its weights: leave scale_temperature out"
        )


def _probe(model: Any) -> torch.Tensor:
    """Logits after a few tokens."""
    ids = torch.arange(8, 16, device=model.device)[None]
    with answering(model):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
