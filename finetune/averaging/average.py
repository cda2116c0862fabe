"""The weighted average of a base model and what was tuned from it, tensor by tensor (Wortsman et al. 2022, WiSE-FT,
arXiv:2109.01903; with a ratio of its own for each group of blocks, Lin et al. 2024, arXiv:2309.06256).

    average("models/instructed", "runs/aligned", "models/averaged", base_weight=0.4)
    average("models/instructed", "runs/aligned", "models/averaged", ratios={"language.0-1": 0.3, "language.2-3": 0.9})

θ = a · tuned + (1 − a) · base. `base_weight` is 1 − a, the same in all parts; `ratios` are a by part, see
`finetune.averaging.ratios`. Works on the files, a megabyte at a time, for any architecture of transformers.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from detgpt import terminal
from detgpt.errors import InputError, ModelError
from detgpt.models import resolve
from finetune.averaging.adapter import CONFIG as ADAPTER_CONFIG
from finetune.averaging.adapter import Adapter, is_adapter
from finetune.averaging.ratios import Ratios, of_tensors
from finetune.averaging.weights import Stored, header, reader, shards, stored
from finetune.rundir import is_pair, write_folder

WORKERS = 4  # at most, that read, compute and write at the same time
WEIGHTS = frozenset([".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"])


def average(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    base_weight: float | None = None,
    ratios: Ratios | None = None,
) -> Path:
    """Write the average of two checkpoints to the new folder `out`, and return it.

    base, tuned: folders, hub ids, named pairs or runs, whose reasoner is meant; `tuned` may be a LoRA adapter (PEFT).
    Exactly one of base_weight, in [0, 1], and ratios. Shards and dtypes are those of `base`, every other file is that
    of `tuned`. Integers, such as counters, are those of `base`, but for a ratio of 1.

    Raises `InputError` for wrong weights or an `out` that exists or cannot be written, `ModelError` for checkpoints
    that are not of one architecture; it names the first tensor in which they differ.
    """
    if (base_weight is None) == (ratios is None):
        raise InputError("give either base_weight, for all parts, or ratios, by part")
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already: give a folder that does not")
    merge = Merge(base, tuned, _uniform(base_weight) if base_weight is not None else ratios or {})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return write_folder(out, merge.write)
    except OSError as error:
        raise InputError(f"cannot write {str(out)!r}: {error}. Choose another folder, or make room") from error


class Merge:
    """What is to be written: two checkpoints that fit each other, and a ratio for every tensor."""

    def __init__(self, base: str | Path, tuned: str | Path, ratios: float | Ratios) -> None:
        self._base, self._tuned = folder_of(base), folder_of(tuned)
        self._tensors = stored(self._base)
        self._theirs: _Tuned = (
            Adapter(self._tuned, self._base, self._tensors)
            if is_adapter(self._tuned)
            else _Whole(self._tuned, self._base, self._tensors)
        )
        self._ratios = of_tensors({name: tensor.shape for name, tensor in self._tensors.items()}, ratios)

    def write(self, place: Path) -> None:
        """Fill the empty folder `place`."""
        for folder in [self._base, self._tuned] if is_adapter(self._tuned) else [self._tuned]:
            for file in folder.iterdir():
                if _is_companion(file):
                    shutil.copyfile(file, place / file.name)
        if (self._base / SAFE_WEIGHTS_INDEX_NAME).is_file():
            shutil.copyfile(self._base / SAFE_WEIGHTS_INDEX_NAME, place / SAFE_WEIGHTS_INDEX_NAME)
        total = sum(tensor.bytes for tensor in self._tensors.values())
        done = 0
        with _workers() as pool, terminal.progress("averaging (MB)") as move:
            for shard in shards(self._base):
                file = place / shard.name
                file.write_bytes(header(shard))  # the same tensors at the same places
                _reserve(file, shard.stat().st_size)
                for written in pool.map(lambda stretch, file=file: self._write(stretch, file), self._stretches(shard)):
                    done += written
                    move(done >> 20, total >> 20)

    def _stretches(self, shard: Path) -> Iterator[_Stretch]:
        for name, tensor in self._tensors.items():
            if tensor.file == shard:
                yield from (_Stretch(name, tensor, pieces) for pieces in tensor.stretches())

    def _write(self, stretch: _Stretch, file: Path) -> int:
        """Average a stretch into its place in `file`. Returns its bytes."""
        name, tensor, pieces = stretch
        done = 0
        with reader(tensor) as ours, self._theirs.reader(name) as theirs, file.open("r+b", buffering=0) as opened:
            opened.seek(tensor.start + pieces[0].start * tensor.bytes_of_row)
            for which in pieces:
                mixed = self._mixed(name, ours(which), partial(theirs, which)).contiguous().view(torch.uint8).numpy()
                if opened.write(mixed.data) != mixed.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
                done += mixed.nbytes
        return done

    def _mixed(self, name: str, ours: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The average of rows of a tensor, in the place of `ours`; read: gives those of the tuned model."""
        ratio, tensor = self._ratios[name], self._tensors[name]
        if ratio == 0:
            return ours
        theirs = read(ours)
        if ratio == 1:
            return theirs
        if tensor.is_float:
            return torch.lerp(ours, theirs, ratio, out=ours)
        if tensor.shape and not torch.equal(ours, theirs):  # a counter may have counted on
            raise ModelError(
                f"{name!r} is of {tensor.dtype} and differs: quantised weights have no average; give both models whole"
            )
        return ours


def folder_of(model: str | Path) -> Path:
    """The folder of a checkpoint: itself, a pair's or run's reasoner, or what the hub has. Raises `ModelError`."""
    name = resolve(str(model)).reasoner if is_pair(str(model)) else str(model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name!r} is no folder, and cannot be fetched from the hub: {error}") from error


class _Stretch(NamedTuple):
    """Pieces of a tensor that lie one after the other."""

    name: str
    tensor: Stored
    pieces: list[slice]


Reader = Callable[[slice, torch.Tensor], torch.Tensor]  # rows of the tuned model, in the dtype of the base model's


class _Tuned(Protocol):
    def reader(self, name: str) -> AbstractContextManager[Reader]:
        """What reads rows of the tuned model's tensor, given the base model's."""


class _Whole:
    """A tuned model with all its weights. Raises `ModelError` unless it has the tensors of the base model."""

    def __init__(self, folder: Path, base: Path, tensors: Mapping[str, Stored]) -> None:
        self._tensors = stored(folder)
        for name in [*tensors, *self._tensors]:
            here, there = tensors.get(name), self._tensors.get(name)
            if here is None or there is None:
                raise ModelError(
                    f"{name!r} is in {base if here else folder} alone, not in {folder if here else base}: only models "
                    "of one architecture, saved in the same way, have an average"
                )
            if (here.dtype, here.shape) != (there.dtype, there.shape):
                raise ModelError(
                    f"{name!r} is {here} in {base}, but {there} in {folder}: only like tensors can be averaged"
                )

    @contextmanager
    def reader(self, name: str) -> Iterator[Reader]:
        with reader(self._tensors[name]) as rows:
            yield lambda which, base: rows(which)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads, each of which computes alone."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(WORKERS, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _reserve(file: Path, size: int) -> None:
    """Take the file's room on the disk at once: it fails before any work is done, and piece by piece is slower."""
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)


def _uniform(base_weight: float) -> float:
    if isinstance(base_weight, bool) or not 0 <= base_weight <= 1:
        raise InputError(f"base_weight={base_weight!r}: give a number from 0 (the tuned model) to 1 (the base model)")
    return 1 - base_weight


def _is_companion(file: Path) -> bool:
    """A file that a checkpoint has beside its weights."""
    return file.is_file() and not (
        file.suffix in WEIGHTS or file.name.endswith(".index.json") or file.name == ADAPTER_CONFIG
    )
