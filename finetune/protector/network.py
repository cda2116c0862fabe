"""Teach a small network which questions mean harm (`stage: protector.network`).

    stage: protector.network
    train: [build/guard/data/train, build/guard/data/questions]
    tokenizer: build/guard/fresh/detector
    output: build/guard/network

Its vectors start where words that stand in the same company lie near each other: the principal components of how much
likelier two pieces are to meet than by chance (positive pointwise mutual information; Levy and Goldberg 2014, "Neural
Word Embedding as Implicit Matrix Factorization"). So it need not learn from harm and no harm alone that a goose is much
like a duck. Questions of several turns are left out: which of their wishes means harm is not known. The result is
`<output>/network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from tokenizers import Tokenizer
from transformers import set_seed

from detgpt.errors import InputError
from detgpt.guards.network import TOKENIZER_FILE, QuestionNetwork, side_by_side
from finetune import callbacks, rundir
from finetune.arguments import TrainerSettings
from finetune.protector.asked import Asked, AskedTrainer, asked_arguments
from finetune.protector.exchanges import read_questions
from finetune.recipe import StageConfig

NETWORK = "network"  # in a run's folder: the result
COMPANY = 3  # pieces: how far two may stand apart to meet
LONGEST = 64  # pieces of a question in training; the rest is cut off
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 128,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "save_steps": 1000,
}


class Config(StageConfig):
    """train: exchanges, of which only the questions are read. tokenizer: a folder with the word pieces to read by.

    width: of a piece's vector. filters: of each convolution. hidden: the share of pieces that are not seen, anew at
    each drawing. trainer: settings of transformers' TrainingArguments.
    """

    stage: Literal["protector.network"] = "protector.network"
    train: Path | list[Path]
    tokenizer: Path
    width: int = Field(default=64, ge=8)
    filters: int = Field(default=128, ge=8)
    hidden: float = Field(default=0.1, ge=0, lt=1)
    trainer: TrainerSettings = Field(default_factory=dict)


def run(config: Config) -> None:
    """Train, and write the result; a run that was interrupted goes on from its last checkpoint."""
    args = asked_arguments(config.output, config.seed, config.trainer, DEFAULTS)
    if rundir.is_finished(config):
        return
    folder = rundir.start(config)
    set_seed(config.seed)
    tokenizer = _read_tokenizer(config.tokenizer)
    network = QuestionNetwork(tokenizer, width=config.width, filters=config.filters)
    asked = read_questions(config.train)
    ids = network.encode(list(asked))
    with torch.no_grad():
        network.pieces.weight.copy_(torch.from_numpy(company(ids, len(network.pieces.weight), config.width)))
    trainer = AskedTrainer(
        model=network,
        args=args,
        train_dataset=Asked(ids, [harmful for harmful, _ in asked.values()], LONGEST),
        data_collator=_Collator(config.hidden),
    )
    callbacks.attach(trainer)
    callbacks.train(trainer)
    rundir.write_folder(folder / NETWORK, network.cpu().save)
    rundir.finish(folder, {})


def company(ids: Sequence[Sequence[int]], vocabulary: int, width: int) -> np.ndarray:
    """A vector of length 1 for each of V pieces, by the pieces that stand next to it and near it, (V, width) float32.

    Pieces that never stand near another have none: zeros.
    """
    met: list[np.ndarray] = []  # (2, pairs): a piece, and its company; who stands next to it counts as another
    for row in map(np.asarray, ids):
        for apart in range(1, COMPANY + 1):
            first, second = row[:-apart], row[apart:]
            after = second + (vocabulary if apart == 1 else 0)
            met += [np.stack([first, after]), np.stack([second, first])]
    pieces, others = np.concatenate(met, axis=1)
    shape = (vocabulary, 2 * vocabulary)
    counts = csr_array((np.ones(len(pieces), np.float32), (pieces, others)), shape)
    counts.sum_duplicates()
    of_piece, of_other = counts.sum(axis=1), counts.sum(axis=0) ** 0.75  # rare company says less than it seems to
    pairs = counts.tocoo()
    likelier = np.log(pairs.data * of_other.sum() / (of_piece[pairs.row] * of_other[pairs.col]))
    information = csr_array((np.maximum(likelier, 0).astype(np.float32), (pairs.row, pairs.col)), shape)
    components, strengths, _ = svds(information, k=width, random_state=0)
    vectors = components * strengths**0.5
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(lengths > 1e-6, vectors / np.maximum(lengths, 1e-6), 0).astype(np.float32)


class _Collator:
    def __init__(self, hidden: float) -> None:
        self._hidden = hidden

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = side_by_side([item["input_ids"] for item in items])
        batch["attention_mask"] *= torch.rand(batch["attention_mask"].shape) >= self._hidden
        return batch | {"labels": torch.tensor([item["labels"] for item in items])}


def _read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise InputError(f"tokenizer: {folder} has no {TOKENIZER_FILE}: give the folder of a fast tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
