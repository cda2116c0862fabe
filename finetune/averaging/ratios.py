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
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from detgpt.errors import InputError
from finetune.parts import EMBEDDINGS, HEAD, PROJECTOR, VISION, part_of

PARTS = {VISION, PROJECTOR, EMBEDDINGS, HEAD}  # beside the blocks
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
    of_groups = [group for group in ratios if group not in PARTS]
    named = owners(shapes, ratios)
    mean = fmean(ratios[group] for group in of_groups)
    return {name: mean if owner is None else ratios[owner] for name, owner in named.items()}


def owners(shapes: Shapes, named: Collection[str]) -> dict[str, str | None]:
    """Which of the `named` groups and parts each tensor takes its ratio from; None: it takes the mean.

    Raises `InputError` unless every block is in exactly one group, `ModelError` for a tensor that is in no part.
    """
    parts = {name: part_of(name) for name in shapes}
    others = PARTS & set(named)
    group_of = _groups_of_blocks([group for group in named if group not in PARTS], count_blocks(parts.values()))

    def owner(name: str, part: str) -> str | None:
        if part in group_of:
            return group_of[part] if is_linear(name, shapes) else None
        return part if part in others else None

    return {name: owner(name, part) for name, part in parts.items()}


def is_linear(name: str, shapes: Shapes) -> bool:
    """Whether this is the matrix (or the stack of them, in a mixture of experts) of a linear layer, or its bias."""
    layer, _, kind = name.rpartition(".")
    return len(shapes.get(f"{layer}.weight" if kind == "bias" else name, ())) >= 2


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
        raise InputError(
            f"{group!r} is no part: name groups of blocks as in language.0-7, or {', '.join(sorted(PARTS))}"
        )
    first, last = match[1], match[2] or match[1]
    return range(int(first), int(last) + 1) if first is not None else None


def _groups_of_blocks(named: Sequence[str], count: int) -> dict[str, str]:
    """The group that has each block. Raises `InputError` unless there is exactly one."""
    found: dict[str, str] = {}
    for group in named:
        blocks = blocks_of(group)
        for block in blocks if blocks is not None else range(count):
            if block >= count or f"language.{block}" in found:
                why = "another group has it too" if block < count else f"there are {count}, from 0"
                raise InputError(f"{group!r} has block {block}, but {why}")
            found[f"language.{block}"] = group
    for block in range(count):
        if f"language.{block}" not in found:
            raise InputError(f"block {block} of {count} is in no group: there are {', '.join(named) or 'none'}")
    return found
