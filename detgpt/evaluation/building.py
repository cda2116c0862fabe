"""Build an instruction set from any COCO-format annotation, with a reasoner as its writer.

    build(reasoner, Path("instances_val2017.json"), Path("val2017"), Path("bench"), Plan(limit=200))

For each picture the writer makes wishes from what is annotated there (see `writing`). A wish stays if all that it
names has a box in that picture, it does not say what it asks for, it is not there already, and the writer, asked
about it again without its own answer, names exactly the same things. Then each picture gets wishes of other pictures
that nothing in it fulfils, again by the writer's word with the picture before it; so how a wish is put does
not tell whether something fits.

For training, the answer to the second question can be kept: asked in the three steps of an answer, it is the text to
learn, by a writer who did not know which things were meant (`Plan.explain`).

What comes out is the folder format of `detgpt eval`. All choices come from the seed and the file's order. The
answers are kept in `progress.jsonl` until all is done, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from PIL import Image

from detgpt.errors import ImageError, InputError, ModelError
from detgpt.evaluation.coco import Annotations, Picture, find_image, read_annotations
from detgpt.evaluation.readers.folder import DATA_FILE, to_row
from detgpt.evaluation.writing import (
    Names,
    Wish,
    checking_prompt,
    read_check,
    read_reasoning,
    read_wishes,
    same_wording,
    writing_prompt,
)
from detgpt.images import load_image
from detgpt.reasoners import Reasoner, Request

T = TypeVar("T")

PROGRESS_FILE, ABOUT_FILE = "progress.jsonl", "about.json"
FITS, ABSENT = "need", "absent"  # the kinds of wishes
TRIES = 3  # borrowed wishes that are asked about, for each one wanted
MOST_DRAWN = 200  # wishes looked through for these


@dataclass(frozen=True)
class Plan:
    """What to build.

    limit: so many pictures, drawn by the seed; None for all that have a box.
    wishes: wishes to ask for, a picture. absent: wishes that nothing fulfils, a picture, as far as they are found.
    seed: of the drawing. check: ask about every wish a second time.
    explain: keep what the writer says then as the record's `reasoning`; a wish without is left out.
    distinct: of pictures whose files are the same keep the first.
    max_new_tokens: the longest answer of the writer.
    """

    limit: int | None = None
    wishes: int = 3
    absent: int = 1
    seed: int = 0
    check: bool = True
    explain: bool = False
    distinct: bool = False
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or self.wishes < 1 or self.absent < 0:
            raise InputError(f"{self}: limit and wishes must be 1 or more, absent 0 or more")
        if (self.absent or self.explain) and not self.check:
            raise InputError(
                "wishes that nothing fulfils, and explanations, need the check: leave it on, or set absent to 0"
            )


def build(
    writer: Reasoner,
    annotation_file: Path,
    images: Path,
    output: Path,
    plan: Plan,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the set into the folder `output` and return what `about.json` there says: the plan and the counts.

    captions: sentences about a picture, by its id as text, that the writer is told.
    batch_size: pictures, and questions, that go to the writer together.
    progress: called with (done, total) pictures, each counted once for its own wishes and once for those of others.
    Raises `InputError` for wrong data or a finished `output`, `ModelError` if the writer gives no usable wish.
    """
    annotations = read_annotations(annotation_file)
    drawn = drawn_pictures(annotations, plan)
    pictures = _distinct(drawn, images) if plan.distinct else drawn
    about = {"annotations": annotation_file.name, "writer": writer.name, **asdict(plan)}
    about["captions"] = sum(str(picture.id) in (captions or {}) for picture in pictures)
    if (output / DATA_FILE).exists():
        raise InputError(f"{output} holds a finished set already: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    log = output / PROGRESS_FILE
    earlier = _begin_or_resume(log, about)
    own = [row for row in earlier if "wishes" in row]
    borrowed = [row for row in earlier if "absent" in row]
    asking = _Asking(writer, annotations.synonyms, captions or {}, images, plan, batch_size)
    total = len(pictures) * (2 if plan.absent else 1)
    with log.open("a", encoding="utf-8") as lines:
        for row in asking.write(pictures[len(own) :]):
            _write(lines, row)
            own.append(row)
            progress(len(own), total)
        wishes = [[_wish(fields) for fields in row["wishes"]] for row in own]
        if not any(wishes):
            raise ModelError(_no_wish(writer, own, log))
        for row in asking.borrow(pictures, wishes, start=len(borrowed)) if plan.absent else ():
            _write(lines, row)
            borrowed.append(row)
            progress(len(own) + len(borrowed), total)
    for row, of_picture in zip(borrowed, wishes, strict=bool(plan.absent)):
        of_picture += [_wish(fields) for fields in row["absent"]]
    refused = _refused(own) + Counter({"the same picture again": len(drawn) - len(pictures)})
    about["counts"] = _save(pictures, wishes, images, output) | {"refused": dict(refused.most_common())}
    (output / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (output / f".{DATA_FILE}").replace(output / DATA_FILE)
    log.unlink()
    return about


@dataclass(frozen=True)
class _Asking:
    """The writer, and all that it is asked."""

    writer: Reasoner
    synonyms: Mapping[str, tuple[str, ...]]
    captions: Mapping[str, Sequence[str]]
    images: Path
    plan: Plan
    batch_size: int

    def write(self, pictures: Sequence[Picture]) -> Iterator[dict[str, Any]]:
        """For each picture in order its usable wishes, and why others are not."""
        for batch in _batches(pictures, self.batch_size):
            looks = [self._look(picture) for picture in batch]
            prompts = [
                writing_prompt(picture.boxed, self.plan.wishes, self.captions.get(str(picture.id), ()))
                for picture in batch
            ]
            answers = self._ask(zip(looks, prompts, strict=True))
            for picture, look, answer in zip(batch, looks, answers, strict=True):
                names = Names(picture.boxed, self.synonyms)
                wishes, refused = read_wishes(answer or "", names)
                if look is None:
                    refused["the picture cannot be read"] = 1
                if self.plan.check:
                    checked = self._checked([(picture, look, names, wish) for wish in wishes])
                    for reason in (wish for wish in checked if isinstance(wish, str)):
                        refused[reason] = refused.get(reason, 0) + 1
                    wishes = [wish for wish in checked if isinstance(wish, Wish)]
                rows = [asdict(wish) for wish in wishes]
                yield {"image_id": picture.id, "wishes": rows, "refused": refused, "answer": answer}

    def borrow(
        self, pictures: Sequence[Picture], wishes: Sequence[Sequence[Wish]], start: int
    ) -> Iterator[dict[str, Any]]:
        """For each picture from `start` on wishes of others that nothing in it fulfils."""
        everyone = [wish for of_picture in wishes for wish in of_picture]
        positions = range(start, len(pictures))
        for batch in _batches(positions, self.batch_size):
            looks = {i: self._look(pictures[i]) for i in batch}
            candidates = {i: self._candidates(pictures[i], wishes[i], everyone) for i in batch}
            absent: dict[int, list[Wish]] = {i: [] for i in batch}
            for turn in range(TRIES * self.plan.absent):
                lacking = [i for i in batch if len(absent[i]) < self.plan.absent and turn < len(candidates[i])]
                asked = [
                    (
                        pictures[i],
                        looks[i],
                        Names(pictures[i].present, self.synonyms),
                        Wish(candidates[i][turn].text, ()),
                    )
                    for i in lacking
                ]
                for i, wish in zip(lacking, self._checked(asked), strict=True):
                    if isinstance(wish, Wish):
                        absent[i].append(wish)
            yield from ({"image_id": pictures[i].id, "absent": [asdict(wish) for wish in absent[i]]} for i in batch)

    def _candidates(self, picture: Picture, own: Sequence[Wish], everyone: Sequence[Wish]) -> list[Wish]:
        """Wishes of other pictures whose targets are not here, drawn by the seed, each wording once."""
        names = Names(picture.present, self.synonyms)
        drawn: list[Wish] = []
        random_order = random.Random(f"{self.plan.seed} {picture.id}")
        for wish in random_order.sample(everyone, min(len(everyone), MOST_DRAWN)):
            known = any(same_wording(wish.text, other.text) for other in (*own, *drawn))
            if not known and not any(names.find(target) for target in wish.targets):
                drawn.append(wish)
        return drawn[: TRIES * self.plan.absent]

    def _checked(self, asked: Sequence[tuple[Picture, Image.Image | None, Names, Wish]]) -> list[Wish | str]:
        """The wishes as the writer answers them when asked about each once more, or why one is none."""
        prompts = [
            (look, checking_prompt(names.things, wish.text, self.captions.get(str(picture.id), ()), self.plan.explain))
            for picture, look, names, wish in asked
        ]
        checked: list[Wish | str] = []
        for (_, _, names, wish), answer in zip(asked, self._ask(prompts), strict=True):
            if answer is None or read_check(answer, names) != frozenset(wish.targets):
                checked.append("answered otherwise when asked again")
            elif not self.plan.explain:
                checked.append(wish)
            elif reasoning := read_reasoning(answer):
                checked.append(replace(wish, reasoning=reasoning))
            else:
                checked.append("answered without an explanation")
        return checked

    def _ask(self, asked: Iterable[tuple[Image.Image | None, str]]) -> list[str | None]:
        """One answer for each (picture, prompt), None where there is no picture."""
        pairs = list(asked)
        requests = [Request(look, prompt, verbatim=True) for look, prompt in pairs if look is not None]
        answers = (
            raw.text
            for batch in _batches(requests, self.batch_size)
            for raw in self.writer.reason(batch, max_new_tokens=self.plan.max_new_tokens)
        )
        return [None if look is None else next(answers) for look, _ in pairs]

    def _look(self, picture: Picture) -> Image.Image | None:
        try:
            return load_image(find_image(self.images, picture.file_name))
        except ImageError:
            return None  # it is counted: one broken file must not end a night's work


def drawn_pictures(annotations: Annotations, plan: Plan) -> list[Picture]:
    """The pictures to write about, in the file's order."""
    usable = [picture for picture in annotations.pictures if picture.boxed]
    if not usable:
        raise InputError(f"{annotations.file} has no picture with a box")
    if plan.limit is None or plan.limit >= len(usable):
        return usable
    return [usable[i] for i in sorted(random.Random(plan.seed).sample(range(len(usable)), plan.limit))]


def _distinct(pictures: Sequence[Picture], images: Path) -> list[Picture]:
    """Of the pictures whose files are the same the first; one that cannot be read is for the asking to count."""
    first: dict[object, Picture] = {}
    for picture in pictures:
        file = find_image(images, picture.file_name)
        first.setdefault(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else picture.id, picture)
    return list(first.values())


def _save(pictures: Sequence[Picture], wishes: Sequence[Sequence[Wish]], images: Path, output: Path) -> dict[str, Any]:
    """Copy the pictures that have a wish, write their records to a temporary file, and count."""
    (output / "images").mkdir(exist_ok=True)
    kinds: Counter[str] = Counter()
    with (output / f".{DATA_FILE}").open("w", encoding="utf-8") as lines:
        for picture, of_picture in zip(pictures, wishes, strict=True):
            source = find_image(images, picture.file_name)
            image = f"images/{Path(str(picture.id)).name}{source.suffix.lower()}"
            if of_picture:
                shutil.copyfile(source, output / image)
            for wish in of_picture:
                kind = FITS if wish.targets else ABSENT
                record = picture.record(images, wish.text, wish.targets, f"picture {picture.id}", kind=kind)
                row = to_row(replace(record, synonyms=wish.synonyms), image)
                _write(lines, row | ({"reasoning": wish.reasoning} if wish.reasoning else {}))
                kinds[kind] += 1
    return {
        "pictures": sum(map(bool, wishes)),
        "wishes": dict(kinds),
        "wordings": len({wish.text.casefold() for of_picture in wishes for wish in of_picture}),
    }


def _refused(own: Sequence[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(row["refused"]) for row in own), Counter[str]())


def _no_wish(writer: Reasoner, own: Sequence[dict[str, Any]], log: Path) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in _refused(own).most_common())
    return (
        f"{writer.name!r} wrote no usable wish about {len(own)} pictures ({why or 'none in the form asked for'}). "
        f"Its first answer: {str(own[0]['answer'])[:200]!r}. Take a model that follows instructions; {log} has all "
        "answers: remove it to begin anew."
    )


def read_log(log: Path) -> list[dict[str, Any]]:
    """What an interrupted run was told, then its answers; [] where there is none. A line cut short is left out."""
    content = log.read_bytes() if log.exists() else b""
    try:
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise InputError(f"{log} is damaged ({error}): remove it to begin anew") from error


def _begin_or_resume(log: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of an interrupted run; its first line must be `about`, and a line cut short is removed."""
    header, *answers = read_log(log) or [about]
    if header != about:
        raise InputError(f"{log} is of another run ({header}): go on with its settings, or choose another folder")
    whole = log.with_suffix(".partial")
    with whole.open("w", encoding="utf-8") as lines:
        for row in (header, *answers):
            _write(lines, row)
    whole.replace(log)
    return answers


def _wish(row: dict[str, Any]) -> Wish:
    synonyms = {target: tuple(others) for target, others in row["synonyms"].items()}
    return Wish(row["text"], tuple(row["targets"]), synonyms, row["reasoning"])


def _write(lines: IO[str], row: dict[str, Any]) -> None:
    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    lines.flush()


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
