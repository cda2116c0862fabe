"""The errors that DetGPT raises on purpose.

    Exception
    └── DetGPTError
        ├── InputError (also ValueError)          a wrong argument: a threshold of 7, an empty instruction
        │   ├── ImageError                        the image cannot be read or fetched, or is over a limit
        │   └── UnreadableNameError               the detector cannot read a name: too long, an unknown script
        ├── ModelError                            a checkpoint does not load, or a server does not answer
        ├── TrainingError                         a training run cannot go on: a loss of NaN, a full disk
        │   └── StoppedError                      it was told to stop, and has saved where it is
        └── MissingExtraError (also ImportError)  an optional package is not installed

Callers' mistakes raise; a model's mistakes do not: a malformed answer is data, see `Detections.problem`.
"""

from __future__ import annotations

__all__ = [
    "DetGPTError",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "StoppedError",
    "TrainingError",
    "UnreadableNameError",
]


class DetGPTError(Exception):
    """Base of every error that the library raises on purpose."""


class InputError(DetGPTError, ValueError):
    """An argument is wrong; the message names it, what was expected and what came."""


class ImageError(InputError):
    """The image cannot be read or fetched, or is over a limit."""


class UnreadableNameError(InputError):
    """The detector cannot read a name; the message says why.

    Raised for a caller's names. A reasoner's go into `Detections.problem`, and the others are looked for.

    Args:
        name: the name.
        message: what is wrong with it, and the remedy.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[type[UnreadableNameError], tuple[str, str]]:
        return type(self), (self.name, str(self))


class ModelError(DetGPTError):
    """A checkpoint or model folder is missing, of the wrong kind, or does not load; or a model's server fails."""


class TrainingError(DetGPTError):
    """A training run cannot go on; the message says what is left whole, and how to go on from there."""


class StoppedError(TrainingError):
    """A training run was told to stop (SIGTERM); the same command goes on from where it is."""


class MissingExtraError(DetGPTError, ImportError):
    """An optional package is not installed; the message gives the line that installs it.

    Args:
        package: the package that could not be imported.
        extra: the extra of DetGPT that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'detgpt[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        # Exceptions are rebuilt from their message by default; worker processes send this one back whole.
        return type(self), (self.package, self.extra)
