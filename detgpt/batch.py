"""Many images in one run: results line by line, and after an interruption on from there.

    run(model, read_jobs("photos/", "I am thirsty"), Path("found.jsonl"))

Threads read the pictures ahead, so the models do not wait for decoders. A picture that cannot be read is an
entry with its error, and the rest goes on.
"""

from __future__ import annotations

import glob
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from detgpt.answer import ParsedAnswer
from detgpt.errors import ImageError, InputError, MissingExtraError
from detgpt.images import PICTURE_SUFFIXES, load_image
from detgpt.pipeline import DetGPT
from detgpt.results import Detections, coco_document

READERS = 4  # threads
AHEAD = 2  # batches that are being read while one is in the models

Progress = Callable[[int, int], None]  # told how many are done, and of how many


@dataclass(frozen=True)
class Job:
    """What to look for in one image.

    image: path or URL. wish: an instruction, or names to look for without reasoning.
    """

    image: str
    wish: str | tuple[str, ...]

    @classmethod
    def of(cls, record: Any, wish: str | Sequence[str] | None = None, folder: Path | None = None) -> Job:
        """From a line of a list or of results; `wish` is for one without its own. Raises `InputError`."""
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise InputError('it is no object with an "image"')
        wish = record.get("names") or record.get("instruction") or wish
        if not wish:
            raise InputError('it has no "instruction" and no "names", and none was given for all')
        image = record["image"] if "://" in record["image"] or not folder else str(folder / record["image"])
        return cls(image, wish if isinstance(wish, str) else ParsedAnswer.of_names(wish).names)

    def record(self, **found: Any) -> dict[str, Any]:
        """A line of results about this job."""
        asked = {"instruction": self.wish} if isinstance(self.wish, str) else {"names": list(self.wish)}
        return {"image": self.image, **found, **asked}


@dataclass(frozen=True)
class Outcome:
    """How many images were answered, could not be read, and were in the output from an earlier run."""

    answered: int
    unreadable: int
    earlier: int


def read_jobs(source: str, wish: str | Sequence[str] | None = None) -> list[Job]:
    """The jobs of a folder (and those within), a pattern such as `photos/*.jpg`, or a list in JSON lines.

    A line of a list is an object with "image" (a URL, or a path from the list's own folder) and may have an
    "instruction" or "names" of its own. Raises `InputError` where there is no image or a line is wrong.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        jobs = list(_read_list(path, wish))
    else:
        files = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))  # noqa: PTH207  (may be absolute)
        pictures = sorted(str(file) for file in files if file.suffix.lower() in PICTURE_SUFFIXES)
        if pictures and not wish:
            raise InputError("nothing to look for: give an instruction or names")
        jobs = [Job.of({"image": picture}, wish) for picture in pictures]
    if not jobs:
        raise InputError(f"{source!r} holds no images: give a folder, a quoted pattern, or a list that ends in .jsonl")
    return list(dict.fromkeys(jobs))


def _read_list(path: Path, wish: str | Sequence[str] | None) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list {str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield Job.of(json.loads(line), wish, path.parent)
            except (json.JSONDecodeError, InputError) as error:
                raise InputError(f"line {number} of {str(path)!r} is no job: {error}") from error


def run(
    model: DetGPT,
    jobs: Sequence[Job],
    output: Path,
    *,
    batch_size: int = 8,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Outcome:
    """Answer `jobs` into `output`: `.jsonl`, `.json` (COCO) or `.parquet`; what is in it already is not repeated.

    A JSON line is `Detections.to_dict` with the "image", or has the "error" of one that could not be read. The
    other two forms are written when all is done; until then the lines wait in `OUTPUT.progress.jsonl` beside it.
    Raises `InputError` for another suffix, `MissingExtraError` for Parquet without its packages.
    """

    def answers(todo: Sequence[Job]) -> Iterator[list[dict[str, Any]]]:
        for batch in _read_ahead(todo, batch_size):
            yield answer(model, batch, **options)

    return write(jobs, output, answers, progress)


def write(
    jobs: Sequence[Job],
    output: Path,
    answers: Callable[[Sequence[Job]], Iterator[list[dict[str, Any]]]],
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """`run`, with what makes records of the jobs that are left; they may come in any order, a batch at a time."""
    convert = _converter(output)
    log = output.with_name(f"{output.name}.progress.jsonl") if convert else output
    log.parent.mkdir(parents=True, exist_ok=True)
    earlier = {Job.of(record) for record in _read_log(log)}
    todo = [job for job in jobs if job not in earlier]
    answered = unreadable = 0
    progress(len(jobs) - len(todo), len(jobs))
    with log.open("a", encoding="utf-8", errors="backslashreplace") as lines:
        for records in answers(todo) if todo else ():
            lines.writelines(map(_line, records))
            lines.flush()
            broken = sum("error" in record for record in records)
            answered += len(records) - broken
            unreadable += broken
            progress(len(jobs) - len(todo) + answered + unreadable, len(jobs))
    records = _read_log(log)
    place = {job: number for number, job in enumerate(jobs)}
    ordered = sorted(records, key=lambda record: place.get(Job.of(record), -1))  # those of other jobs stay in front
    if convert:
        convert(ordered, output)
        log.unlink()
    elif ordered != records:
        _write_lines(ordered, output)
    return Outcome(answered, unreadable, len(jobs) - len(todo))


def read(job: Job) -> tuple[Job, Image.Image | ImageError]:
    """A job with its picture, or with what is wrong with it."""
    try:
        return job, load_image(job.image)
    except ImageError as error:
        return job, error


def answer(
    model: DetGPT, batch: Sequence[tuple[Job, Image.Image | ImageError]], **options: Any
) -> list[dict[str, Any]]:
    """The records of a batch, which goes through the models together but for what could not be read."""
    pictures = [(picture, job.wish) for job, picture in batch if not isinstance(picture, ImageError)]
    results = iter(model.detect_batch(pictures, **options))
    return [
        job.record(**({"error": str(picture)} if isinstance(picture, ImageError) else next(results).to_dict()))
        for job, picture in batch
    ]


def _read_ahead(jobs: Sequence[Job], batch_size: int) -> Iterator[list[tuple[Job, Image.Image | ImageError]]]:
    """The jobs in batches, each with its picture or what is wrong with it.

    One batch at a time is in the models: two at once, one reasoning and one detecting, take each other's cores.
    """
    with ThreadPoolExecutor(READERS, "detgpt-read") as pool:
        reading: deque[Future[tuple[Job, Image.Image | ImageError]]] = deque()
        upcoming = iter(jobs)
        try:
            while True:
                wanted = batch_size * (AHEAD + 1) - len(reading)
                reading += [pool.submit(read, job) for job in itertools.islice(upcoming, wanted)]
                if not reading:
                    return
                yield [reading.popleft().result() for _ in range(min(batch_size, len(reading)))]
        finally:
            pool.shutdown(cancel_futures=True)


def _read_log(log: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run; a last one that was cut off is removed from the file."""
    if not log.exists():
        return []
    content = log.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        for record in records:
            Job.of(record)
    except (ValueError, InputError) as error:
        raise InputError(
            f"{str(log)!r} is there, but not from an earlier run ({error}): choose another file"
        ) from error
    if len(whole) < len(content):
        with log.open("r+b") as file:
            file.truncate(len(whole))
    return records


def _converter(output: Path) -> Callable[[list[dict[str, Any]], Path], None] | None:
    """What turns the lines into the form that the suffix of `output` asks for; None for the lines themselves."""
    if output.suffix == ".jsonl":
        return None
    if output.suffix == ".json":
        return _write_coco
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pyarrow", "parquet") from error
        return _write_parquet
    raise InputError(f"{str(output)!r} has no known form: end it in .jsonl, .json (COCO) or .parquet")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _write_lines(records: list[dict[str, Any]], output: Path) -> None:
    _write_text("".join(map(_line, records)), output)


def _write_text(text: str, output: Path) -> None:
    """A file name that is no UTF-8 comes as lone surrogates; their backslash form is also JSON's own escape."""
    temporary = output.with_name(f".{output.name}")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(output)


def _write_coco(records: list[dict[str, Any]], output: Path) -> None:
    # A generator: with masks, all results at once would fill the memory.
    found = ((record["image"], Detections.from_dict({"instruction": None, **record})) for record in _answered(records))
    _write_text(json.dumps(coco_document(found), ensure_ascii=False), output)


def _write_parquet(records: list[dict[str, Any]], output: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    keys = (
        "image",
        "instruction",
        "names",
        "reasoning",
        "targets",
        "unsure",
        "detections",
        "image_wh",
        "problem",
        "answer",
        "error",
    )
    temporary = output.with_name(f".{output.name}")
    rows = [{key: record.get(key) for key in keys} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.replace(output)


def _answered(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (record for record in records if "error" not in record)
