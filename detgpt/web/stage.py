"""The picture with its boxes as HTML, so that labels stay sharp at any size and a target can be pointed at.

`stage.css` and `stage.js` go with it: pointing at a box or at a target lets the others fade, a click keeps it so.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from detgpt.draw import ink_on, target_colours
from detgpt.results import Detections

CSS = Path(__file__).with_name("stage.css").read_text(encoding="utf-8")
JS = Path(__file__).with_name("stage.js").read_text(encoding="utf-8")

CROWD = 30  # boxes; past that a label shows only while its target is pointed at


def stage(image_url: str, image_wh: tuple[int, int], title: str, result: Detections | None = None) -> str:
    """The picture at `image_url`, the boxes of `result` over it and its targets below it."""
    width, height = image_wh
    boxes, targets = ("", "") if result is None else (_boxes(result), _targets(result))
    crowded = " crowded" if result is not None and len(result) > CROWD else ""
    return (
        f'<figure class="stage{crowded}" style="--ratio:{width / height:.4f}">'
        f'<div class="picture"><img src="{escape(image_url)}" alt="{escape(_described(title, result))}" '
        f'width="{width}" height="{height}">{boxes}</div>{targets}</figure>'
    )


def _described(title: str, result: Detections | None) -> str:
    """What a visitor who does not see the picture is told of it."""
    if result is None:
        return title
    counts = [f"{result.labels.count(target.name)} {target.name}" for target in result.targets if target.found]
    return f"{title}, boxes: {', '.join(counts) or 'none'}"


def _boxes(result: Detections) -> str:
    width, height = result.image_wh
    names = [target.name for target in result.targets]
    colours = target_colours(len(names))
    parts = []
    by_area = sorted(result, key=lambda found: -float((found[0][2] - found[0][0]) * (found[0][3] - found[0][1])))
    for (x0, y0, x1, y1), score, label in by_area:  # small boxes on top
        number = names.index(label)
        place = (
            f"left:{100 * x0 / width:.3f}%;top:{100 * y0 / height:.3f}%;"
            f"width:{100 * (x1 - x0) / width:.3f}%;height:{100 * (y1 - y0) / height:.3f}%"
        )
        sides = (" low" if y0 / height < 0.07 else "") + (" left" if x0 / width > 0.75 else "")
        parts.append(
            f'<div class="box{sides}" data-target="{number}" style="{_colour(colours[number])};{place}">'
            f'<span class="tag">{escape(label)} <b>{score:.2f}</b></span></div>'
        )
    return "".join(parts)


def _targets(result: Detections) -> str:
    colours = target_colours(len(result.targets))
    chips = []
    for number, target in enumerate(result.targets):
        scores = [score for _, score, label in result if label == target.name]
        tally = f"{max(scores):.2f}" if scores else "not found"
        if len(scores) > 1:
            tally = f"{len(scores)} × up to {tally}"
        chips.append(
            f'<li><button type="button" class="chip" data-target="{number}" aria-pressed="false" '
            f'style="{_colour(colours[number])}"{"" if scores else " disabled"}>'
            f"<i></i>{escape(target.name)} <span>{tally}</span></button></li>"
        )
    return f'<ul class="targets" aria-label="Targets">{"".join(chips)}</ul>' if chips else ""


def _colour(colour: str) -> str:
    return f"--colour:{colour};--ink:{ink_on(colour)}"
