"""Put a harm detector and a detoxifier together as a guard, and measure it (`stage: guard`).

    <output>/guard/
      guard.json     what `detgpt.guards` reads: the parts, the threshold, the categories, the refusals
      detector/ detoxifier/ questions/
      README.md      the card: how good it is, and how the threshold was chosen
      roc.png        the choice as a picture

The threshold is chosen on `validation` alone, and so is how much each part says; `test`, `strangers`, `categories`
and `attacks` are only measured. The weights are kept in half precision, and what is measured are these.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.sparse import csr_array
from scipy.special import logit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from detgpt import terminal
from detgpt.device import choose_device
from detgpt.errors import InputError
from detgpt.evaluation import fields
from detgpt.guards.normalise import normalised
from detgpt.guards.parts import HarmDetector, Questions
from detgpt.guards.template import conversation
from finetune import rundir
from finetune.data.records import data_files
from finetune.protector.card import SPLITS, card, write_roc
from finetune.protector.exchanges import HINT, Exchange, read_exchanges
from finetune.protector.harm_detector import HARM
from finetune.protector.measure import Scored, auroc, choose_threshold, harm_scores, resampled, score, share_interval
from finetune.protector.ngrams import logistic_regression
from finetune.protector.texts import Texts
from finetune.recipe import StageConfig

GUARD = "guard"  # in a run's folder: the result
GUARD_FILE, QUESTIONS = "guard.json", "questions"
SUREST = 1e-6  # a chance this near to none or to certainty has no logit that could be reckoned with
FREE = 1e3  # next to no limit to how much a number may weigh, of which there are three or four
Metrics = dict[str, float]


class Config(StageConfig):
    """Settings of the stage.

    detector, detoxifier: folders of the trained models; without a detoxifier harmful answers are refused. ngrams,
    network, encoder: what judges questions beside the detector, if anything does. validation: exchanges for the
    threshold. most: the largest share of harmless texts that it may flag there. test, strangers, categories, attacks:
    what is measured besides, see `finetune.protector.splits`. refusals: a friendly text for each kind of harm; those of
    the built-in set unless given.
    """

    stage: Literal["guard"] = "guard"
    detector: Path
    detoxifier: Path | None = None
    ngrams: Path | None = None
    network: Path | None = None
    encoder: Path | None = None
    validation: Path | list[Path]
    most: float = Field(default=0.02, gt=0, lt=1)
    test: Path | None = None
    strangers: Path | None = None
    categories: Path | None = None
    attacks: Path | None = None
    refusals: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _all_or_none(self) -> Config:
        if len({part is None for part in (self.ngrams, self.network, self.encoder)}) == 2:
            raise InputError("ngrams, network and encoder judge questions together: give all, or leave all out")
        return self


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    folder = rundir.start(config)
    found: Metrics = {}

    def write(place: Path) -> None:
        labels = _save(config, place)
        detector = HarmDetector(place / "detector", labels, choose_device(None))
        for part in filter(None, (config.ngrams, config.network, config.encoder)):
            shutil.copytree(part, place / QUESTIONS, dirs_exist_ok=True)
        if config.ngrams is not None:
            questions = Questions.of(place / QUESTIONS, choose_device(None))
            detector.questions = mixed(detector, questions, read_exchanges(config.validation))
        curves: dict[str, Scored] = {}
        threshold = 0.0
        for name in SPLITS:
            path = getattr(config, name)
            if path is None:
                continue
            exchanges = read_exchanges(path)
            scored = curves[name] = score(detector, exchanges)
            if name == "validation":
                threshold = found["threshold"] = choose_threshold(scored.harm, scored.harmful, most=config.most)
            found.update(prefixed(name, measured(scored, exchanges, threshold, seed=config.seed)))
        if config.attacks is not None:
            found.update(prefixed("attacks", caught(detector, config.attacks, threshold)))
        rundir.write_json(place / GUARD_FILE, _described(config, threshold, labels, detector.questions))
        write_roc(place / "roc.png", curves, threshold)
        text = card(
            found,
            labels,
            has_detoxifier=config.detoxifier is not None,
            has_questions=detector.questions is not None,
            most=config.most,
        )
        (place / "README.md").write_text(text, encoding="utf-8")

    rundir.write_folder(folder / GUARD, write)
    for name in ("test_auroc", "test_false_positives", "test_over_refusal", "strangers_auroc", "categories_auroc"):
        if name in found:
            terminal.note(f"{name} {found[name]:.4f}")
    rundir.finish(folder, found)


def _save(config: Config, place: Path) -> list[str]:
    """Both models in half precision, with their tokenizers. Returns the kinds of harm that the detector names."""
    parts: dict[str, tuple[Any, Path | None]] = {
        "detoxifier": (AutoModelForCausalLM, config.detoxifier),
        "detector": (AutoModelForSequenceClassification, config.detector),
    }
    for part, (kind, source) in parts.items():
        if source is not None:
            model = kind.from_pretrained(source, dtype=torch.float16, use_safetensors=True, trust_remote_code=False)
            model.save_pretrained(place / part)
            AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(place / part)
    return [label for _, label in sorted(model.config.id2label.items()) if label != HARM]


def mixed(detector: HarmDetector, questions: Questions, exchanges: Sequence[Exchange]) -> Questions:
    """These with the say that each gets: that of logistic regressions on these exchanges.

    The scores become chances: of the texts that get 0.9, nine in ten of `exchanges` do harm.
    """
    scored = score(detector, exchanges)
    texts = [normalised(exchanges[i].question) for i in scored.exchange]
    single = scored.asked & np.array(["\n" not in text for text in texts])  # what means harm of several is not known
    asked = questions.said([texts[i] for i in np.flatnonzero(single)])
    questions = replace(questions, alone=_regression(asked, scored.harmful[single]))
    said = logit(np.clip(scored.harm.astype(float), SUREST, 1 - SUREST))
    both = np.stack([said, questions.asked(texts)], axis=1)
    return replace(questions, answered=_regression(both[~scored.asked], scored.harmful[~scored.asked]))


def _regression(features: np.ndarray, harmful: np.ndarray) -> tuple[float, ...]:
    """Their factors and a bias, for features (N, F)."""
    factors, bias = logistic_regression(csr_array(features), harmful, FREE)
    return tuple(round(float(number), 4) for number in (*factors, bias))


def _described(config: Config, threshold: float, labels: Sequence[str], questions: Questions | None) -> dict[str, Any]:
    ours = {name: about["refusal"] for name, about in Texts().categories.items()}
    described = {
        "detector": "detector",
        "detoxifier": "detoxifier" if config.detoxifier is not None else None,
        "threshold": round(threshold, 4),
        "categories": list(labels),
        "refusals": {name: text for name, text in {**ours, **config.refusals}.items() if name in labels},
    }
    if questions is None:
        return described
    return described | {"questions": {"folder": QUESTIONS, "alone": questions.alone, "answered": questions.answered}}


def measured(scored: Scored, exchanges: Sequence[Exchange], threshold: float, *, seed: int = 0) -> Metrics:
    """How good the detector is on these exchanges.

    auroc, also of the questions alone and of the answers, where these are known; caught: the share of harmful texts
    that it flags; held_back: of the exchanges with a harmful answer those that it flags, by the question or the answer;
    false_positives: the share of harmless texts that it flags; over_refusal: of the harmless questions that sound like
    harm those that it flags, alone or with a harmless answer. …_low, …_high: 95% intervals; of auroc by resampling the
    exchanges.
    """
    flagged = scored.harm >= threshold
    found = {"auroc": auroc(scored.harm, scored.harmful)}
    found["auroc_low"], found["auroc_high"] = resampled(scored, seed=seed)
    for name, these in (("questions", scored.asked), ("answers", ~scored.asked)):
        if len(set(scored.harmful[these])) == 2:
            found[f"auroc_{name}"] = auroc(scored.harm[these], scored.harmful[these])
    lookalike = np.array([exchange.lookalike for exchange in exchanges], bool)
    refused, held_back, answered = (np.zeros(len(exchanges), bool) for _ in range(3))
    np.logical_or.at(refused, scored.exchange, flagged & ~scored.harmful)
    np.logical_or.at(held_back, scored.exchange, flagged & scored.harmful)
    np.logical_or.at(answered, scored.exchange, scored.harmful & ~scored.asked)
    shares = {
        "caught": flagged[scored.harmful],
        "held_back": held_back[answered],
        "false_positives": flagged[~scored.harmful],
        "over_refusal": refused[lookalike],
    }
    for name, hits in shares.items():
        if len(hits):
            found[name] = float(hits.mean())
            found[f"{name}_low"], found[f"{name}_high"] = share_interval(int(hits.sum()), len(hits))
    return found


def caught(detector: HarmDetector, folder: Path, threshold: float) -> Metrics:
    """Of each kind of attack: the share of harmful questions that are flagged, and of harmless ones.

    What is printed in a picture is read as if it had been asked.
    """
    rows = [row for file in data_files(folder) for _, row in fields.read_rows(file, HINT)]
    texts = [
        conversation([*row.get("turns", []), row["question"], *filter(None, [row.get("printed")])]) for row in rows
    ]
    flagged = harm_scores(detector, [(text, None) for text in texts]) >= threshold
    found: Metrics = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for benign, name in ((False, "caught"), (True, "flagged")):
            of_kind = [
                bool(flag)
                for flag, row in zip(flagged, rows, strict=True)
                if (row["kind"], row["benign"]) == (kind, benign)
            ]
            found[f"{kind}_{name}"] = float(np.mean(of_kind))
    return found


def prefixed(name: str, metrics: Mapping[str, float]) -> Metrics:
    return {f"{name}_{key}": value for key, value in metrics.items()}
