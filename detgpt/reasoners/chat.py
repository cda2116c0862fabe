"""The words that a model of transformers is asked with, in training and at inference alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from detgpt.answer import format_instruction

BARE = "bare"  # a configuration's `detgpt_prompt`: the model gets instructions as the user writes them


def is_bare(config: Any) -> bool:
    """Whether the model of this configuration was trained without the three steps and the answer's form."""
    return getattr(config, "detgpt_prompt", "full") == BARE


def worded(instruction: str, *, bare: bool) -> str:
    """What the model is told for a user's wish."""
    return instruction if bare else format_instruction(instruction)


def control_tokens(processor: Any) -> list[str]:
    """The tokens that only a chat template may write, the longest first. `processor`: or a tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(filter(None, [getattr(processor, "image_token", None)]))
    return sorted(special, key=lambda token: (-len(token), token))


def conversation(
    texts: Sequence[str], image: Image.Image | None, control: Sequence[str], *, system: str | None = None
) -> list[dict[str, Any]]:
    """Chat messages of user and assistant in turn, without the `control` tokens; the image stands in the first.

    system: what is said before them.
    """
    roles = itertools.cycle(["user", "assistant"])
    contents = [[_text(text, control)] for text in texts]
    if image is not None:
        contents[0].insert(0, {"type": "image", "image": image})
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    before: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": [_text(system, control)]}]
    return before + messages


def _text(text: str, control: Sequence[str]) -> dict[str, Any]:
    for token in control:
        text = text.replace(token, " ")
    return {"type": "text", "text": text}
