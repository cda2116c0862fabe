"""A teacher behind an OpenAI-compatible server that tells the log-probabilities of a prompt's tokens, as vLLM does:

    detgpt-finetune distill cache models/tokenizer data/train -o runs/teacher \\
        --base-url http://gpu-box:8000/v1 --served-model Qwen/Qwen3-VL-32B-Instruct

The answer is part of the prompt, so nothing is written. Text goes as token ids to `/completions`; with a picture the
conversation goes to `/chat/completions`, where the server's template writes it: then its last tokens are held against
ours. A server tells the likeliest tokens alone, at temperature 1: of its cache only a smoothing can be fitted. Servers
without `prompt_logprobs` (llama.cpp, Ollama) cannot do this.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from pydantic import Field

from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.evaluation.command import KEY
from detgpt.images import load_image
from detgpt.reasoners.chat import is_bare
from finetune.batching import IGNORED
from finetune.distill.concentration import counted
from finetune.distill.sparse import Kept
from finetune.encoding import RecordEncoder, conversation, worded
from finetune.loading import load_reader
from finetune.recipe import Settings

if TYPE_CHECKING:
    from finetune.distill.teacher import Config

LEAST = -30.0  # log-probability of a tail of which rounding leaves nothing


class ServerSettings(Settings):
    """base_url: the server's `/v1` address; the key is taken from the environment. model: its name there. concurrency:
    requests under way at once. timeout: seconds for each. retries: of a request that fails in passing.
    """

    base_url: str
    model: str
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=120, gt=0)
    retries: int = Field(default=3, ge=0)


class Served:
    """The model that a server has; its tokenizer and chat template are those of `config.model`.

    Raises `MissingExtraError` without the openai package; reading raises `ModelError` where the server cannot be
    reached, refuses, tells too few log-probabilities, or writes a conversation in another way than the tokenizer here.
    """

    def __init__(self, config: Config, server: ServerSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "openai") from error
        self._openai, self._server, self._k = openai, server, config.k
        self._client: Any = openai.OpenAI(
            base_url=server.base_url,
            api_key=os.environ.get(KEY, "none"),
            timeout=server.timeout,
            max_retries=server.retries,
        )
        model_config, self._processor = load_reader(config)
        self.tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self.vocabulary = model_config.get_text_config(decoder=True).vocab_size
        self._bare = is_bare(model_config)
        self._encoder = RecordEncoder(self._processor, bare=self._bare, max_length=config.max_length)

    def read(self, records: Dataset, chance: torch.Generator) -> Iterator[tuple[int, torch.Tensor, Kept, np.ndarray]]:
        with ThreadPoolExecutor(self._server.concurrency) as workers:
            yield from workers.map(self._read, range(len(records)), records)

    def _read(self, place: int, record: Mapping[str, Any]) -> tuple[int, torch.Tensor, Kept, np.ndarray]:
        encoded = self._encoder.encode(record)
        ids, learned = encoded["input_ids"], encoded["labels"] != IGNORED
        told = self._told(record, ids.tolist())
        places = (learned.nonzero()[:, 0] + len(told) - len(ids)).tolist()  # a picture may be another number of tokens
        tokens = ids[learned]
        rows = [self._row(told, at, int(token), record) for at, token in zip(places, tokens, strict=True)]
        likeliest = torch.tensor([[logprob for _, logprob in row] for row in rows]).reshape(len(rows), self._k)
        tails = torch.log1p(-likeliest.double().exp().sum(-1).clamp(max=1.0)).clamp(min=LEAST).float()
        kept = Kept(torch.tensor([[token for token, _ in row] for row in rows]), likeliest, tails[:, None])
        return place, tokens, kept, counted(likeliest)

    def _told(self, record: Mapping[str, Any], ids: list[int]) -> list[Any]:
        """What the server tells of each token of the prompt, the first left out: {"token id": {"logprob": …}, …}."""
        asked: dict[str, Any] = {"model": self._server.model, "max_tokens": 1, "temperature": 0}
        extra: dict[str, Any] = {"prompt_logprobs": self._k}
        try:
            if record.get("image") is None:
                answer: Any = self._client.completions.create(prompt=ids, extra_body=extra, **asked)
                told = getattr(answer.choices[0], "prompt_logprobs", None)
            else:
                extra |= {"add_generation_prompt": False}
                answer = self._client.chat.completions.create(
                    messages=self._messages(record), extra_body=extra, **asked
                )
                told = getattr(answer, "prompt_logprobs", None)
        except self._openai.OpenAIError as error:
            raise ModelError(f"the server at {self._server.base_url} did not answer: {error}") from error
        if not told:
            raise ModelError(
                f"the server at {self._server.base_url} tells no prompt_logprobs: serve the teacher by vLLM, or cache "
                "a local one"
            )
        return list(told)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        turns = conversation(self._processor, worded(record, bare=self._bare), load_image(record["image"]))
        parts = [[_part(part) for part in turn["content"]] for turn in turns]
        return [{"role": turn["role"], "content": content} for turn, content in zip(turns, parts, strict=True)]

    def _row(self, told: list[Any], at: int, token: int, record: Mapping[str, Any]) -> list[tuple[int, float]]:
        """The k likeliest (token, log-probability) at a place; a server always tells that of the true token, too."""
        found = told[at] if 0 < at < len(told) else None
        if not found or str(token) not in found:
            raise ModelError(
                f"{record['where']}: the server writes this conversation in another way than the tokenizer here: give "
                "as model the very checkpoint that is served"
            )
        row = sorted(((int(i), float(entry["logprob"])) for i, entry in found.items()), key=lambda entry: -entry[1])
        if len(row) < self._k:
            raise InputError(
                f"the server tells {len(row)} tokens of a position, and k={self._k} are asked for: start it with "
                f"--max-logprobs {self._k}, or keep fewer"
            )
        return row[: self._k]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message as servers take it, a picture without loss."""
    if part["type"] == "text":
        return dict(part)
    file = io.BytesIO()
    picture: Image.Image = part["image"]
    picture.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }
