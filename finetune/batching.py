"""From encoded examples to batches: padded, or packed so that next to nothing is padding, for any family's pictures.

    trainer = SFTTrainer(…, data_collator=collator(model, processor, packing=True))

An example is what `finetune.encoding.encode` gives: `input_ids` and `labels` of L tokens, what the family says of each
token (`TOKEN_INPUTS`), and its pictures' tensors, of which the first dimension counts pictures, tiles or patches.

Text alone is packed by transformers and TRL. What they lack is here: pictures that stay with their example, the 3-D
positions of Qwen-VL, rows that are no longer than the longest example, and a refusal where packing would not be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import AutoModelForImageTextToText
from transformers.trainer_pt_utils import get_length_grouped_indices

from detgpt.errors import InputError
from detgpt.reasoners.prefix import remembers_tokens_only

Example = Mapping[str, Any]
Batch = dict[str, Any]
Collator = Callable[[Sequence[Example]], Batch]

IGNORED = -100  # a label that the loss leaves out
TEACHER_ROWS = "teacher_rows"  # the row of each token in a teacher's cache (`finetune.distill`); -1 where there is none
# What a processor says of every token, beside the pictures' tensors. The attention mask is ours to write.
TOKEN_INPUTS = ("input_ids", "labels", "token_type_ids", "mm_token_type_ids", TEACHER_ROWS)

# Model types whose packed loss is the padded one; tests/test_finetune_batching.py goes through them all. Others see
# beyond an example's bounds (PaliGemma's prefix, ALiBi), carry a state along the row, or are not proven yet. Gemma 3
# takes a picture's tokens for others in its sliding layers, as soon as the example is not the row's first.
PACKABLE_WITH_PICTURES = frozenset(
    ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm"]
)
PACKABLE_TEXT = frozenset(["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])


def collator(model: Any, processor: Any, *, packing: bool = False) -> Collator:
    """What makes batches for `model`; `processor` is its processor, or a text model's tokenizer.

    Raises `InputError` where `packing` would not give the loss of the examples by themselves.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Packed(model.config, padding) if packing else Padded(padding)


class Padded:
    """One example a row, padded on the right."""

    def __init__(self, pad_token_id: int) -> None:
        self._rows = _Rows(pad_token_id)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `labels`, `attention_mask`: (B, longest), and the pictures of all rows one after the other."""
        rows = [[example] for example in examples]
        lengths = [_length(example) for example in examples]
        mask = [torch.ones(length, dtype=torch.long) for length in lengths]
        return {**self._rows(rows), "attention_mask": _stacked(mask, 0), **_pictures(examples)}


class Packed:
    """Several examples a row, each by itself: positions start anew, and none attends to another.

    Rows are as long as the batch's longest example, filled best fit first ("bfd"); with flash attention, which takes
    its time from the examples' lengths and not from the row's, all are in one. There is no attention mask and no cache:
    only then does transformers read the bounds from `position_ids`.
    """

    def __init__(self, config: Any, pad_token_id: int) -> None:
        check_packable(config)
        self._rows = _Rows(pad_token_id)
        self._one_row = "flash" in (config.get_text_config()._attn_implementation or "")
        self._rope_index = _rope_index(config)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `labels` (rows, longest); `position_ids` (rows, longest), for Qwen-VL (4, rows, longest)."""
        lengths = [_length(example) for example in examples]
        rows = best_fit(lengths, sum(lengths) if self._one_row else max(lengths))
        packed = [[examples[i] for i in row] for row in rows]
        in_order = list(chain.from_iterable(packed))  # pictures come in the order of their tokens
        positions = [torch.cat([self._positions(example) for example in row], dim=-1) for row in packed]
        return {
            **self._rows(packed),
            "position_ids": _stacked(positions, 0, dim=-2),
            "use_cache": False,
            **_pictures(in_order),
        }

    def _positions(self, example: Example) -> torch.Tensor:
        """(L,), or for a model with 3-D positions (4, L): the place in the example, then time, height and width."""
        places = torch.arange(_length(example))
        if self._rope_index is None:
            return places
        if example.get("image_grid_thw") is None:
            return places.expand(4, -1)
        in_space, _ = self._rope_index(
            input_ids=_ids(example, "input_ids")[None],
            mm_token_type_ids=_ids(example, "mm_token_type_ids")[None],
            image_grid_thw=torch.as_tensor(example["image_grid_thw"]),
        )
        return torch.cat([places[None], in_space[:, 0]])


def check_packable(config: Any) -> None:
    """Raises `InputError` unless examples of this model can share a row and not notice."""
    with_pictures = config.model_type in PACKABLE_WITH_PICTURES
    if not with_pictures and config.model_type not in PACKABLE_TEXT:
        known = ", ".join(sorted(PACKABLE_WITH_PICTURES | PACKABLE_TEXT))
        raise InputError(
            f"examples of a {config.model_type!r} model cannot be packed: it is not known to keep them apart "
            f"(known: {known}): leave packing out, and let batches be drawn by length"
        )
    if not remembers_tokens_only(config):
        language_model = config.get_text_config(decoder=True).model_type
        raise InputError(
            f"examples of this {config.model_type!r} model cannot be packed: its language model ({language_model}) "
            "carries a state from one example to the next. Leave packing out, and let batches be drawn by length"
        )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`: longest first, into the fullest row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            rows[best].append(index)
            room[best] -= lengths[index]
        else:
            rows.append([index])
            room.append(capacity - lengths[index])
    return rows


class LengthBuckets(Sampler[int]):
    """Examples in batches of like lengths, other ones every epoch, the same ones for the same seed and epoch.

    As transformers' `LengthGroupedSampler`, whose order hangs on the state of torch's generator, so that a resumed run
    sees other batches, and which goes through each of its groups from the longest to the shortest. Here batches come in
    random order, but for the longest, which is first: short memory shows at once.

    lengths: tokens of each example. batch_size: examples of one step of all processes, or of a part of it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(self._seed + self._epoch)
        indices = get_length_grouped_indices(self._lengths, self._batch_size, generator=chance)
        batches = [indices[start : start + self._batch_size] for start in range(0, len(indices), self._batch_size)]
        # The longest stays first; a last one that is not whole stays last, or the others would shift against it.
        last = len(batches) - bool(len(indices) % self._batch_size)
        middle = 1 + torch.randperm(max(last - 1, 0), generator=chance)
        order = [*range(min(last, 1)), *middle.tolist(), *range(last, len(batches))]
        return chain.from_iterable(batches[i] for i in order)


def draw_by_length(trainer: Any, lengths: Sequence[int]) -> None:
    """Let `trainer` draw its training batches by `LengthBuckets`; `lengths` are the tokens of each training example."""
    args = trainer.args
    together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer._get_train_sampler = lambda dataset=None: LengthBuckets(lengths, together, args.seed)


class _Rows:
    """What is said of tokens, as rows: (rows, longest)."""

    def __init__(self, pad_token_id: int) -> None:
        self._padding = {"input_ids": pad_token_id, "labels": IGNORED, TEACHER_ROWS: -1}

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        names = [name for name in TOKEN_INPUTS if any(name in example for row in rows for example in row)]
        return {
            name: _stacked([torch.cat([_ids(x, name) for x in row]) for row in rows], self._padding.get(name, 0))
            for name in names
        }


def _ids(example: Example, name: str) -> torch.Tensor:
    """(L,); zeros where only other examples of the batch have this (text alone has no token types)."""
    if name not in example:
        return torch.zeros(_length(example), dtype=torch.long)
    ids = torch.as_tensor(example[name]).reshape(-1)
    if name == "labels":  # the first token follows nothing: not the token before it in the row either
        ids = torch.cat([torch.tensor([IGNORED]), ids[1:]])
    return ids


def _length(example: Example) -> int:
    return int(torch.as_tensor(example["input_ids"]).numel())


def _stacked(rows: Sequence[torch.Tensor], value: int, dim: int = 0) -> torch.Tensor:
    """Rows padded on the right of their last dimension, along a new dimension `dim`."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([pad(row, (0, longest - row.shape[-1]), value=value) for row in rows], dim=dim)


def _pictures(examples: Sequence[Example]) -> Batch:
    """The pictures' tensors one after the other; where they differ in another dimension, zeros fill up behind.

    So do the families' own processors, and their models leave what is zero out.
    """
    names = dict.fromkeys(name for example in examples for name in example if name not in NOT_PICTURES)
    batch: Batch = {}
    for name in names:
        parts = [torch.as_tensor(example[name]) for example in examples if example.get(name) is not None]
        if parts:
            largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
            batch[name] = torch.cat([_filled(part, largest) for part in parts])
    return batch


NOT_PICTURES = frozenset([*TOKEN_INPUTS, "attention_mask", "length"])


def _filled(part: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """`part` with zeros behind, up to `sizes` of all dimensions but the first."""
    missing = [(0, size - here) for size, here in zip(sizes, part.shape[1:], strict=True)]
    return pad(part, list(chain.from_iterable(reversed(missing))))


def _rope_index(config: Any) -> Callable[..., Any] | None:
    """The model's own computation of 3-D positions, which needs its configuration only: it is built without memory."""
    if config.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        return None
    with torch.device("meta"):
        base: Any = AutoModelForImageTextToText.from_config(config).base_model
    return base.get_rope_index
