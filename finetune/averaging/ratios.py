"""How much of the tuned model each tensor gets.

    ratios = {"language.0-7": 0.1, "language.8-16": 0.2, "language.17-25": 0.3}
    of_tensors(shapes, ratios)["model.layers.3.mlp.up_proj.weight"]                 # 0.1
    of_tensors(shapes, ratios)["model.norm.weight"]                                 # 0.2, the mean

The one policy, of plain averaging (one ratio) and of Heterogeneous Model Averaging (Lin et al. 2024,
arXiv:2309.06256, section 5) alike: the linear layers in the language model's blocks take the ratio of their block,
every other tensor takes the mean over the groups of blocks, but for a part that `ratios` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from detgpt.errors import InputError
from finetune.parts import EMBEDDINGS, HEAD, PROJECTOR, VISION, part_of

PARTS = (VISION, PROJECTOR, EMBEDDINGS, HEAD)
Shapes = Mapping[str, Sequence[int]]
Ratios = Mapping[str, float]
_GROUP = re.compile(r"language(?:\.(\d+)(?:-(\d+))?)?")  # all blocks, one of them, or from one to another


def of_tensors(shapes: Shapes, ratios: float | Ratios) -> dict[str, float]:
    """The ratio of every tensor of `shapes`, which are those of a whole model.

    ratios: one for all, or of groups of blocks ("language", "language.3", "language.0-7", which is with block 7) and
    of other parts of `finetune.parts`. Raises `InputError` unless ratios are in [0, 1] and every block is in one group,
    `ModelError` for a tensor that is in no part.
    """
    for part, ratio in ratios.items() if isinstance(ratios, Mapping) else [("the ratio", ratios)]:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise InputError(f"{part}: {ratio!r} is no ratio: give a number from 0 (the base model) to 1 (the tuned)")
    if not isinstance(ratios, Mapping):
        return dict.fromkeys(shapes, ratios)
    parts = {name: part_of(name) for name in shapes}
    blocks = _of_blocks(ratios, count_blocks(parts.values()))
    mean = fmean(ratio for part, ratio in ratios.items() if part not in PARTS)
    return {
        name: blocks[part] if part in blocks and is_linear(name, shapes) else ratios.get(part, mean)
        for name, part in parts.items()
    }


def is_linear(name: str, shapes: Shapes) -> bool:
    """Whether this is the matrix (or the stack of them, in a mixture of experts) of a linear layer, or its bias."""
    layer, _, kind = name.rpartition(".")
    return len(shapes[f"{layer}.weight" if kind == "bias" else name]) >= 2


def count_blocks(parts: Iterable[str]) -> int:
    """Blocks of the language model. Raises `InputError` where there are none."""
    blocks = [int(part.rpartition(".")[2]) for part in parts if part.startswith("language.")]
    if not blocks:
        raise InputError("ratios of blocks are for models with a language model: give one base_weight for all of it")
    return max(blocks) + 1


def groups(blocks: int, count: int) -> list[str]:
    """`count` groups of like sizes of consecutive blocks, as `ratios` names them; of 26 blocks, three have 8, 9, 9.

    Raises `InputError` for more groups than blocks.
    """
    if not 1 <= count <= blocks:
        raise InputError(
            f"groups={count}, but the language model has {blocks} blocks: give a number from 1 to {blocks}"
        )
    bounds = [i * blocks // count for i in range(count + 1)]
    return [f"language.{first}-{end - 1}" for first, end in pairwise(bounds)]


def blocks_of(group: str) -> range | None:
    """The blocks of "language.0-7" or "language.3"; None for "language", which is all of them. Raises `InputError`."""
    match = _GROUP.fullmatch(group)
    if match is None:
        raise InputError(f"{group!r} is no part: name groups of blocks as in language.0-7, or {', '.join(PARTS)}")
    first, last = match[1], match[2] or match[1]
    return range(int(first), int(last) + 1) if first is not None else None


def _of_blocks(ratios: Ratios, count: int) -> dict[str, float]:
    """Of every block's part. Raises `InputError` unless each is in exactly one group."""
    found: dict[str, float] = {}
    for group, ratio in ratios.items():
        if group in PARTS:
            continue
        blocks = blocks_of(group)
        for block in blocks if blocks is not None else range(count):
            if block >= count or f"language.{block}" in found:
                why = "another group has it too" if block < count else f"there are {count}, from 0"
                raise InputError(f"{group!r} has block {block}, but {why}")
            found[f"language.{block}"] = ratio
    for block in range(count):
        if f"language.{block}" not in found:
            raise InputError(f"block {block} of {count} is in no group: the ratios name {', '.join(ratios)}")
    return found
