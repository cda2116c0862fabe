"""A language model with one number in the place of its logits: how good is the conversation that it has read?

    model = scorer(config).from_pretrained(folder)     # a checkpoint with such a head, or without: then a new one
    scores = model(**batch).logits                      # (B,)

It is made of any vision-language or language model of transformers, whose own classes for it see no pictures (but for
Gemma 3's). `finetune.loading` takes this class for a checkpoint that says that it scores.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

SCORE = "score"  # the head
SCORES = "detgpt_scores"  # a configuration's word that its model has one


class Scorer:
    """The base model of a family and a linear layer on what it makes of the last token; before a family's class."""

    accepts_loss_kwargs = False  # of the Trainer: each batch has a loss of its own

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of PreTrainedModel
        family: Any = self
        setattr(family, family.base_model_prefix, AutoModel.from_config(config))
        family.score = nn.Linear(config.get_text_config(decoder=True).hidden_size, 1, bias=False)
        family.post_init()

    def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> SequenceClassifierOutput:
        """`logits` (B,): the scores of conversations that are padded on the right; attention_mask: (B, longest)."""
        model: Any = self
        read = model.base_model(attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        ends = read[torch.arange(len(read), device=read.device), last]  # (B, hidden)
        return SequenceClassifierOutput(logits=model.score(ends).squeeze(-1))


@cache
def scorer(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The `Scorer` of the family of `language_model`, such as LlavaForConditionalGeneration.

    It has that name, and says that it is of that module, for by these transformers knows what a family's weights are
    called in files. It reads that family's files, leaves the layer of logits out, and makes a new head where the file
    has none.
    """
    family = next(kind for kind in language_model.__mro__ if PreTrainedModel in kind.__bases__)
    about = {
        "__module__": family.__module__,
        "_keys_to_ignore_on_load_missing": [rf"^{SCORE}\."],
        "_keys_to_ignore_on_load_unexpected": [r"^(lm_head|embed_out)\."],
    }
    return type(language_model.__name__, (Scorer, family), about)
