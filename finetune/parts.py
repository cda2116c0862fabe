"""Which part of a model a parameter belongs to: told from its name, so that it serves models and weight files alike.

    vision       the image tower
    projector    what brings its features into the language model: LLaVA's projector, Qwen-VL's mergers, a connector
    language.N   block N of the language model
    embeddings   of its tokens (and of their places, where they are learned)
    head         the last norm and the layer of logits, or of a score

A name that fits nowhere is an error: a part that is overlooked would be left untrained, or averaged wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from detgpt.errors import ModelError

VISION = "vision"
PROJECTOR = "projector"
EMBEDDINGS = "embeddings"
HEAD = "head"

# A name's components, between its dots, that give a part away; the first row that has one wins. Qwen-VL's mergers lie
# inside the tower, and towers have layers, norms and embeddings of their own.
_TELLING = (
    (
        PROJECTOR,
        "multi_modal_projector mm_projector connector merger deepstack_merger_list image_newline aligner embed_vision",
    ),
    (VISION, "vision_tower vision_model vision_encoder image_encoder visual"),
    ("language", "layers h blocks"),
    (EMBEDDINGS, "embed_tokens embed_in embed_positions wte wpe word_embeddings word_embeddings_layernorm"),
    (HEAD, "lm_head embed_out score norm final_layernorm final_layer_norm ln_f"),
)
_PART_OF = [(part, frozenset(words.split())) for part, words in _TELLING]
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def part_of(name: str) -> str:
    """The part of the parameter `name`; names in a weight file and those of an adapter (PEFT) will do too.

    Raises `ModelError` for one that is in no part.
    """
    components = set(name.split("."))
    for part, telling in _PART_OF:
        if components & telling:
            block = _BLOCK.search(name) if part == "language" else None
            return f"language.{block[1]}" if block else part
    raise ModelError(
        f"the parameter {name!r} is in no part of a vision-language or language model that is known here "
        "(vision, projector, language.N, embeddings, head): its architecture has to be added to finetune/parts.py"
    )


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The parts that there are, in the order of their first parameter, and the names in each.

    Raises `ModelError`, which names the first parameter that is in no part.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(part_of(name), []).append(name)
    return parts
