"""The pictures and the clip that come along, each with wishes that show what it is good for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def _folder() -> Path:
    """`examples/` of the installed package, or of the checkout that it is installed from."""
    installed = _PACKAGE / "examples"
    return installed if installed.is_dir() else _PACKAGE.parent / "examples"


FOLDER = _folder()


@dataclass(frozen=True)
class Sample:
    """A bundled file and what to ask about it; the first wish is the best one."""

    file: str
    wishes: tuple[str, ...]

    @property
    def path(self) -> Path:
        return FOLDER / self.file


PICTURES = (
    Sample("kitchen.png", ("I am thirsty", "I want to read", "I need something to cook with", "it is raining")),
    Sample("desk.png", ("it is too dark", "I want to send a letter", "something to eat", "it is raining")),
    Sample("park.png", ("it is raining", "I want to fly something", "I want to make music", "I am thirsty")),
    Sample("workshop.png", ("something sharp", "my finger is bleeding", "I want to make music", "I am thirsty")),
)
CLIP = Sample("walk.mp4", ("something to eat", "it is raining"))
