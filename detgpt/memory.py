"""Out of memory, said in terms of what a user can choose instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size

from detgpt.errors import ModelError

# What accelerate does not list: no memory left to map a file, Windows' wording, cuBLAS without a workspace.
ALSO_MEMORY = ("Cannot allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def explained_when_short_of_memory(name: str, remedies: str) -> Iterator[None]:
    """Turn running out of the GPU's or the machine's memory into a `ModelError` that names the remedies."""
    try:
        yield
    except Exception as error:
        if not _is_short_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{name!r} does not fit into memory: {reason}\nChoose {remedies}.") from error


def _is_short_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or should_reduce_batch_size(error)
        or any(words in str(error) for words in ALSO_MEMORY)
    )
