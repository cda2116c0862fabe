"""What `detgpt eval --safety` does: load the systems, attack them all, and measure what the guard costs on wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.evaluation import evaluate, read_dataset
from detgpt.evaluation.attacks import read_attacks
from detgpt.evaluation.safety import GUARDED, PLAIN, REFUSING, SafetyResults, evaluate_safety, guarded_systems
from detgpt.guards.guarded import GuardedReasoner
from detgpt.guards.protector import Protector
from detgpt.guards.reading import choose_reader
from detgpt.models import load_guard, resolve
from detgpt.pipeline import DetGPT
from detgpt.reasoners import Reasoner
from detgpt.results import Detections


def measure(
    places: Sequence[Path],
    models: Sequence[str],
    limit: int | None,
    loading: Mapping[str, Any],
    debug: bool,
    *,
    guard_model: str | None,
    picture_text: str | None,
    judge: str | None,
    utility: Path | None,
) -> SafetyResults:
    """Attack the pair `models` with all that lies at `places`; see the options of the command for the rest.

    loading: device and dtype. Raises `InputError` for several models, and for data that is wrong before one is loaded.
    """
    if len(models) != 1:
        raise InputError("--safety compares one model without its guard and with it: give --model once")
    attacks = [attack for place in places for attack in read_attacks(place, limit=limit)]
    wishes = None if utility is None else read_dataset(utility, limit=limit)
    pair = resolve(models[0])
    parts = [pair.reasoner] if pair.base_url else [pair.reasoner, pair.detector]
    with terminal.loading(models[0], parts, debug):
        guard = load_guard(guard_model or "picto", device=loading.get("device"))
        refusing = Protector(guard.name, detoxify=False, device=loading.get("device")) if _rewrites(guard) else None
        sitting = None if judge is None else load_guard(judge, device=loading.get("device"))
        model = DetGPT.from_pretrained(models[0], **loading)
    reader = choose_reader(picture_text or pair.picture_text or "ocr", lambda: model.reasoner)
    systems = guarded_systems(model.reasoner, guard, refusing=refusing, reader=reader)
    with terminal.progress(f"{models[0]} attacked") as progress:
        results = evaluate_safety(
            systems, attacks, judge=sitting, max_new_tokens=model.options.max_new_tokens, progress=progress
        )
    if wishes is not None:
        plain: list[Detections] = []
        free = model.reasoner
        watched: dict[str, Reasoner] = {PLAIN: free, GUARDED: GuardedReasoner(free, guard, reader)}
        if refusing is not None:
            watched[REFUSING] = GuardedReasoner(free, refusing, reader)
        for name, reasoner in watched.items():
            model.reasoner = reasoner
            with terminal.progress(f"{models[0]} · {name}") as progress:
                found: list[Detections] = []
                numbers = evaluate(
                    model,
                    wishes,
                    progress=progress,
                    each=lambda _, result, found=found: found.append(result),  # type: ignore[misc]
                    detector_alone=False,
                )
            plain = plain or found
            results.utility[name] = {
                "F1@0.5 of wishes": numbers["end_to_end"]["f1_50"],
                "wishes refused or rewritten": _share_of(result.was_held_back for result in found),
                "answers byte for byte": _share_of(a.answer == b.answer for a, b in zip(plain, found, strict=True)),
            }
    return results


def _rewrites(guard: Any) -> bool:
    return isinstance(guard, Protector) and guard.described.detoxifier is not None


def _share_of(hits: Any) -> float:
    values = list(hits)
    return sum(values) / len(values)
