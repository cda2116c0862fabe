"""What visitors think of answers: a thumb each, appended to a file, to train from later.

    clicks/
      clicks.jsonl           a click a line
      images/1f3a….png       the pictures, each once

    {"id": "9c0e…", "image": "images/1f3a….png", "instruction": "I am thirsty", "history": [],
     "answer": "A desk. …", "model": "picto", "thumb": "up", "time": "2026-05-04T10:11:12+00:00"}

`id` is random and tells answers apart, so that of several clicks on one the last counts; `thumb` null takes it back.
Nothing is kept of who clicked, nor the picture's name. `detgpt-finetune data convert clicks OUT --format clicks` makes
preferences of it.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal
from uuid import uuid4

from PIL import Image

from detgpt import terminal
from detgpt.errors import InputError
from detgpt.images import image_key
from detgpt.reasoners import Turn

CLICKS_FILE = "clicks.jsonl"
IMAGES = "images"

Thumb = Literal["up", "down"]


@dataclass(frozen=True)
class Answer:
    """An answer of `model` that can be clicked on: the turn, and those before it."""

    turn: Turn
    history: tuple[Turn, ...]
    model: str
    id: str = field(default_factory=lambda: uuid4().hex)


class Clicks:
    """The clicks in a folder, which is made here. Safe to add to from several threads.

    Raises `InputError` where the folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        try:
            (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
            with (self.folder / CLICKS_FILE).open("ab"):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, picture: Image.Image, answer: Answer, thumb: Thumb | None) -> None:
        """Keep a click on an answer about `picture` (RGB), and the picture if it is new; None takes a click back."""
        name = f"{IMAGES}/{image_key(picture)}.png"
        row = {
            "id": answer.id,
            "image": name,
            "instruction": answer.turn.instruction,
            "history": [asdict(turn) for turn in answer.history],
            "answer": answer.turn.answer,
            "model": answer.model,
            "thumb": thumb,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if not (self.folder / name).is_file():
                with terminal.replacing(self.folder / name) as partial:
                    picture.save(partial)
            self._append(line)

    def _append(self, line: bytes) -> None:
        """All of the line or, on a full disk, none of it."""
        try:
            with (self.folder / CLICKS_FILE).open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                written = file.write(line)
                if written < len(line):
                    file.truncate(before)
                    raise OSError("no space left")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"cannot store clicks in {self.folder}: {error.strerror or error}. Choose another folder.")
