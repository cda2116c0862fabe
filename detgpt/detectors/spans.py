"""From names to prompts and from token scores back to names, for detectors that read a text prompt.

A prompt is "cup . cold bottle . ". The detector scores every box query against every token of it. A name's
score is the best of the tokens that lie in its characters; labels are never guessed from decoded tokens,
which merges and garbles them. Pure numpy: a backend brings the tokenizer and the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from detgpt.boxes import concatenate, cxcywh_norm_to_xyxy, within_image
from detgpt.detectors import Grounding
from detgpt.errors import InputError, ModelError, UnreadableNameError

PROMPTINGS = ("separate", "joint")
SEPARATOR = " . "


@dataclass(frozen=True)
class Prompt:
    """One text for the detector: `spans[k]` are the characters of name number `indices[k]` in `text`."""

    text: str
    indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenScores:
    """What the network says about one prompt: T tokens, Q box queries.

    `offsets` (T, 2) the characters of each token, empty for special, padding and unknown tokens;
    `probabilities` (Q, ≥T) sigmoid of the logits; `boxes` (Q, 4) cxcywh in fractions of the image.
    """

    offsets: np.ndarray
    probabilities: np.ndarray
    boxes: np.ndarray


def check_query(
    images: Sequence[Image.Image],
    names: Sequence[Sequence[str]],
    box_threshold: float,
    text_threshold: float,
    prompting: str,
) -> None:
    """Raise `InputError` for arguments that no prompt can be made from."""
    if len(images) != len(names):
        raise InputError(f"Got {len(images)} images but {len(names)} lists of names; each image needs its own.")
    for argument, value in (("box_threshold", box_threshold), ("text_threshold", text_threshold)):
        if not 0 <= value <= 1:
            raise InputError(f"{argument} must lie in [0, 1], got {value!r}.")
    if prompting not in PROMPTINGS:
        raise InputError(f"prompting must be one of {', '.join(PROMPTINGS)}, got {prompting!r}.")
    for asked in names:
        if isinstance(asked, str):
            raise InputError(f"names must be one list of names per image, got the string {asked!r}.")


def known_tokens(tokenizer: Any, text: str) -> list[bool]:
    """For each token of `text`: is it a token of the vocabulary, or the one that stands for the unknown?"""
    return [token != tokenizer.unk_token_id for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def known_offsets(tokenizer: Any, encoded: Any) -> np.ndarray:
    """The characters of each token of a batch, (B, T, 2); none for the unknown, which says nothing about its name."""
    unknown = np.asarray(encoded["input_ids"]) == tokenizer.unk_token_id
    return np.where(unknown[..., None], 0, np.asarray(encoded["offset_mapping"]))


def read_names(names: Sequence[str], known: Callable[[str], Sequence[bool]], room: int) -> list[tuple[str, int]]:
    """Each name as a phrase that the detector can read, and the tokens it takes, at most `room`.

    `known` says of each token of a text whether the tokenizer has it in its vocabulary. Raises
    `UnreadableNameError` for a name without a letter or digit, one that takes more tokens, and one of which no
    token is known, such as a word in a script that the detector never saw.
    """
    return [_read(name, known, room) for name in names]


def make_prompts(
    names: Sequence[str], prompting: str, known: Callable[[str], Sequence[bool]], max_tokens: int
) -> list[Prompt]:
    """Put each name in a prompt of its own ("separate") or as many in one as fit ("joint").

    `max_tokens` is the longest prompt the network reads, with its two special tokens; names that do not fit
    in one joint prompt go on in a second. `known` and the error are those of `read_names`.
    """
    room = max_tokens - 2
    read = read_names(names, known, room - 1)  # a full stop follows each name
    groups: list[list[int]] = []
    left = 0
    for index, (_, tokens) in enumerate(read):
        if prompting == "joint" and tokens + 1 <= left:
            groups[-1].append(index)
        else:
            groups.append([index])
            left = room
        left -= tokens + 1
    return [_join([phrase for phrase, _ in read], group) for group in groups]


def ground_images(
    images: Sequence[Image.Image],
    prompts: Sequence[Sequence[Prompt]],
    *,
    encode: Callable[[list[Image.Image]], Any],
    fuse: Callable[[Any, list[int], list[Prompt]], Iterable[TokenScores]],
    max_prompts_per_pass: int,
    box_threshold: float,
    text_threshold: float | None,
) -> list[Grounding]:
    """Encode each image once, run its prompts through the fused layers, and read the names off the tokens.

    `encode` turns images of one size into features; `fuse(features, rows, prompts)` pairs prompt k with
    image `rows[k]` of them. Only images of one size share a batch: padding one image up to another would let the
    padding into the image encoder's windows and change its boxes. A pass takes at most
    `max_prompts_per_pass` images or prompts, which bounds memory. An image without prompts is not encoded.
    """
    parts: list[list[Grounding]] = [[] for _ in images]
    for indices in _same_size(images, prompts, max_prompts_per_pass):
        features = encode([images[i] for i in indices])
        queries = [(row, prompt) for row, i in enumerate(indices) for prompt in prompts[i]]
        for start in range(0, len(queries), max_prompts_per_pass):
            chunk = queries[start : start + max_prompts_per_pass]
            outputs = fuse(features, [row for row, _ in chunk], [prompt for _, prompt in chunk])
            for (row, prompt), output in zip(chunk, outputs, strict=True):
                image = indices[row]
                part = ground(prompt, output, images[image].size, box_threshold, text_threshold)
                parts[image].append(part)
    return [concatenate(part) for part in parts]


def ground(
    prompt: Prompt,
    output: TokenScores,
    image_wh: tuple[int, int],
    box_threshold: float,
    text_threshold: float | None,
) -> Grounding:
    """Give each box query to its best name and keep those over the thresholds, clipped to the image.

    Without `text_threshold` (a prompt of one name) the name's score must reach `box_threshold`. With it, as
    in the original's joint prompt, the best token of the whole prompt must reach `box_threshold` and the
    name's score `text_threshold`. The score returned is the name's.
    """
    probabilities = output.probabilities
    refuse_nan(probabilities)
    columns = [token_positions(output.offsets, span) for span in prompt.spans]
    scores = np.stack([probabilities[:, tokens].max(axis=1) for tokens in columns], axis=1)  # (Q, names)
    best = scores.argmax(axis=1)
    score = scores.max(axis=1)
    if text_threshold is None:
        keep = score >= box_threshold
    else:
        keep = (probabilities.max(axis=1) >= box_threshold) & (score >= text_threshold)
    found = Grounding(
        boxes=cxcywh_norm_to_xyxy(output.boxes[keep], image_wh),
        scores=score[keep].astype(np.float32),
        name_index=np.array(prompt.indices, dtype=np.int64)[best[keep]],
    )
    return within_image(found, image_wh)


def refuse_nan(scores: np.ndarray) -> None:
    """Raise `ModelError` for scores that half precision has spoiled."""
    if np.isnan(scores).any():
        raise ModelError("The detector returned NaN scores; load it with dtype='float32'.")


def token_positions(offsets: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """The tokens, of `offsets` (T, 2), that lie in the characters [start, end)."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    return np.flatnonzero((starts >= span[0]) & (ends <= span[1]) & (starts < ends))


def _read(name: str, known: Callable[[str], Sequence[bool]], room: int) -> tuple[str, int]:
    phrase = _phrase(name)
    if not any(character.isalnum() for character in phrase):
        raise UnreadableNameError(name, f"A name to detect needs at least one letter or digit, got {name!r}.")
    tokens = known(phrase)
    if len(tokens) > room:
        wrong = f"The name {name[:60]!r} is too long: the detector reads {room} tokens of it. Use fewer words."
        raise UnreadableNameError(name, wrong)
    if not any(tokens):
        wrong = f"The detector's vocabulary holds no part of the name {name[:60]!r}."
        raise UnreadableNameError(name, f"{wrong} Use the language of its training, English for most.")
    return phrase, len(tokens)


def _phrase(name: str) -> str:
    """Lower case, one line, and without the marks that end a phrase or list phrases in a prompt."""
    # Lower case keeps "[SEP]" from being read as a special token, and no angles or bars do so for "<|endoftext|>".
    return " ".join(re.sub(r"[.,?<|>]", " ", name.lower()).split())


def _join(phrases: Sequence[str], group: Sequence[int]) -> Prompt:
    text, spans = "", []
    for index in group:
        spans.append((len(text), len(text) + len(phrases[index])))
        text += phrases[index] + SEPARATOR
    return Prompt(text, tuple(group), tuple(spans))


def _same_size(images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]], limit: int) -> Iterator[list[int]]:
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        if prompts[index]:
            by_size.setdefault(image.size, []).append(index)
    for indices in by_size.values():
        for start in range(0, len(indices), limit):
            yield indices[start : start + limit]
