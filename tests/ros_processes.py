"""Processes of a ROS system under test: start them, read what they print, kill them, and clean up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NODES = Path(__file__).with_name("ros_nodes.py")


class Process:
    """A process whose output is a file, so that a full pipe never stops it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def messages(self, topic: str) -> list[dict[str, Any]]:
        """What a listener printed about this topic, oldest first."""
        whole = self.text.rpartition("\n")[0].split("\n")  # the last line may be half written
        found = (json.loads(line) for line in whole if line.startswith("{"))
        return [message for message in found if message["topic"] == topic]

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGINT, seconds: float = 60) -> int:
        """Its exit status."""
        if self.is_running():
            os.killpg(self._process.pid, how)
        if how == signal.SIGKILL:
            self._kill_children()
        return self._process.wait(seconds)

    def _kill_children(self) -> None:
        """Those that roscore says it started: each is a group of its own, so they would outlive it."""
        for child in re.findall(r"started with pid \[(\d+)\]", self.text):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


class System:
    """All processes of one test."""

    def __init__(self, version: int, python: Path | str, environment: dict[str, str], folder: Path) -> None:
        self.version, self.python, self.environment, self.folder = version, str(python), environment, folder
        self._processes: list[Process] = []

    def run(self, *command: str) -> Process:
        log = self.folder / f"{len(self._processes)}-{Path(command[0]).name}.log"
        process = Process(list(command), self.environment, log)
        self._processes.append(process)
        return process

    def node(self, *arguments: object) -> Process:
        """One of `ros_nodes.py`."""
        return self.run(self.python, str(NODES), str(self.version), *map(str, arguments))

    def listen(self) -> Process:
        listener = self.node("listen")
        until(lambda: listener.messages("listening"), listener)
        return listener

    def finish(self) -> None:
        for process in reversed(self._processes):
            process.stop(signal.SIGKILL)


def until(happened: Callable[[], Any], *shown: Process, seconds: float = 90) -> Any:
    """What it gave when it first was true; fails with the output of `shown` where it never is."""
    deadline = time.monotonic() + seconds
    while True:
        result = happened()
        if result:
            return result
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {process.log.name}\n{process.text[-3000:]}" for process in shown)
            raise AssertionError(f"it did not happen in {seconds} s\n{tails}")
        time.sleep(0.1)


def python_path(*more: Path) -> str:
    root = NODES.parents[1]
    return os.pathsep.join(str(path) for path in (*more, root / "ros", root))


PYTHON = sys.executable
