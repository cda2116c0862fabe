"""Samples of training data as one HTML page: each picture with its boxes, what is asked, and what the answer is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from html import escape

from detgpt.evaluation.data import box_array
from detgpt.evaluation.page import counted, drawn, figure, page, shortened, table
from detgpt.images import load_image
from finetune.data.check import PROBLEMS, Report
from finetune.data.records import Row

MOST_PLACES = 200  # of one problem that the page lists


def html(report: Report, samples: int, seed: int = 0) -> str:
    """The page about what `check` found, with so many `samples`, drawn by `seed`, in the data's order."""
    chosen = sorted(random.Random(seed).sample(range(len(report.records)), min(samples, len(report.records))))
    cases = "".join(_case(report.records[i]) for i in chosen)
    found = "".join(_places(problem, places) for problem, places in report.problems.items() if places)
    records = sum(part.records for part in report.parts)
    return page(
        "Training data",
        f"{counted(records, 'record')}, {counted(report.errors, 'error')}",
        f"""<div class="card scroll">{table(parts(report))}</div>
<h2>Problems</h2>
{found or "<p>No problem was found.</p>"}
<h2>{len(chosen)} of {counted(len(report.records), "record")} with boxes</h2>
<div class="cases">
{cases}</div>
<details><summary>Boxes by name</summary><div class="card scroll">{table(classes(report))}</div></details>
""",
    )


def parts(report: Report) -> list[list[str]]:
    """What each part holds, as rows of a table."""
    kinds = [kind for kind in ("wish", "conversation", "preference", "text", "boxes") if _any(report, kind)]
    rows = [["part", "records", *kinds, "nothing fits", "pictures", "median size", "boxes", "small", "medium", "large"]]
    for part in report.parts:
        sizes = sorted(part.pictures.values(), key=lambda size: size[0] * size[1])
        median = "{} x {}".format(*sizes[len(sizes) // 2]) if sizes else "–"
        counts = [part.records, *(part.kinds[kind] for kind in kinds), part.nothing_fits, len(part.pictures)]
        of_boxes = [part.box_sizes.total(), *(part.box_sizes[size] for size in ("small", "medium", "large"))]
        rows.append([part.name, *map(str, counts), median, *map(str, of_boxes)])
    return rows


def problems(report: Report) -> list[list[str]]:
    """What was found, errors first, as rows of a table."""
    rows = [["problem", "severity", "count", "the first"]]
    for problem, places in report.problems.items():
        if places:
            rows.append([problem, "error" if PROBLEMS[problem] else "warning", str(len(places)), places[0]])
    return rows


def classes(report: Report, most: int | None = None) -> list[list[str]]:
    """How many boxes each name has in each part, the most frequent first, as rows of a table."""
    total = sum((part.labels for part in report.parts), start=type(report.parts[0].labels)())
    rows = [["name", *(part.name for part in report.parts)]]
    rows += [[name, *(str(part.labels[name]) for part in report.parts)] for name, _ in total.most_common(most)]
    return rows


def _places(problem: str, places: list[str]) -> str:
    severity = '<span class="wrong">error</span>' if PROBLEMS[problem] else "warning"
    listed = "".join(f"<li>{escape(place)}</li>" for place in places[:MOST_PLACES])
    more = f"<li>and {len(places) - MOST_PLACES} more</li>" if len(places) > MOST_PLACES else ""
    summary = f"{counted(len(places), 'case')} of {escape(problem)} ({severity})"
    return f'<details class="card"><summary>{summary}</summary><ol>{listed}{more}</ol></details>\n'


def _any(report: Report, kind: str) -> bool:
    return any(part.kinds[kind] for part in report.parts)


def _case(record: Row) -> str:
    picture = drawn(load_image(record["image"]), box_array(record["boxes"]), record["labels"], _names(record))
    said = record["instruction"] or next((turn["content"] for turn in record["messages"]), "")
    told = {
        "answer": record["answer"] or next((turn["content"] for turn in record["messages"][1:]), ""),
        "present": ", ".join(record["present"] or ()),
        "from": record["where"],
    }
    facts = "".join(f"<dt>{term}</dt><dd>{escape(shortened(text))}</dd>" for term, text in told.items() if text)
    heading = f"<h3>“{escape(shortened(said))}”</h3>" if said else ""
    kind = f'<p><span class="pill">{escape(record["kind"])}</span></p>' if record["kind"] else ""
    caption = "nothing fits" if record["targets"] == [] else counted(len(record["boxes"]), "box", "boxes")
    return f"""<article class="card case">
<div class="view">{figure(picture, caption)}</div>
<div class="told">{heading}{kind}<dl>{facts}</dl></div>
</article>
"""


def _names(record: Row) -> Sequence[str]:
    return list(dict.fromkeys([*(record["targets"] or ()), *record["labels"]]))
