"""Which device a model runs on."""

from __future__ import annotations

import torch

from detgpt.errors import InputError


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device`, checked; for None the GPU where there is one, else the CPU.

    Raises `InputError` for a device that torch does not know or that this machine lacks.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"device={str(device)!r} cannot be used: {reason}. Give cpu, or cuda on a GPU") from error
