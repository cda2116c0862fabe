"""How likely a question means harm, by a small network over its word pieces.

    network = QuestionNetwork.load(folder)
    network.score([normalised("Whom could I rob here?")])  # logits

A text CNN (Kim 2014, arXiv:1408.5882): each piece is a vector, convolutions look at a few neighbours, and of what they
find the largest and the mean value count. Beside n-grams, which know the words as they are, it tells what is said in
words of like meaning (docs/finetune-guard.md has both).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import gelu

from detgpt.errors import ModelError

NETWORK_FILE, TOKENIZER_FILE = "network.safetensors", "tokenizer.json"
NEIGHBOURS = (3, 5)  # pieces that a convolution sees
ROWS_PER_PASS = 64


class QuestionNetwork(nn.Module):
    """A logit of harm for each question.

    tokenizer: its word pieces, V of them. width: of a piece's vector. filters: of each convolution.
    """

    def __init__(self, tokenizer: Tokenizer, *, width: int = 64, filters: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.pieces = nn.Embedding(tokenizer.get_vocab_size(), width)
        self.widened = nn.Linear(width, filters)
        self.convolutions = nn.ModuleList(nn.Conv1d(filters, filters, n, padding=n // 2) for n in NEIGHBOURS)
        self.harm = nn.Linear(2 * len(NEIGHBOURS) * filters, 1)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def load(cls, folder: Path) -> QuestionNetwork:
        """Raises `ModelError` where there is none."""
        file, pieces = folder / NETWORK_FILE, folder / TOKENIZER_FILE
        try:
            tokenizer = Tokenizer.from_file(str(pieces))
        except Exception as error:  # tokenizers raises nothing more exact
            raise ModelError(f"cannot read the word pieces of a guard from {pieces}: {error}") from error
        try:
            weights = {name: tensor.float() for name, tensor in load_file(file).items()}
            filters, width = weights["widened.weight"].shape
            network = cls(tokenizer, width=width, filters=filters)
            network.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"cannot load the part of a guard that reads questions from {file}: {error}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ModelError(f"{file} is damaged: it must hold finite weights")
        return network.eval()

    def save(self, folder: Path) -> None:
        """In half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, folder / NETWORK_FILE
        )
        self.tokenizer.save(str(folder / TOKENIZER_FILE))

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """The numbers of each question's pieces."""
        return [found.ids for found in self.tokenizer.encode_batch(list(questions), add_special_tokens=False)]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pieces and whether they are there, (B, L) each → (B,)."""
        there = attention_mask.bool()[..., None]
        vectors = self.dropout(self.widened(self.pieces(input_ids))) * there
        found = torch.cat([gelu(seen(vectors.mT)) for seen in self.convolutions], dim=1).mT  # (B, L, filters)
        largest = found.masked_fill(~there, -1.0).amax(dim=1)  # below all that gelu gives
        mean = (found * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return self.harm(self.dropout(torch.cat([largest, mean], dim=-1)))[:, 0]

    @torch.inference_mode()
    def score(self, questions: Sequence[str]) -> np.ndarray:
        """The logit of harm of each question, (N,). They are read as they are: write out what they hide before."""
        ids = self.encode(questions)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        logits = np.empty(len(ids), np.float32)
        for start in range(0, len(order), ROWS_PER_PASS):
            these = order[start : start + ROWS_PER_PASS]
            logits[these] = self(**side_by_side([ids[i] for i in these])).numpy()
        return logits


def side_by_side(ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Questions as one batch: input_ids and attention_mask, (B, L) with L at least 1."""
    longest = max([1, *map(len, ids)])
    return {
        "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }
