"""A conversation as the model reads it, and which of its tokens it learns.

    encode(processor, [{"role": "user", "content": "I am thirsty"},
                       {"role": "assistant", "content": 'A desk.\nTargets: ["cup"]'}], image)

The checkpoint's own chat template writes the text, as at inference (`detgpt.reasoners.chat`): what is trained is what
is asked. Learned are the answers, each up to the token that ends its turn. Where they begin and end is told by encoding
the conversation up to there as well; a template that writes the beginning of a conversation in another way once there
is more of it does not allow that, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from detgpt.errors import InputError, ModelError
from detgpt.images import load_image
from detgpt.reasoners import chat
from finetune.batching import IGNORED, TOKEN_INPUTS

Message = Mapping[str, str]
Encoded = dict[str, torch.Tensor]


class _Answer(NamedTuple):
    """Tokens [start, end) of an answer; ends: whether the last of them ends the turn."""

    start: int
    end: int
    ends: bool


def encode(processor: Any, messages: Sequence[Message], image: Image.Image | None = None) -> Encoded:
    """The model's inputs for one conversation.

    processor: of a vision-language model, or the tokenizer of a language model. messages: a system's, if any, then
    user and assistant in turn; the image goes with the first user's.

    Returns `input_ids` and `labels`, (L,), where labels are -100 on all but the answers; what the family tells of each
    token besides (`finetune.batching.TOKEN_INPUTS`), (L,); and the image's tensors as the processor gives them.
    A last answer that the template leaves open gets the tokenizer's end token. Raises `ModelError` for a checkpoint
    without a chat template or with one that is not stable, `InputError` for messages that do not fit it.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not processor.chat_template:
        raise ModelError(
            f"{_name(tokenizer)} has no chat template: take the checkpoint that was trained to answer, or add its "
            "chat_template.jinja"
        )
    turns = conversation(processor, messages, image)
    batch = processor.apply_chat_template([turns], tokenize=True, return_dict=True, return_tensors="pt")
    encoded = {name: value[0] if name in TOKEN_INPUTS else value for name, value in batch.items()}
    encoded.pop("attention_mask", None)
    text_ids, answers = _answers(processor, tokenizer, turns)
    ids = encoded["input_ids"]
    shift = len(ids) - len(text_ids)  # an image's placeholder became many tokens, all before the first answer
    if answers and ids[answers[0].start + shift :].tolist() != text_ids[answers[0].start :]:
        raise ModelError(
            f"{_name(tokenizer)}: the processor writes something else for the text behind the image than its tokenizer"
        )
    labels = torch.full_like(ids, IGNORED)
    for answer in answers:
        start, end = answer.start + shift, answer.end + shift
        labels[start:end] = ids[start:end]
    encoded["labels"] = labels
    if answers and not answers[-1].ends and messages[-1]["role"] == "assistant":
        _end_turn(encoded, answers[-1].end + shift, tokenizer.eos_token_id)
    return encoded


def truncated(encoded: Encoded, max_length: int | None, where: str) -> Encoded:
    """`encoded` without what is beyond `max_length` tokens. Raises `InputError` where no answer would be left."""
    if max_length is None or len(encoded["input_ids"]) <= max_length:
        return encoded
    if (encoded["labels"][:max_length] == IGNORED).all():
        begins = int((encoded["labels"] != IGNORED).nonzero()[0])
        raise InputError(
            f"{where}: the answer begins at token {begins}, behind max_length={max_length}: raise max_length, leave "
            "the record out, or let the processor make fewer tokens of an image"
        )
    return {name: value[:max_length] if name in TOKEN_INPUTS else value for name, value in encoded.items()}


class RecordEncoder:
    """Encodes records of `finetune.data.records` as they are drawn: `dataset.with_transform(RecordEncoder(…))`.

    A wish is worded as the model is asked at inference; `bare`: as the user wrote it. Conversations go as they are.
    """

    def __init__(self, processor: Any, *, bare: bool, max_length: int | None = None) -> None:
        self._processor = processor
        self._bare = bare
        self._max_length = max_length

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[torch.Tensor | None]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [self.encode(row) for row in rows]
        names = dict.fromkeys(name for example in examples for name in example)
        return {name: [_of(example, name) for example in examples] for name in names}

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        where = record.get("where") or "a record"
        if not record["messages"]:
            raise InputError(f"{where}: there is nothing said: a record to learn from has 'instruction' or 'messages'")
        image = load_image(record["image"]) if record.get("image") is not None else None
        encoded = encode(self._processor, worded(record, bare=self._bare), image)
        return truncated(encoded, self._max_length, where)


def worded(record: Mapping[str, Any], *, bare: bool) -> list[Message]:
    """The messages of a record, a wish in the words that the model is asked with at inference."""
    messages = list(record["messages"])
    if record.get("instruction") is not None:
        messages[0] = {**messages[0], "content": chat.worded(messages[0]["content"], bare=bare)}
    return messages


def conversation(processor: Any, messages: Sequence[Message], image: Image.Image | None) -> list[dict[str, Any]]:
    """Chat messages in the form that the template takes: parts for a processor, plain text for a tokenizer."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    texts = [message["content"] for message in messages[system is not None :]]
    turns = chat.conversation(texts, image, chat.control_tokens(processor), system=system)
    if hasattr(processor, "tokenizer"):
        return turns
    if image is not None:
        raise InputError(f"{_name(processor)} is a language model, which sees no image: leave images out of its data")
    return [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in turns]


def _of(example: Encoded, name: str) -> torch.Tensor | None:
    """None for pictures where there are none; zeros for what is told of tokens only where there are pictures."""
    if name in TOKEN_INPUTS and name not in example:
        return torch.zeros_like(example["input_ids"])
    return example.get(name)


def _written(processor: Any, turns: list[dict[str, Any]], **how: bool) -> str:
    """The text of the conversation as the template writes it."""
    text: str = processor.apply_chat_template(turns, tokenize=False, **how)
    return text


def _answers(processor: Any, tokenizer: Any, turns: list[dict[str, Any]]) -> tuple[list[int], list[_Answer]]:
    """The tokens of the whole text, an image being one placeholder, and where among them the answers are."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    beginnings = [_written(processor, turns[:i], add_generation_prompt=True) for i in answers]
    endings = [_written(processor, turns[: i + 1]) for i in answers]
    whole = _written(processor, turns)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, *beginnings, *endings)]
    ids = tokens[0]
    for prefix in tokens[1:]:
        if ids[: len(prefix)] != prefix:
            raise ModelError(
                f"{_name(tokenizer)}: the chat template writes a conversation's beginning in another way once there is "
                "more of it, so its answers cannot be told from its questions: give conversations of one turn, or a "
                "checkpoint whose template does not"
            )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    starts, ends = tokens[1 : 1 + len(answers)], tokens[1 + len(answers) :]
    return ids, [
        _answer(ids, len(start), len(end), special, tokenizer) for start, end in zip(starts, ends, strict=True)
    ]


def _answer(ids: Sequence[int], start: int, end: int, special: set[int], tokenizer: Any) -> _Answer:
    """The answer in [start, end) up to the token that ends the turn, or else without the space behind it."""
    ending = next((i for i in range(start, end) if ids[i] in special), None)
    if ending is not None:
        return _Answer(start, ending + 1, ends=True)
    while end > start and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    return _Answer(start, end, ends=False)


def _end_turn(encoded: Encoded, end: int, end_token_id: int) -> None:
    """Put the end token in the place of what is behind the last answer, in place."""
    for name in TOKEN_INPUTS:
        if name in encoded:
            value = end_token_id if name in ("input_ids", "labels") else 0
            kept = encoded[name][:end]
            encoded[name] = torch.cat([kept, kept.new_tensor([value])])


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "the checkpoint"
