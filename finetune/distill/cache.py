"""A teacher's distributions on disk, as `stage: distill.cache` writes them and `stage: distill` reads them.

    runs/teacher/
      cache.json                        whose they are, of which records, how many tokens of each are kept
      shards/00000.safetensors          `shard_size` records each, in the records' order
      concentration.json, .png, .svg    how much of the distributions lies in how few tokens

A shard has a row for each token that is learned of its records:

    ids        uint16 (rows, k); of a vocabulary of more than 65,536 tokens uint8 (rows, k, 3), the lowest byte first
    logprobs   float16 (rows, k)
    tails      float16 (rows, temperatures), as in `finetune.distill.sparse.Kept`; not of random draws

which is 24 bytes a token for k = 5 and two temperatures, or 29; and for each record where its rows begin and a checksum
of the tokens that they are of. Files are written whole or not at all, and read by mapping them into memory.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.numpy import save_file

from detgpt import terminal
from detgpt.errors import InputError
from finetune.averaging.weights import stored
from finetune.data.records import Paths, fingerprint
from finetune.distill.sparse import Kept
from finetune.recipe import Settings
from finetune.rundir import write_json

CACHE_FILE = "cache.json"
SHARDS = "shards"
NARROW, WIDE = 1 << 16, 1 << 24  # sizes of a vocabulary up to which ids take two bytes, or three
DTYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "I32": np.int32, "U32": np.uint32, "F64": np.float64}


class Shard(Settings):
    """records, rows: how many there are in it."""

    file: str
    records: int = Field(ge=0)
    rows: int = Field(ge=0)


class Header(Settings):
    """What a cache is of.

    teacher: a model's name, as `finetune.loading` or a server knows it. tokenizer: a digest of its vocabulary. data:
    the fingerprint of the records. kept: the likeliest `k` tokens, or `k` random draws. temperatures: at which tails
    are known; none of random draws.
    """

    format: Literal[1] = 1
    teacher: str
    tokenizer: str
    vocabulary: int = Field(ge=2, le=WIDE)
    data: str
    kept: Literal["top", "random"]
    k: int = Field(ge=1)
    temperatures: tuple[float, ...]
    shards: tuple[Shard, ...] = ()

    @property
    def bytes_of_row(self) -> int:
        """Of a token, without what a shard says once for each record."""
        return self.k * ((2 if self.vocabulary <= NARROW else 3) + 2) + 2 * len(self.temperatures)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


class Cache:
    """The finished cache in `folder`.

    Raises `InputError` where there is none, it is not finished, or a shard is not what the header says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = read_header(folder)
        if not self.header.shards:
            raise InputError(f"{folder} is a cache that is not finished: run the command that began it again")
        self._first_rows = np.cumsum([0, *(shard.rows for shard in self.header.shards)])
        offsets = [self._of(number, "offsets") for number in range(len(self.header.shards))]
        for shard, starts in zip(self.header.shards, offsets, strict=True):
            if (len(starts), starts[-1]) != (shard.records + 1, shard.rows):
                raise InputError(f"{folder / SHARDS / shard.file} is not what {CACHE_FILE} says: make the cache anew")
        begins = [first + part[:-1].astype(np.int64) for first, part in zip(self._first_rows, offsets, strict=False)]
        self._starts = np.append(np.concatenate(begins), self._first_rows[-1])
        self._checks = np.concatenate([self._of(number, "checks") for number in range(len(self.header.shards))])

    def __len__(self) -> int:
        """Records."""
        return len(self._checks)

    def check(self, tokenizer: Any, data: Paths, *, k: int | None = None, teacher: str | None = None) -> None:
        """Raises `InputError` unless it is of this tokenizer, these records and, where they are given, this k and
        teacher."""
        header = self.header
        if header.data != fingerprint(data):
            raise InputError(f"{self.folder} is a cache of other records than {data}: make one of these")
        if header.tokenizer != digest(tokenizer):
            raise InputError(
                f"{self.folder} is a cache of {header.teacher!r}, whose tokenizer is not the student's: a teacher and "
                "its student have to share their vocabulary"
            )
        if k not in (None, header.k):
            raise InputError(f"{self.folder} keeps k={header.k} tokens, not {k}: leave k out, or make another cache")
        if teacher not in (None, header.teacher):
            raise InputError(f"{self.folder} is a cache of {header.teacher!r}, not of {teacher!r}: make another one")

    def rows_of(self, record: int, labels: torch.Tensor, where: str) -> torch.Tensor:
        """(n,): the rows of a record's n learned tokens `labels`. Raises `InputError` if they are those of others."""
        first, end = int(self._starts[record]), int(self._starts[record + 1])
        if end - first != len(labels) or self._checks[record] != checksum(labels):
            raise InputError(
                f"{where}: the teacher of {self.folder} has read another answer ({end - first} tokens, here "
                f"{len(labels)}): its chat template or max_length was another one. Make a cache with the student's"
            )
        return torch.arange(first, end)

    def kept(self, rows: torch.Tensor) -> Kept:
        """What is kept of these rows, (N,)."""
        header, wanted = self.header, rows.numpy()
        ids = np.empty((len(wanted), header.k), np.int64)
        logprobs = np.empty((len(wanted), header.k), np.float32)
        tails = np.empty((len(wanted), len(header.temperatures)), np.float32)
        shard_of = np.searchsorted(self._first_rows, wanted, side="right") - 1
        for number in np.unique(shard_of):
            here = shard_of == number
            places = wanted[here] - self._first_rows[number]
            ids[here] = wide(self._of(number, "ids")[places])
            logprobs[here] = self._of(number, "logprobs")[places]
            if header.temperatures:
                tails[here] = self._of(number, "tails")[places]
        return Kept(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(tails))

    def _of(self, number: int, name: str) -> np.ndarray:
        return mapped(self.folder / SHARDS / self.header.shards[number].file)[name]


def read_header(folder: Path) -> Header:
    """Raises `InputError`."""
    file = folder / CACHE_FILE
    if not file.is_file():
        raise InputError(f"{folder} is no cache of a teacher: make one with `detgpt-finetune distill cache`")
    try:
        return Header.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"{file} cannot be read: {error}. Make the cache anew") from error


def write_header(folder: Path, header: Header) -> None:
    write_json(folder / CACHE_FILE, header.model_dump(mode="json"))


def write_shard(
    file: Path, kept: Kept, labels: Sequence[torch.Tensor], vocabulary: int, more: dict[str, np.ndarray]
) -> None:
    """Write the rows of some records, in their order. labels: the learned tokens of each. more: of the shard."""
    ends = np.cumsum([len(tokens) for tokens in labels], dtype=np.int32)
    tensors = {
        "offsets": np.concatenate([np.zeros(1, np.int32), ends]),
        "checks": np.array([checksum(tokens) for tokens in labels], np.uint32),
        "ids": narrow(kept.ids.numpy(), vocabulary),
        "logprobs": kept.logprobs.numpy().astype(np.float16),
        **({"tails": kept.tails.numpy().astype(np.float16)} if kept.tails.shape[1] else {}),
        **more,
    }
    with terminal.replacing(file) as partial:
        save_file(tensors, partial)


def shard_file(number: int) -> str:
    return f"{number:05d}.safetensors"


@lru_cache(maxsize=4096)
def mapped(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard, of which only what is looked at is read. Kept out of `Cache`, so that this can be sent to
    a data loader's process. Raises `ModelError` for a file that is no safetensors."""
    tensors = stored(file.parent, file.name)
    return {
        name: np.memmap(file, DTYPES[tensor.dtype], "r", offset=tensor.start, shape=tensor.shape)
        for name, tensor in tensors.items()
    }


def narrow(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Ids (…) as uint16, or for a larger vocabulary as uint8 (…, 3)."""
    if vocabulary <= NARROW:
        return ids.astype(np.uint16)
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)[..., :3].copy()


def wide(ids: np.ndarray) -> np.ndarray:
    """int64 (…), of what `narrow` made."""
    if ids.dtype == np.uint16:
        return ids.astype(np.int64)
    return (ids.astype(np.int64) << np.array([0, 8, 16])).sum(-1)


def checksum(tokens: torch.Tensor) -> int:
    return zlib.crc32(tokens.numpy().astype("<i4").tobytes())


def digest(tokenizer: Any) -> str:
    """Of which token has which number."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
