"""What is asked about pictures: torch `Dataset`s of questions, a picture and a prompt of names, and batches of them.

Prompts are made by `detgpt.detectors.spans`, as when the model is used: what is trained is what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from detgpt.detectors.spans import Prompt, known_offsets, known_tokens, make_prompts, token_positions
from detgpt.images import load_image
from finetune.grounding.augment import Augmentation, vary
from finetune.grounding.data import Example, Vocabulary
from finetune.recipe import Settings

INPUTS = ("pixel_values", "pixel_mask", "input_ids", "attention_mask", "token_type_ids")  # of the model, in a batch


class Asking(Settings):
    """Which names a picture is asked for in training.

    alone: share of the prompts that hold one name, as `prompting="separate"` asks; the others hold several, present
    and absent ones in any order, as "joint" does. max_names: at most in one prompt. synonyms: how often a name is
    replaced by one of those that the data has for it.
    """

    alone: float = Field(default=0.25, ge=0, le=1)
    max_names: int = Field(default=40, ge=1)
    synonyms: float = Field(default=0.25, ge=0, le=1)


ALONE_PRESENT = 0.65  # of the names that are asked alone


@dataclass(frozen=True, eq=False)
class Question:
    """A picture, a prompt, and where its names are.

    boxes: (n, 4) xyxy in pixels of the picture. names: for each box the place of its name in the prompt, (n,).
    number: of the question in its data set.
    """

    image: Image.Image | torch.Tensor
    prompt: Prompt
    boxes: np.ndarray
    names: np.ndarray
    number: int

    @property
    def image_wh(self) -> tuple[int, int]:
        if isinstance(self.image, torch.Tensor):
            height, width = self.image.shape[-2:]
            return width, height
        return self.image.size


class PromptMaker:
    """Names to prompts for one tokenizer, which is asked about each name once."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._known: dict[str, list[bool]] = {}

    def __call__(self, names: Sequence[str], prompting: str = "joint") -> list[Prompt]:
        return make_prompts(names, prompting, self.known, self.max_tokens)

    def known(self, text: str) -> list[bool]:
        if text not in self._known:
            self._known[text] = known_tokens(self.tokenizer, text)
        return self._known[text]

    def check(self, examples: Iterable[Example]) -> None:
        """Raise `UnreadableNameError` for a name of theirs that the model cannot be asked for."""
        for vocabulary in {id(example.vocabulary): example.vocabulary for example in examples}.values():
            others = [name for names in vocabulary.synonyms.values() for name in names]
            self([*vocabulary.names, *others], "separate")


class TrainingQuestions(Dataset):
    """One question an example, another in every epoch.

    It depends on the seed, the epoch and the example alone, so that a run that was interrupted goes on with the
    questions that it would have had.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prompts: PromptMaker,
        asking: Asking,
        augmentation: Augmentation | None,
        fill: tuple[int, ...],
        seed: int,
    ) -> None:
        self.examples = [example for example in examples if _askable(example)]
        self.prompts, self.asking, self.augmentation = prompts, asking, augmentation
        self.fill, self.seed, self.epoch = fill, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Question:
        example = self.examples[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        picture = load_image(example.image)
        image: Image.Image | torch.Tensor = picture
        boxes, labels = example.boxes, list(example.labels)
        if self.augmentation is not None:
            seed = int(rng.integers(2**31))
            image, boxes, kept = vary(picture, boxes, self.augmentation, self.fill, seed)
            labels = [labels[i] for i in kept]
        names = self._choose(rng, list(dict.fromkeys(labels)), example)
        prompt = self.prompts([self._say(rng, name, example.vocabulary) for name in names])[0]
        place = {names[k]: k for k in prompt.indices}  # all, unless synonyms were too long for the last ones
        asked = np.array([label in place for label in labels], bool)
        where = np.array([place[label] for label in labels if label in place], int)
        return Question(image, prompt, boxes[asked], where, index)

    def _choose(self, rng: np.random.Generator, present: list[str], example: Example) -> list[str]:
        absent = [name for name in _askable(example) if name not in present]
        here, away = ([names[i] for i in rng.permutation(len(names))] for names in (present, absent))
        if rng.random() < self.asking.alone:
            return (here or away)[:1] if rng.random() < ALONE_PRESENT or not away else away[:1]
        here = here[: self.asking.max_names]
        room = min(len(away), self.asking.max_names - len(here))
        names = [*here, *away[: int(rng.integers(0 if here else 1, room + 1)) if room else 0]]
        fitting = self.prompts(names)[0].indices
        return [names[fitting[i]] for i in rng.permutation(len(fitting))]

    def _say(self, rng: np.random.Generator, name: str, vocabulary: Vocabulary) -> str:
        others = vocabulary.synonyms.get(name, ())
        return str(rng.choice(others)) if others and rng.random() < self.asking.synonyms else name


class ValidationQuestions(Dataset):
    """Every example asked for its whole vocabulary, in as few prompts as hold it, or one a name ("separate")."""

    def __init__(self, examples: Sequence[Example], prompts: PromptMaker, prompting: str) -> None:
        self.examples = list(examples)
        asked: dict[int, list[Prompt]] = {}
        self.questions: list[tuple[int, Prompt]] = []
        for number, example in enumerate(self.examples):
            if id(example.vocabulary) not in asked:
                asked[id(example.vocabulary)] = prompts(example.vocabulary.names, prompting)
            self.questions += [(number, prompt) for prompt in asked[id(example.vocabulary)]]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Question:
        number, prompt = self.questions[index]
        example = self.examples[number]
        place = {example.vocabulary.names[name]: k for k, name in enumerate(prompt.indices)}
        asked = np.array([label in place for label in example.labels], bool)
        where = np.array([place[label] for label in example.labels if label in place], int)
        return Question(load_image(example.image), prompt, example.boxes[asked], where, index)


class Collator:
    """Questions to a batch: the model's INPUTS by the checkpoint's own processor, and what its loss needs.

    truths: a `finetune.grounding.loss.Truth` a question. asked: for each its names' tokens, (k, T), 1 at those of the
    name. questions: (B, 3) number, width and height of the picture.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, questions: Sequence[Question]) -> dict[str, Any]:
        pixels = self.processor.image_processor(images=[q.image for q in questions], do_pad=True, return_tensors="pt")
        tokenizer = self.processor.tokenizer
        tokens = tokenizer(
            [q.prompt.text for q in questions],
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        offsets = known_offsets(tokenizer, tokens)
        del tokens["offset_mapping"]
        asked = [name_tokens(q.prompt, row) for q, row in zip(questions, offsets, strict=True)]
        return {
            **pixels,
            **tokens,
            "truths": [
                {"boxes": _fractions(q), "tokens": names[q.names]} for q, names in zip(questions, asked, strict=True)
            ],
            "asked": asked,
            "questions": torch.tensor([(q.number, *q.image_wh) for q in questions]),
        }


def name_tokens(prompt: Prompt, offsets: np.ndarray) -> torch.Tensor:
    """(k, T): 1 at the tokens of each of the prompt's names; `offsets` (T, 2) are the characters of each token."""
    rows = torch.zeros(len(prompt.spans), len(offsets))
    for row, span in zip(rows, prompt.spans, strict=True):
        row[token_positions(offsets, span)] = 1
    return rows


def _fractions(question: Question) -> torch.Tensor:
    """The boxes as (n, 4) cxcywh in fractions of the picture."""
    boxes = torch.from_numpy(question.boxes).float() / torch.tensor(question.image_wh).repeat(2)
    return box_convert(boxes.clamp(0, 1), "xyxy", "cxcywh")


def _askable(example: Example) -> list[str]:
    """The names of which it is known where they are; of what is there in crowds alone it is not."""
    crowded = set(example.ignored_labels) - set(example.labels)
    return [name for name in example.vocabulary.names if name not in crowded]
