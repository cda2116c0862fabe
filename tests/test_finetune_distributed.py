"""The same command in several processes gives the same losses: two on this machine's CPU, connected by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "finetune" / "configs"


def losses(folder: Path, *how: str, launcher: str | None = None) -> list[float]:
    """Of tests/distributed_run.py, in this machine's Python or by `accelerate launch` with a configuration."""
    start = [sys.executable]
    if launcher:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        start = [*accelerate, "--config_file", str(CONFIGS / f"{launcher}.yaml"), "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [*start, str(HERE / "distributed_run.py"), str(folder), *how]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout.decode()
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "lisa", "l2", "distill"])
def test_two_processes_train_as_one_does(tmp_path: Path, how: str) -> None:
    """Packed batches drawn by length, with progress and watch; with LISA other layers are frozen every three steps."""
    alone = losses(tmp_path / "alone", how)
    together = losses(tmp_path / "together", how, launcher="ddp")
    assert len(alone) == 10 and alone[-1] < 0.97 * alone[0]
    assert together == pytest.approx(alone, rel=1e-4)
