"""A model in training that is asked something in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def answering(model: Any) -> Iterator[Any]:
    """The model without dropout, and afterwards as it was."""
    training, decoding = model.training, model.generation_config
    model.eval()
    try:
        yield model
    finally:
        model.generation_config = decoding
        model.train(training)
