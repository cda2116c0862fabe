"""The same average as a recipe for mergekit, which is a program of its own: `mergekit-yaml merge.yaml OUT`.

Its method "linear" takes a weight for each model, where the first filter that is a part of a tensor's name decides:
tensors that take a block's ratio are named one by one, and the rest takes the mean.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from detgpt import terminal
from finetune.averaging.adapter import is_adapter
from finetune.averaging.average import folder_of
from finetune.averaging.ratios import Ratios, of_tensors
from finetune.averaging.weights import stored


def export(file: Path, base: str | Path, tuned: str | Path, ratios: float | Ratios) -> Path:
    """Write the merge of `finetune.averaging.average.average` as mergekit's YAML to `file`, and return it."""
    before, after = folder_of(base).absolute(), folder_of(tuned).absolute()
    of = of_tensors({name: tensor.shape for name, tensor in stored(before).items()}, ratios)
    theirs = f"{before}+{after}" if is_adapter(after) else str(after)
    settings = {
        "merge_method": "linear",
        "models": [
            {"model": str(before), "parameters": {"weight": _filters({name: 1 - ratio for name, ratio in of.items()})}},
            {"model": theirs, "parameters": {"weight": _filters(of)}},
        ],
        "parameters": {"normalize": False},
    }
    with terminal.replacing(file) as partial:
        partial.write_text(yaml.safe_dump(settings, sort_keys=False, width=1000), encoding="utf-8")
    return file


def _filters(weights: dict[str, float]) -> list[dict[str, Any]]:
    """The commonest weight for all, after the names of those that have another; the longest names first, for one may
    be a part of another.
    """
    common = Counter(weights.values()).most_common(1)[0][0]
    others = sorted((name for name, weight in weights.items() if weight != common), key=len, reverse=True)
    return [*({"filter": name, "value": weights[name]} for name in others), {"value": common}]
