"""The files of an original Grounding DINO checkpoint: a config .py and weights .pth. Neither can run code here."""

from __future__ import annotations

import ast
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import torch

from detgpt.errors import ModelError


def read_config(path: str | Path) -> SimpleNamespace:
    """The settings of an original config: a Python file of plain `name = literal` lines, read and not run.

    Raises `ModelError` when the file cannot be read or holds something else.
    """
    try:
        lines = ast.parse(Path(path).read_text(encoding="utf-8")).body
        settings = {
            target.id: ast.literal_eval(line.value)
            for line in lines
            if isinstance(line, ast.Assign) and isinstance(target := line.targets[0], ast.Name)
        }
    except (OSError, SyntaxError, ValueError) as error:
        raise ModelError(
            f"Cannot read the Grounding DINO config {path}: {error}. It must be a Python file of plain "
            "assignments such as GroundingDINO_SwinT_OGC.py, which the package has in groundingdino/config."
        ) from error
    return SimpleNamespace(**settings)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an original checkpoint by the package's names, unpickled as tensors only.

    Raises `ModelError` when the file cannot be read or is of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError("it holds something that is no tensor")
        # Training on several devices puts "module." before every name.
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except (OSError, EOFError, RuntimeError, UnpicklingError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"Cannot load the Grounding DINO weights {path}: {error}. It must be an original checkpoint, a "
            "dictionary of tensors under the key 'model'."
        ) from error
