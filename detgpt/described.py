"""What a dataclass says of its fields: command-line helps and API documents are made from it."""

from __future__ import annotations

import inspect
import re


def described(kind: type) -> dict[str, str]:
    """Field name → what the docstring of `kind` says of it, from its lines `name: what it is`."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return {name: " ".join(said.split()) for name, said in re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", text, re.MULTILINE)}
