"""The tensors in a checkpoint's folder, read a few rows at a time: a model of any size in a few megabytes.

    tensors = stored(Path("models/kitchen"))            # {"model.norm.weight": Stored(…), …}; no weights are read
    with reader(tensors["model.norm.weight"]) as rows:
        rows(slice(0, 8))

A safetensors file is eight bytes with the length of its header, the header in JSON, and the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from detgpt.errors import ModelError

LENGTH = 8  # bytes that say how long the header is
PIECE = 1 << 20  # bytes that are worked on at a time: what a core's cache holds is fastest
TOGETHER = 64  # pieces that one thread goes through, in files that it opens once
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start: its first byte there. bytes: how many it has."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def rows(self) -> int:
        """Along its first dimension; the elements of a vector."""
        return self.shape[0] if self.shape else 1

    @property
    def bytes_of_row(self) -> int:
        return self.bytes // max(self.rows, 1)

    @property
    def is_float(self) -> bool:
        """Whether its elements are numbers that can be averaged; 8 bits and less are codes of a quantisation."""
        return self.dtype in FLOATS

    def stretches(self) -> Iterator[list[slice]]:
        """Its rows in pieces of about PIECE bytes, as many of them as are worked on TOGETHER."""
        step = max(1, PIECE // max(self.bytes_of_row, 1))
        rows = self.rows if self.bytes else 0
        pieces = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
        for first in range(0, len(pieces), TOGETHER):
            yield pieces[first : first + TOGETHER]


def stored(folder: Path, name: str = SAFE_WEIGHTS_NAME) -> dict[str, Stored]:
    """The tensors of the checkpoint in `folder`, in one file called `name` or in shards with an index.

    Raises `ModelError` for a folder without safetensors, and a file that is none.
    """
    tensors: dict[str, Stored] = {}
    for file in shards(folder, name):
        tensors |= _tensors(file)
    return tensors


def shards(folder: Path, name: str = SAFE_WEIGHTS_NAME) -> list[Path]:
    """The files that hold the weights. Raises `ModelError` where there are none."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / name).is_file():
        return [folder / name]
    if not index.is_file():
        raise ModelError(f"{folder} has no weights in safetensors: there is no {name}, nor an index of shards")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is no index of shards: {error!r}. Download it again") from error
    return [folder / name for name in names]


def header(file: Path) -> bytes:
    """The bytes before the first tensor's."""
    with file.open("rb") as opened:
        length = opened.read(LENGTH)
        return length + opened.read(int.from_bytes(length, "little"))


@contextmanager
def reader(tensor: Stored) -> Iterator[Callable[[slice], torch.Tensor]]:
    """What reads rows of the tensor: (rows, elements of a row), in its own dtype; bytes where it is no float.

    They are the caller's until the next ones are read, into the same memory.
    """
    room = np.empty(max(PIECE, tensor.bytes_of_row), np.uint8)

    def rows(which: slice) -> torch.Tensor:
        count = which.stop - which.start
        read = room[: count * tensor.bytes_of_row]
        file.seek(tensor.start + which.start * tensor.bytes_of_row)
        if file.readinto(read.data) != read.nbytes:
            raise ModelError(f"{tensor.file} ends before its last tensor: it has changed while it was read")
        return torch.from_numpy(read).view(FLOATS.get(tensor.dtype, torch.uint8)).reshape(count, -1)

    with tensor.file.open("rb", buffering=0) as file:
        yield rows


def _tensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="np"):  # it checks the header against the file
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}. Download or copy it again") from error
    first = header(file)
    described = json.loads(first[LENGTH:])
    described.pop("__metadata__", None)
    tensors = {}
    for name, tensor in described.items():
        start, end = tensor["data_offsets"]
        tensors[name] = Stored(file, tensor["dtype"], tuple(tensor["shape"]), len(first) + start, end - start)
    return tensors
