"""How long a wish takes, cold and warm, and how the time and memory divide: `make bench`.

    python -m benchmarks.speed --repeats 20

Writes `benchmarks/results/speed.json` and `speed.md`. The parts are timed inside the same calls as the whole, so
their shares are of one run; the cold start is a fresh process of the command line.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "examples" / "kitchen.png"
WISH = "I am thirsty"


class Timed:
    """A part of the pipeline that passes its calls on and adds up their seconds."""

    def __init__(self, part: Any, verb: str):
        self._part, self._verb = part, verb
        self.name = part.name
        self.seconds = 0.0

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._part, attribute)
        if attribute != self._verb:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def measure_warm(repeats: int) -> dict[str, float]:
    """Seconds of `detect` on a loaded model (median), and the shares of its parts."""
    import detgpt

    loaded = detgpt.DetGPT.from_pretrained("picto")
    reasoner, detector = Timed(loaded.reasoner, "reason"), Timed(loaded.detector, "detect")
    model = detgpt.DetGPT(reasoner=reasoner, detector=detector, options=loaded.options)
    model.detect(PICTURE, WISH)
    reasoner.seconds = detector.seconds = 0.0
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.detect(PICTURE, WISH)
        walls.append(time.perf_counter() - start)
    total = sum(walls)
    return {
        "warm_seconds_median": statistics.median(walls),
        "warm_seconds_max": max(walls),
        "share_reasoner": reasoner.seconds / total,
        "share_detector": detector.seconds / total,
        "share_rest": (total - reasoner.seconds - detector.seconds) / total,
    }


def measure_cold() -> dict[str, float]:
    """Wall time and peak memory of one `detgpt detect` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "out.png"
        command = [Path(sys.executable).with_name("detgpt"), "detect", PICTURE, WISH, "-o", picture]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        if not picture.is_file():
            raise RuntimeError("detgpt detect wrote no picture: nothing was measured")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    return {"cold_seconds": seconds, "cold_peak_gib": peak}


def main(repeats: Annotated[int, typer.Option(help="Warm calls.")] = 20) -> None:
    """Measure and write the table."""
    cold = [measure_cold() for _ in range(2)][-1]  # the first one also fills the disk cache
    measured = {**cold, **measure_warm(repeats)}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps({**measured, **machine}, indent=2) + "\n")
    rows = [
        ("process start to result", f"{measured['cold_seconds']:.2f} s"),
        ("peak memory of that process", f"{measured['cold_peak_gib']:.2f} GiB"),
        ("warm `detect`, median", f"{measured['warm_seconds_median']:.3f} s"),
        ("of which the reasoner", f"{measured['share_reasoner']:.0%}"),
        ("of which the detector", f"{measured['share_detector']:.0%}"),
        ("of which the rest", f"{measured['share_rest']:.0%}"),
    ]
    table = "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    (RESULTS / "speed.md").write_text(
        f"`make bench` on {machine['cpus']} cores ({machine['machine']}), built-in model:\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    typer.run(main)
