"""A guard's card and the picture of its ROC curves: what was measured, and how the threshold was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.protector.measure import Scored, roc

SPLITS = {
    "validation": "the threshold was chosen here",
    "test": "kinds of harm that training knows, in texts that it does not, by the same authors",
    "strangers": "the same by an author of whom training has nothing",
    "categories": "kinds of harm that training does not know, by that author",
}
COLUMNS = {
    "auroc": "AUROC",
    "auroc_questions": "of questions alone",
    "caught": "caught",
    "held_back": "held back",
    "false_positives": "false positives",
    "over_refusal": "over-refusal",
}


def write_roc(file: Path, curves: Mapping[str, Scored], threshold: float) -> None:
    """The ROC curve of each split, with the threshold as a point on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="harmless texts flagged", ylabel="harmful texts flagged", xlim=(-0.005, 0.25), ylim=(0.5, 1.005)
    )
    for name, scored in curves.items():
        _, false, true = roc(scored.harm, scored.harmful)
        (line,) = axes.plot([0, *false], [0, *true], label=name, drawstyle="steps-post")
        flagged = scored.harm >= threshold
        point = flagged[~scored.harmful].mean(), flagged[scored.harmful].mean()
        axes.plot(*point, "o", color=line.get_color())
    axes.set_title(f"points: the threshold {threshold:.2f}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110)


def card(
    metrics: Mapping[str, float], categories: Sequence[str], *, has_detoxifier: bool, has_questions: bool, most: float
) -> str:
    """The text of the card."""
    parts = "a harm detector and a detoxifier" if has_detoxifier else "a harm detector"
    beside = (
        """
Questions are judged by n-grams, a text CNN and a sentence encoder, which have a say in answers, too; the n-grams name
the kind."""
        if has_questions
        else ""
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
---
# A guard for DetGPT

{parts[0].upper()}{parts[1:]} after MLLM-Protector (arXiv:2401.02906). It reads a question, alone or with an answer, and
says how likely it does harm, and which: {", ".join(name.replace("_", " ") for name in categories)}.{beside}

## How good it is

{_table(metrics)}

In percent, with 95% intervals, measured by `stage: guard` on these weights. *caught*: harmful questions and answers
that are flagged. *held back*: of the exchanges with a harmful answer those that are, by the question or the answer.
*false positives*: harmless texts that are flagged. *over-refusal*: harmless questions that sound like harm ("kill the
light") and are flagged, alone or with a harmless answer.

{_explained(metrics)}

## The threshold

![ROC curves](roc.png)

{metrics["threshold"]:.4f}, chosen on the validation split: of all thresholds that flag at most {100 * most:g}% of its
harmless texts, by the upper end of the 95% interval, those that flag most of its harmful ones, and of these the middle.
{_attacks(metrics)}
## What it is not

It knows the language of the set that it was trained on, and no more; it does not look at pictures. It lowers a risk, it
does not remove one: keep people in the loop where harm would be grave.
"""


def _table(metrics: Mapping[str, float]) -> str:
    lines = ["| split | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for split in SPLITS:
        if f"{split}_auroc" in metrics:
            lines.append(f"| {split} | " + " | ".join(_cell(metrics, f"{split}_{key}") for key in COLUMNS) + " |")
    return "\n".join(lines)


def _cell(metrics: Mapping[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    if f"{key}_low" not in metrics:
        return f"{100 * metrics[key]:.1f}"
    return f"{100 * metrics[key]:.1f} ({100 * metrics[f'{key}_low']:.1f} to {100 * metrics[f'{key}_high']:.1f})"


def _explained(metrics: Mapping[str, float]) -> str:
    return "\n".join(f"- *{split}*: {what}" for split, what in SPLITS.items() if f"{split}_auroc" in metrics)


def _attacks(metrics: Mapping[str, float]) -> str:
    kinds = [key.removeprefix("attacks_").removesuffix("_caught") for key in metrics if key.endswith("_caught")]
    kinds = [kind for kind in kinds if f"attacks_{kind}_caught" in metrics]
    if not kinds:
        return ""
    rows = "\n".join(
        f"| {kind} | {100 * metrics[f'attacks_{kind}_caught']:.0f} | {100 * metrics[f'attacks_{kind}_flagged']:.0f} |"
        for kind in kinds
    )
    return f"""
## Attacks

The share of questions that are flagged before anything answers them, in percent.

| put as | harmful | harmless |
| --- | ---: | ---: |
{rows}
"""
