"""DetGPT: detect what you need by saying why you need it.

    import detgpt
    result = detgpt.detect("kitchen.jpg", "I want a cold beverage")
    result.draw().save("out.png")

Reads best in this order: `pipeline.py` (the method), `results.py` (what comes out), `answer.py` (how the reasoner's
text becomes targets), then one backend in `reasoners/` and one in `detectors/`. Importing this package is cheap:
torch and transformers load with the first model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detgpt.errors import DetGPTError, ImageError, InputError, MissingExtraError, ModelError
    from detgpt.guards import Verdict
    from detgpt.guards.protector import Protector
    from detgpt.guards.served import ServedGuard
    from detgpt.pipeline import Chat, DetGPT, Options, detect
    from detgpt.reasoners.openai import OpenAIReasoner
    from detgpt.results import Detections, Target

_HOMES = {
    "detect": "detgpt.pipeline",
    "DetGPT": "detgpt.pipeline",
    "Chat": "detgpt.pipeline",
    "Options": "detgpt.pipeline",
    "Detections": "detgpt.results",
    "Target": "detgpt.results",
    "Protector": "detgpt.guards.protector",
    "ServedGuard": "detgpt.guards.served",
    "Verdict": "detgpt.guards",
    "OpenAIReasoner": "detgpt.reasoners.openai",
    "DetGPTError": "detgpt.errors",
    "ImageError": "detgpt.errors",
    "InputError": "detgpt.errors",
    "MissingExtraError": "detgpt.errors",
    "ModelError": "detgpt.errors",
}

__all__ = [
    "Chat",
    "DetGPT",
    "DetGPTError",
    "Detections",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "OpenAIReasoner",
    "Options",
    "Protector",
    "ServedGuard",
    "Target",
    "Verdict",
    "__version__",
    "detect",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detgpt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
