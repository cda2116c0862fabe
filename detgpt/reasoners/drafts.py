"""Assisted decoding: something cheap drafts the next tokens, and the model checks them all in one pass.

What the model would not have written is thrown away, so the answer is the one without drafts (Leviathan et al. 2023,
arXiv:2211.17192, for greedy decoding). A draft comes from a smaller model of the same family, or from the prompt: what
followed there on the last two words.
"""

from __future__ import annotations

import copy
from typing import Any

PROMPT = "prompt"  # in an assistant's place
LOOKED_UP_TOKENS = 10  # the longest draft from the prompt
TOKEN_INPUTS = ("input_ids", "attention_mask")


class Drafts:
    """What drafts, and how much of it was kept. assistant: a model that reads the same inputs; None: the prompt."""

    def __init__(self, assistant: Any | None) -> None:
        self.drafted = self.accepted = 0
        self._assistant = None if assistant is None else _Assistant(assistant)

    def arguments(self, inputs: Any) -> dict[str, Any]:
        """For `generate`, beside the model's inputs."""
        if self._assistant is None:
            return {"prompt_lookup_num_tokens": LOOKED_UP_TOKENS}
        self._assistant.inputs = {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS}
        return {"assistant_model": self._assistant}

    def count(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted

    @property
    def acceptance(self) -> float | None:
        """Of the drafted tokens, the share that the model kept; None before the first."""
        return self.accepted / self.drafted if self.drafted else None


class _Assistant:
    """A model as `generate` takes an assistant. It looks at the picture itself.

    transformers hands it what the larger model's image tower made of the picture, which has another width, and then
    drops that, taking the assistant's first pass for a later one (in 5.24).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.inputs: dict[str, Any] = {}  # of the request at hand, but for its tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Any:
        for foreign in ("mm_encoder_outputs", "position_ids"):
            arguments.pop(foreign, None)
        if arguments.get("cache") is None:  # afterwards it remembers the picture
            first = copy.deepcopy(arguments["generation_config"])
            first.is_assistant = False
            arguments |= {**self.inputs, "generation_config": first}
        return self._model.generate(**arguments)
