"""An evaluation as one HTML page: the table, the numbers by kind of wish, and the worst cases drawn.

The page holds everything, pictures too, and asks no server for anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from detgpt.evaluation import cells
from detgpt.evaluation.calibration import calibration_bins
from detgpt.evaluation.metrics import match, outside_ignored
from detgpt.evaluation.page import counted, drawn, figure, page, shortened, table
from detgpt.evaluation.samples import Sample, Samples
from detgpt.images import load_image

MEANINGS = {
    "names F1": "the reasoner by itself: names given against true targets, counts pooled over the wishes",
    "exact": "wishes for which exactly the true targets were named",
    "rejected": "of the wishes that nothing fulfils, those answered with nothing",
    "hallucinated": "names given of things that are not in the picture",
    "unread": "answers that could not be read",
    "ECE": "how far the reasoner's confidences are from the share of right names",
    "AP50, AP": "the detector by itself, told the true names (COCO's average precision)",
    "F1@0.5, F1": "boxes as a user gets them, matched one to one; at IoU 0.5, and averaged over 0.50 to 0.95",
    "Acc@0.5": "of the wishes with one true box, those whose best-scored box overlaps it by an IoU over 0.5",
    "gIoU, cIoU": "all that was found against all that is true; the mean over wishes, and of the summed areas",
    "no box": "of the wishes that nothing fulfils, those without a box",
    "cgF1": "F1 where something fits, times how well boxes and no boxes are told apart (SAM 3)",
}


def html(results: Mapping[str, Mapping[str, Any]], runs: Sequence[Samples], worst: int) -> str:
    """The page about {run: what `evaluate` gave}, with the `worst` cases of each run drawn."""
    wishes = sum(result["n"] for result in results.values())
    sections = "".join(_run(samples, results[samples.run], worst) for samples in runs)
    glossary = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in MEANINGS.items())
    return page(
        "DetGPT evaluation",
        f"{counted(len(results), 'run')}, {counted(wishes, 'wish', 'wishes')}; percent",
        f"""<div class="card scroll">{table(cells(results))}</div>
{sections}<details><summary>What the numbers mean</summary><dl>{glossary}</dl></details>
""",
    )


def _run(samples: Samples, result: Mapping[str, Any], worst: int) -> str:
    cases = samples.worst(worst)
    wrong = len(samples.worst(len(samples.samples)))
    heading = f"{len(cases)} worst of {counted(wrong, 'wish', 'wishes')} with a wrong box"
    drawn = f'<h2>{heading}</h2>\n<div class="cases">\n{"".join(map(_case, cases))}</div>\n' if cases else ""
    return f"""<section>
<h2>{escape(samples.run)}</h2>
<div class="tiles">{"".join(_tiles(result))}</div>
<div class="pair">
<div class="card scroll">{_kinds(result)}</div>
{_calibration(samples)}
</div>
{drawn}</section>
"""


def _tiles(result: Mapping[str, Any]) -> Iterator[str]:
    end_to_end = result["end_to_end"]
    tiles = (
        ("right boxes, F1@0.5", end_to_end["f1_50"]),
        ("right names, F1", result["reasoner"]["f1"]),
        ("boxes when told the names, AP50", result["detector"]["ap50"]),
        ("best box right, Acc@0.5", end_to_end["acc_50"]),
        ("no box when nothing fits", end_to_end["rejection"]),
    )
    for label, value in tiles:
        if value is not None:
            yield f'<div class="card tile"><b>{_percent(value)}</b><span class="grey">{escape(label)}</span></div>'


def _kinds(result: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("kind", "wishes", "names F1", "F1@0.5", "box gIoU", "no box"))
    rows = ""
    for kind, numbers in result["end_to_end"]["by_kind"].items():
        values = (
            result["reasoner"]["by_kind"][kind]["f1"],
            numbers["f1_50"],
            numbers["box_giou"],
            numbers["rejection"],
        )
        bars = "".join(f"<td>{_bar(value)}</td>" for value in values)
        rows += f"<tr><th>{escape(kind) or 'all'}</th><td>{numbers['n']}</td>{bars}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _bar(value: float | None) -> str:
    if value is None:
        return '<span class="grey">–</span>'
    return f'<div class="bar"><i style="--share: {100 * value:.1f}%"></i><span>{_percent(value)}</span></div>'


def _calibration(samples: Samples) -> str:
    """How often boxes of a score are right, as bars over the diagonal; nothing where there is no box."""
    kept = [(outside_ignored(sample.result, sample.record), sample.record) for sample in samples.samples]
    scores = [score for result, _ in kept for score in result.scores.tolist()]
    right = [iou >= 0.5 for result, record in kept for iou in match(result, record).tolist()]
    if not scores:
        return ""
    counts, _, hits = calibration_bins(scores, right)
    side, left, top = 200, 30, 8
    bars = ""
    for number, (count, hit) in enumerate(zip(counts.tolist(), hits.tolist(), strict=True)):
        height = side * hit / count if count else 0
        box = f'x="{left + number * side / 10 + 2:.0f}" y="{top + side - height:.1f}" width="16" height="{height:.1f}"'
        bars += f'<rect class="bin" {box}><title>{count} boxes, {hit:.0f} right</title></rect>'
    bottom = top + side
    return f"""<div class="card"><h3>How often a score is right</h3>
<svg viewBox="0 0 240 240" role="img" aria-label="Share of right boxes by score">
<rect class="frame" x="{left}" y="{top}" width="{side}" height="{side}"/>{bars}
<line class="ideal" x1="{left}" y1="{bottom}" x2="{left + side}" y2="{top}"/>
<text x="{left - 6}" y="{top + 8}" text-anchor="end">100</text>
<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>
<text x="{left}" y="{bottom + 14}">0</text>
<text x="{left + side}" y="{bottom + 14}" text-anchor="end">1</text>
<text x="{left + side / 2}" y="{bottom + 14}" text-anchor="middle">score</text>
</svg></div>"""


def _case(sample: Sample) -> str:
    record, result = sample.record, sample.result
    found, true = _views(sample)
    kind = f'<span class="pill">{escape(record.kind)}</span>' if record.kind else ""
    told = {
        "named": ", ".join(target.name for target in result.targets) or "nothing",
        "true": ", ".join(record.targets) or "nothing fits",
        "said": shortened(result.reasoning),
        "from": record.where,
    }
    facts = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in told.items() if text)
    problem = f'<p class="wrong">{escape(result.problem)}</p>' if result.problem else ""
    return f"""<article class="card case">
<div class="views">{figure(found, "found")}{figure(true, "true")}</div>
<div class="told"><h3>“{escape(record.instruction)}”</h3>
<p>{kind}<span class="grey">F1@0.5 {_percent(sample.f1_50)}, box IoU {_percent(sample.box_iou)}</span></p>
{problem}<dl>{facts}</dl></div>
</article>
"""


def _views(sample: Sample) -> tuple[Image.Image, Image.Image]:
    """The picture with the boxes that were found, and with the true ones; a name has one colour in both."""
    record, result = sample.record, sample.result
    image = load_image(record.image)
    names = [*record.targets, *(target.name for target in result.targets)]
    found = drawn(image, result.boxes, result.labels, names, result.scores)
    return found, drawn(image, record.boxes, record.labels, names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
