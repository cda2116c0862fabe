"""What a reasoner can do besides finding things: free answers to questions, one number for each ability.

    evaluate_abilities("picto", "abilities")         # {"counting": AbilityResult(0.91, …), …}

A folder holds one folder for each ability, whose `data.jsonl` has a question a line:

    {"image": "1.webp", "question": "How many cups are there?", "answer": "Two.", "score": "number"}
    {"question": "What is a kettle for?", "targets": ["water"], "score": "names"}

`score` says how the answer is judged, see `scoring`: exact, number and yes_no compare with `answer`, names and targets
with `targets`. A question goes to the model as it stands here; one without a picture goes to its language model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.errors import InputError
from detgpt.evaluation import fields, scoring
from detgpt.evaluation.writing import Names
from detgpt.images import load_image
from detgpt.models import PAIR_FILE, PAIRS, load_reasoner, resolve
from detgpt.reasoners import Reasoner, Request

if TYPE_CHECKING:
    from detgpt.pipeline import DetGPT

DATA_FILE = "data.jsonl"
HINT = f"an abilities folder holds a folder with {DATA_FILE} for each ability"
BY_ANSWER = {"exact": scoring.exact, "number": scoring.number, "yes_no": scoring.yes_no}
BY_TARGETS = ("names", "targets")
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """image: a file, or None. answer: the truth for the scores `BY_ANSWER`; targets: that for `BY_TARGETS`."""

    question: str
    score: str
    image: Path | None = None
    answer: str = ""
    targets: tuple[str, ...] = ()
    where: str = ""

    def request(self) -> Request:
        image = None if self.image is None else load_image(self.image)
        return Request(image, self.question, verbatim=True)


@dataclass(frozen=True)
class Ability:
    """The questions of one ability, and all names that any of them expects."""

    questions: tuple[Question, ...]
    known: Names

    def score(self, question: Question, text: str) -> float:
        """How right `text` is, in [0, 1]."""
        if question.score == "names":
            return scoring.names(text, question.targets, self.known)
        if question.score == "targets":
            return scoring.targets(text, question.targets)
        return BY_ANSWER[question.score](text, question.answer)


@dataclass(frozen=True)
class AbilityResult:
    """The mean score over `n` questions and its 95% interval, Wilson's; a harness may know none."""

    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> AbilityResult:
        value = sum(scores) / len(scores)
        return cls(value, *scoring.wilson(value, len(scores)), len(scores))


def evaluate_abilities(
    model: str | Path | Reasoner | DetGPT,
    folder: str | Path | Mapping[str, Ability],
    *,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[str, Question, str, float], None] | None = None,
) -> dict[str, AbilityResult]:
    """Ask all questions of `folder`, the first `limit` of each ability, and score the answers.

    model: a reasoner, a checkpoint of one, or a pair, of which only the reasoner is loaded or used.
    folder: a path, or what `read_abilities` gave.
    progress: called with (done, total) after each batch. each: with ability, question, answer and score, in order.
    Raises `InputError`, which names the file and the line, for data that is wrong, before a model is loaded.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} is no batch: give 1 or more")
    abilities = folder if isinstance(folder, Mapping) else read_abilities(folder, limit=limit)
    reasoner = load_answering(model)
    asked = [(name, question) for name, ability in abilities.items() for question in ability.questions[:limit]]
    texts = _answers(reasoner, [question for _, question in asked], batch_size, max_new_tokens, progress)
    scores: dict[str, list[float]] = {name: [] for name in abilities}
    for (name, question), text in zip(asked, texts, strict=True):
        scores[name].append(abilities[name].score(question, text))
        if each:
            each(name, question, text, scores[name][-1])
    return {name: AbilityResult.of(values) for name, values in scores.items()}


def load_answering(model: str | Path | Reasoner | DetGPT, **loading: Any) -> Reasoner:
    """The reasoner of a pair, of a checkpoint, or itself. loading: device and dtype, as in `load_reasoner`."""
    if isinstance(model, (str, Path)):
        reasoner, base_url = answering(model)
        return load_reasoner(reasoner, base_url=base_url, **loading)
    part: Any = getattr(model, "reasoner", model)
    return load_reasoner(part)


def answering(model: str | Path) -> tuple[str, str | None]:
    """The reasoner of a pair, or the checkpoint itself; and the server that runs it, if one does."""
    if str(model) not in PAIRS and not (Path(model) / PAIR_FILE).is_file():
        return str(model), None
    pair = resolve(model)
    return pair.reasoner, pair.base_url


def read_abilities(folder: str | Path, *, limit: int | None = None) -> dict[str, Ability]:
    """{name: ability} of each folder with a `data.jsonl` in `folder`, in order of their names, or of `folder` itself.

    limit: so many first questions of each. Raises `InputError`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit!r} leaves no question: give 1 or more, or None for all")
    place = Path(folder)
    files = [place / DATA_FILE] if (place / DATA_FILE).is_file() else sorted(place.glob(f"*/{DATA_FILE}"))
    if not files:
        raise InputError(f"{place} holds no abilities: {HINT}")
    return {file.resolve().parent.name: _read_ability(file, limit) for file in files}


def _read_ability(file: Path, limit: int | None) -> Ability:
    questions = tuple(_read_question(row, file.parent, where) for where, row in fields.read_rows(file, HINT))
    known = dict.fromkeys(name for question in questions for name in question.targets)
    return Ability(questions[:limit], Names(tuple(known)))


def _read_question(row: dict[str, Any], folder: Path, where: str) -> Question:
    score = fields.text(row, "score", where)
    if score not in (*BY_ANSWER, *BY_TARGETS):
        raise InputError(f"{where}: there is no score {score!r}: choose one of {', '.join((*BY_ANSWER, *BY_TARGETS))}")
    question = Question(
        fields.text(row, "question", where),
        score,
        image=folder / fields.text(row, "image", where) if row.get("image") is not None else None,
        answer=fields.text(row, "answer", where) if score in BY_ANSWER else "",
        targets=fields.names(row, "targets", where) if score in BY_TARGETS else (),
        where=where,
    )
    judge, truth = BY_ANSWER.get(score), question.answer
    if judge and judge("", truth) == judge(truth, truth):  # it cannot tell right from nothing
        raise InputError(f"{where}: the answer {truth!r} holds nothing that the score {score!r} can read")
    if question.image is not None and not question.image.is_file():
        raise InputError(f"{where}: there is no image {question.image}")
    return question


def _answers(
    reasoner: Reasoner,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """The answers in order. A batch holds questions alike, with a picture or without, whose truths and wordings are
    about as long, for it lasts as long as its longest answer."""
    texts = [""] * len(questions)
    done = 0
    for batch in _batches(questions, batch_size):
        requests = [questions[i].request() for i in batch]
        for i, answer in zip(batch, reasoner.reason(requests, max_new_tokens=max_new_tokens), strict=True):
            texts[i] = answer.text
        done += len(batch)
        if progress:
            progress(done, len(questions))
    return texts


def _batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    def alike(i: int) -> tuple[int, int]:
        question = questions[i]
        return len(question.answer) + sum(map(len, question.targets)), len(question.question)

    groups = ([i for i, q in enumerate(questions) if (q.image is None) is without] for without in (False, True))
    ordered = [sorted(group, key=alike) for group in groups]
    return [group[start : start + size] for group in ordered for start in range(0, len(group), size)]
