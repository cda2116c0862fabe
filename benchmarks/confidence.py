"""Where in an answer a reasoner's probabilities tell right targets from wrong ones.

    python -m benchmarks.confidence finetune/picto/splits/seen finetune/picto/splits/paraphrases

A name's probability in the list alone, at all of its mentions, at its first and at its last one in the reasoning, and
what `detgpt.answer.name_confidence` makes of them. Printed: how often a right target is surer than a wrong one, and the
share of wrong ones among all and among the surest 80%.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from detgpt import DetGPT, terminal
from detgpt.answer import parse_answer
from detgpt.confidence import name_confidence
from detgpt.evaluation.calibration import risk_at
from detgpt.evaluation.judging import is_right
from detgpt.evaluation.readers import read_dataset
from detgpt.evaluation.tables import markdown, percent
from detgpt.images import load_image
from detgpt.reasoners import RawAnswer, Request

BATCH = 8


def probability(raw: RawAnswer, places: list[tuple[int, int]]) -> float:
    tokens = raw.tokens or ()
    return math.exp(sum(t.logprob for t in tokens if any(t.start < end and start < t.end for start, end in places)))


def readings(raw: RawAnswer, span: tuple[int, int]) -> dict[str, float]:
    name, above = re.escape(raw.text[slice(*span)]), raw.text[: max(raw.text.rfind("\n", 0, span[0]), 0)]
    bare = [found.span() for found in re.finditer(rf"(?<!\w){name}(?!\w)", above, re.IGNORECASE)]
    return {
        "in the list": probability(raw, [span]),
        "first mention": probability(raw, bare[:1]),
        "all mentions": probability(raw, [*bare, span]),
        "last mention": probability(raw, bare[-1:]),
        "last mention with its article, and the list (ours)": name_confidence(raw, span) or 0.0,
    }


def main(
    data: Annotated[list[Path], typer.Argument(help="Data as for `detgpt eval`.")],
    model: Annotated[str, typer.Option("--model", "-m")] = "picto",
    limit: Annotated[int | None, typer.Option(help="Wishes of each.")] = None,
) -> None:
    pair = DetGPT.from_pretrained(model)
    said: dict[str, list[float]] = {}
    right: list[bool] = []
    records = [record for path in data for record in read_dataset(path, limit=limit).records[:limit]]
    with terminal.progress("wishes") as progress:
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            requests = [Request(load_image(record.image), record.instruction) for record in batch]
            raws = pair.reasoner.reason(requests, max_new_tokens=pair.options.max_new_tokens)
            for record, raw in zip(batch, raws, strict=True):
                answer = parse_answer(raw.text)
                for name, span in zip(answer.names, answer.spans, strict=True):
                    right.append(is_right(name, record))
                    for reading, value in readings(raw, span).items():
                        said.setdefault(reading, []).append(value)
            progress(start + len(batch), len(records))
    truth = np.array(right)
    rows = [["probability of the name", "mean", "right surer than wrong", "wrong", "wrong of surest 80%"]]
    for reading, values in said.items():
        sure, doubted = np.array(values)[truth][:, None], np.array(values)[~truth][None]
        surer = float(((sure > doubted) + 0.5 * (sure == doubted)).mean())
        shares = (float(np.mean(values)), surer, 1 - float(truth.mean()), risk_at(values, truth, coverage=0.8))
        rows.append([reading, *map(percent, shares)])
    typer.echo(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
