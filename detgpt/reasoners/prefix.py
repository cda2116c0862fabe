"""Encode an image once: its part of the prompt is kept as keys and values, and later prompts go on from there.

A prompt about an image begins with the image, so what is asked later (the next turn of a conversation, another
instruction) shares its first tokens, and in a causal model their keys and values do not depend on what follows.
Of the last few images the keys and values of the latest prompt and answer are kept; a new prompt about one of
them runs only the tokens that differ. In a batch, masked holes make the rows equally long:

    ids    [hole | kept prefix | hole | new tokens]
    cache  [hole | kept prefix]

Only what is proven is done so, see `CAUSAL_FAMILIES` and `_can_resume`; everything else runs whole, as it came.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Model types whose image tokens never look at the text behind them; tests/test_prefix.py goes through them all.
# (PaliGemma's do, and InstructBLIP's image features read the instruction.)
CAUSAL_FAMILIES = frozenset(
    ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "gemma3"]
)
POSITION_INPUTS = ("image_grid_thw",)  # say where an image's tokens stand: needed even where its pixels are not


@dataclass(frozen=True)
class _Kept:
    """A prompt and its answer, as far as they ran."""

    ids: torch.Tensor  # (n,)
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, each (heads, n, size)


class KeptPrefixes:
    """The latest prompt and answer about each of the last `limit` images, as keys and values; 0 keeps none.

    Takes the memory of that many conversations. One thread at a time. An image of few tokens is kept as well: with the
    49 of the built-in model that costs 0.4 ms of a question's 200, and the next question gains its image tower's 17 ms.
    """

    def __init__(self, model: Any, limit: int) -> None:
        self._model = model
        self._limit = limit if _can_resume(model) else 0
        self._kept: dict[str, _Kept] = {}  # by image key, the latest last

    def rows_to_run_first(self, images: Sequence[str | None]) -> list[int]:
        """A row for each image of a batch that its other rows should find kept; none where that gains nothing."""
        if None in images:
            return []
        distinct = dict.fromkeys(images)
        unknown = [image for image in distinct if image not in self._kept]
        nothing_shared = len(unknown) == len(images)
        if nothing_shared or len(distinct) > self._limit:
            return []
        return [images.index(image) for image in unknown]

    def resume(self, images: Sequence[str | None], inputs: Any, max_new_tokens: int) -> dict[str, Any]:
        """Arguments for `generate`: from where the kept prefixes end, or the whole inputs where one is missing.

        images: an `image_key` per row; with None among them nothing is kept or used.
        inputs: of the processor, padded on the left.
        """
        if not self._limit or None in images:
            return dict(inputs)
        cache = _recording_cache(self._model)
        whole = {**inputs, "cache": cache}
        kept = [self._kept[image] for image in images if image in self._kept]
        if len(kept) < len(images):
            return whole
        ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
        starts = inputs["attention_mask"].argmax(dim=1).tolist()
        shared = [_shared(entry.ids, row[start:]) for entry, row, start in zip(kept, ids, starts, strict=True)]
        new = [width - start - count for start, count in zip(starts, shared, strict=True)]
        past, steps = max(shared), max(new)
        if any((row[-n:] == self._model.config.image_token_id).any() for row, n in zip(ids, new, strict=True)):
            return whole  # the prompts part before the image ends
        if min(new) < steps and past + steps + max_new_tokens > _window(cache):
            return whole  # a sliding window counts the holes between as tokens
        columns = torch.full((len(ids), past + steps), -1, device=ids.device)  # of `ids`; -1 is a hole
        for row, (start, count, n) in enumerate(zip(starts, shared, new, strict=True)):
            columns[row, past - count : past] = torch.arange(start, start + count)
            columns[row, -n:] = torch.arange(width - n, width)
        _fill(cache, kept, shared)
        if hasattr(self._model.base_model, "rope_deltas"):
            self._model.base_model.rope_deltas = None  # the last call's; `generate` trusts them unless they are gone
        return {**_take_columns(inputs, columns, self._model.generation_config.pad_token_id), "cache": cache}

    def keep(self, images: Sequence[str | None], arguments: dict[str, Any], sequences: torch.Tensor) -> None:
        """Keep what `generate` ran with the arguments of `resume` and returned: (B, prompt and answer)."""
        if "cache" not in arguments:
            return
        cache, mask = arguments["cache"], arguments["attention_mask"]
        length = cache.get_seq_length()
        if any(layer.keys.shape[-2] < length for layer in cache.layers):
            return  # `generate` cuts sliding layers to their window on some devices (mps)
        ran = pad(mask, (0, length - mask.shape[1]), value=1).bool()
        last_rows = {image: row for row, image in enumerate(images) if image is not None}
        for image, row in list(last_rows.items())[-self._limit :]:
            slots = ran[row].nonzero()[:, 0]
            layers = [
                (layer.keys[row, :, slots.to(layer.keys.device)], layer.values[row, :, slots.to(layer.values.device)])
                for layer in cache.layers
            ]
            self._kept.pop(image, None)
            self._kept[image] = _Kept(sequences[row, slots], layers)
        while len(self._kept) > self._limit:
            del self._kept[next(iter(self._kept))]

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()


def _can_resume(model: Any) -> bool:
    """Whether this model, with this version of transformers, answers the same from a kept prefix."""
    if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        return False  # transformers before 5.24 names and slices its caches otherwise
    if model.config.model_type not in CAUSAL_FAMILIES:
        return False
    return remembers_tokens_only(model.config)


def remembers_tokens_only(config: Any) -> bool:
    """Whether all that the language model remembers is keys and values of each token.

    A family may hold any language model; one with a recurrent state or shared layers has layers of other kinds.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _recording_cache(model: Any) -> Any:
    """An empty `DynamicCache` whose sliding layers hold on to the tokens that have left their window."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    return cache


def _window(cache: Any) -> float:
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf)


def _shared(kept: torch.Tensor, ids: torch.Tensor) -> int:
    """How many first tokens agree, short of the last one of `ids`: it has to run, to say what comes next."""
    length = min(len(kept), len(ids) - 1)
    return int((kept[:length] == ids[:length]).long().cumprod(0).sum())


def _fill(cache: Any, kept: Sequence[_Kept], counts: Sequence[int]) -> None:
    """Write the first `counts[i]` tokens of `kept[i]` into row i, behind a hole up to the longest."""
    longest = max(counts)
    for index in range(len(cache.layers)):
        for_layer = [
            [pad(part[:, :count], (0, 0, longest - count, 0)) for part in entry.layers[index]]
            for entry, count in zip(kept, counts, strict=True)
        ]
        keys, values = (torch.stack(parts) for parts in zip(*for_layer, strict=True))
        cache.update(keys, values, index)


def _take_columns(inputs: Any, columns: torch.Tensor, pad_token_id: int) -> dict[str, Any]:
    """The inputs that have a value per token, with their values where `columns` says. The pixels stay behind."""
    taken = {name: inputs[name] for name in POSITION_INPUTS if name in inputs}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == inputs["input_ids"].shape:
            in_a_hole = pad_token_id if name == "input_ids" else 0
            taken[name] = value.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, in_a_hole)
    return taken
