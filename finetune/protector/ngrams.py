"""Teach n-grams to tell harmful questions (`stage: protector.ngrams`).

    stage: protector.ngrams
    train: build/guard/data/train
    output: build/guard/ngrams

Logistic regression over the features of `detgpt.guards.ngrams`, each scaled by how unlike naive Bayes finds it in
harmful and in harmless questions (Wang and Manning 2012, "Baselines and Bigrams", whose scale is the log of the ratio;
ours is its square root): what nearly always means the same may weigh much, what tells nothing may not. The problem is
convex, so there is one solution and no luck. Which kind of harm it is, naive Bayes says alone. Questions of several
turns are left out: which of their wishes means harm is not known. The result is `<output>/ngrams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.guards.ngrams import NGrams, features
from finetune import rundir
from finetune.protector.exchanges import read_questions
from finetune.recipe import StageConfig

NGRAMS = "ngrams"  # in a run's folder: the result
SEEN = 2  # questions: what is in fewer tells nothing
KIND_FEATURES = 50_000
STEPS = 150  # after which nothing changes any more that could be measured


class Config(StageConfig):
    """train: exchanges, of which only the questions are read. strength: how much a mistake costs, against large
    weights. kept: features, those that matter most."""

    stage: Literal["protector.ngrams"] = "protector.ngrams"
    train: Path | list[Path]
    strength: float = Field(default=30.0, gt=0)
    kept: int = Field(default=130_000, ge=1)


def run(config: Config) -> None:
    if rundir.is_finished(config):
        return
    rundir.start(config)
    known = read_questions(config.train)
    harmful, kinds = zip(*known.values(), strict=True)
    learned = fit(list(known), np.array(harmful, bool), kinds, strength=config.strength, kept=config.kept)
    rundir.write_folder(config.output / NGRAMS, learned.save)
    terminal.note(f"{len(learned.hashes)} features of {len(known)} questions")
    rundir.finish(config.output, {})


def fit(
    questions: Sequence[str],
    harmful: np.ndarray,
    kinds: Sequence[Sequence[str]],
    *,
    strength: float = 30.0,
    kept: int = 130_000,
) -> NGrams:
    """The n-grams that tell harmful questions, (N,) bool, from others, and of which of their N `kinds` they are.

    Raises `InputError` without harmful questions or without others.
    """
    if harmful.all() or not harmful.any():
        raise InputError("n-grams learn from harmful and harmless questions: there are only those of one kind")
    found = [features(question) for question in questions]
    lengths = np.array([len(these) for these in found])
    hashes, columns, total = np.unique(np.concatenate(found), return_inverse=True, return_counts=True)
    rows = csr_array((np.ones(len(columns), np.float32), columns, np.append(0, np.cumsum(lengths))))
    hashes, rows = hashes[total >= SEEN], rows[:, total >= SEEN]
    counts = np.stack([rows[kind].sum(axis=0) for kind in (~harmful, harmful)])  # (2, features)
    chance = (counts + 1) / (counts + 1).sum(axis=1, keepdims=True)
    scale = np.abs(np.log(chance[1] / chance[0])) ** 0.5
    scaled = rows.multiply(scale).multiply(np.maximum(lengths, 1)[:, None] ** -0.5).tocsr()
    weights, bias = logistic_regression(scaled.astype(np.float32), harmful, strength)
    weights = weights * scale
    matters = np.abs(weights) * counts.sum(axis=0) ** 0.5
    best = np.sort(np.argsort(-matters, kind="stable")[:kept])
    names = sorted({name for found in kinds for name in found})
    of_kind = np.array([[name in found for name in names] for found in kinds], bool).reshape(len(kinds), len(names))
    common, kind_weights = _naive_bayes(rows[harmful], of_kind[harmful])
    return NGrams(
        hashes=hashes[best],
        weights=weights[best].astype(np.float32),
        bias=bias,
        kinds=tuple(names),
        kind_hashes=hashes[common],
        kind_weights=kind_weights,
    )


def _naive_bayes(rows: csr_array, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which KIND_FEATURES of rows (N, F) are the most common, ascending, (K,); and how much likelier than in all rows
    each is in those of each of the `kinds` (N, C) bool, as logarithms, (K, C)."""
    if not kinds.shape[1]:
        return np.empty(0, int), np.empty((0, 0), np.float32)
    common = np.sort(np.argsort(-rows.sum(axis=0), kind="stable")[:KIND_FEATURES])
    counts = np.stack([rows[these][:, common].sum(axis=0) for these in kinds.T], axis=1) + 1.0
    chance = counts / counts.sum(axis=0)
    return common, np.log(chance / chance.mean(axis=1, keepdims=True)).astype(np.float32)


def logistic_regression(rows: csr_array, harmful: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Weights (F,) and bias with the least `strength` · Σ cross-entropy + ½ |weights|² over rows (N, F)."""
    turned, sign = rows.T.tocsr(), np.where(harmful, 1.0, -1.0)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (rows @ at[:-1] + at[-1])
        pull = -strength * sign * expit(-margin)
        value = strength * np.logaddexp(0, -margin).sum() + 0.5 * (at[:-1] ** 2).sum()
        return float(value), np.append(turned @ pull + at[:-1], pull.sum())

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return found.x[:-1], float(found.x[-1])
