"""Several processes of one run, as `accelerate launch` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> PartialState:
    """Which process this is, and of how many.

    accelerate sees others on a machine without a GPU only where it is told so; each would take itself for the only one.
    """
    from accelerate import PartialState

    from detgpt.device import choose_device

    return PartialState(cpu=choose_device(None).type == "cpu")


@contextmanager
def parted() -> Iterator[None]:
    """Under a launcher, let processes that are done end together: one that a faster one leaves alone would crash."""
    yield
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
