"""How fast two checkpoints become one: `finetune.averaging.average` beside a plain copy of a checkpoint's files.

    python -m benchmarks.averaging --gigabytes 2 --rounds 5
    python -m benchmarks.averaging --mergekit mergekit-venv/bin/mergekit-yaml

Writes `benchmarks/results/averaging.json` and `averaging.md`. Averaging reads two models and writes one, the copy reads
one and writes one; rates are of the bytes that are written. All take turns on the same files, a Llama of bf16 in
shards. Before a turn what it reads is put out of the system's cache, and the turn ends when what it wrote is on the
disk. mergekit runs as the command that it is, so ours runs as a command, too, beside it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.averaging.average import average
from finetune.averaging.mergekit import export
from finetune.averaging.weights import shards, stored

RESULTS = Path(__file__).parent / "results"
TEMPORARY = Path(tempfile.gettempdir())
BASE_WEIGHT = 0.4
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}  # of 7B
CHECKED = "model.norm.weight"  # a tensor of every result
WATCHED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
COPY, OURS = "copy", "average"
COMMAND, MERGEKIT = "detgpt-finetune average", "mergekit-yaml"


class Contender(NamedTuple):
    """reads: folders. write: makes the result in a folder that is not there yet; returns the peak memory in bytes of
    the process that it started, if it did.
    """

    reads: Sequence[Path]
    write: Callable[[Path], int | None]


def write_models(place: Path, gigabytes: float) -> tuple[Path, Path]:
    """Two models of about that size in bf16, the second a little off the first."""
    width, inner, _, words = SHAPE.values()
    ends, layer = 2 * words * width, 4 * width * width + 3 * width * inner  # parameters
    layers = max(1, round((gigabytes * 1e9 / 2 - ends) / layer))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_hidden_layers=layers), dtype=torch.bfloat16)
    base, tuned = place / "base", place / "tuned"
    model.save_pretrained(base, max_shard_size="1GB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tuned, max_shard_size="1GB")
    return base, tuned


def contenders(base: Path, tuned: Path, mergekit: Path | None) -> dict[str, Contender]:
    def copy(out: Path) -> None:
        out.mkdir()
        for file in shards(base):
            shutil.copyfile(file, out / file.name)

    def averaged(out: Path) -> None:
        average(base, tuned, out, base_weight=BASE_WEIGHT)

    found = {COPY: Contender([base], copy), OURS: Contender([base, tuned], averaged)}
    if mergekit is not None:
        merge = export(base.parent / "merge.yaml", base, tuned, 1 - BASE_WEIGHT)
        ours = [sys.executable, "-m", "finetune.cli", "average", base, tuned, "--base-weight", str(BASE_WEIGHT)]
        theirs = [mergekit, merge, "--no-copy-tokenizer"]
        found[COMMAND] = Contender([base, tuned], lambda out: run([*ours, out]))
        found[MERGEKIT] = Contender([base, tuned], lambda out: run([*theirs[:2], out, *theirs[2:]]))
    return found


def run(command: Sequence[str | Path]) -> int:
    """Run it to its end, and return its peak memory in bytes."""
    # From a small process of its own: of a child, Linux counts the memory of the one that it was started from, too.
    ran = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed: nothing was measured\n{ran.stderr[-2000:]}")
    return int(ran.stdout.splitlines()[-1]) << 10  # KiB on Linux


def turn(contender: Contender, out: Path) -> tuple[float, int | None]:
    """Seconds from files on the disk to a file on the disk, and the peak memory of a command."""
    for folder in contender.reads:
        for file in shards(folder):
            flushed(file, forget=True)
    start = time.perf_counter()
    memory = contender.write(out)
    for file in out.iterdir():
        flushed(file)
    return time.perf_counter() - start, memory


def flushed(file: Path, *, forget: bool = False) -> None:
    """Wait until the file is on the disk; forget: and put it out of the cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        if forget:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(name: str, out: Path, base: Path, tuned: Path) -> None:
    """Raises RuntimeError unless `out` holds what the contender should have made."""
    before, after, found = (_tensor(folder, CHECKED) for folder in (base, tuned, out))
    expected = before if name == COPY else BASE_WEIGHT * before + (1 - BASE_WEIGHT) * after
    if not torch.allclose(found, expected, rtol=torch.finfo(torch.bfloat16).eps):
        raise RuntimeError(f"{name} made another model: nothing was measured")


def _tensor(folder: Path, name: str) -> torch.Tensor:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name).float()
    raise RuntimeError(f"{folder} has no {name}: nothing was measured")


def measure(place: Path, gigabytes: float, rounds: int, mergekit: Path | None) -> dict[str, Any]:
    base, tuned = write_models(place, gigabytes)
    size = sum(tensor.bytes for tensor in stored(base).values())
    racing = contenders(base, tuned, mergekit)
    seconds: dict[str, list[float]] = {name: [] for name in racing}
    memory: dict[str, int] = {}
    for number in range(rounds):
        names = list(racing)
        for name in names if number % 2 else reversed(names):
            took, used = turn(racing[name], place / "out")
            check(name, place / "out", base, tuned)
            shutil.rmtree(place / "out")
            seconds[name].append(took)
            if used is not None:
                memory[name] = max(used, memory.get(name, 0))
            print(f"round {number + 1} of {rounds}: {name} {took:.2f} s, {size / took / 1e9:.2f} GB/s", flush=True)
    pairs = [(OURS, COPY)] + ([(COMMAND, MERGEKIT)] if mergekit else [])
    return {
        "bytes": size,
        "rounds": rounds,
        "seconds": seconds,
        "gigabytes_per_second": {name: size / statistics.median(took) / 1e9 for name, took in seconds.items()},
        "peak_memory": memory,
        "ratios": {
            f"{ours} / {theirs}": [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
            for ours, theirs in pairs
        },
    }


def markdown(measured: dict[str, Any]) -> str:
    lines = ["| | GB/s written, median | seconds, fastest to slowest | peak memory |", "|---|---:|---:|---:|"]
    for name, rate in measured["gigabytes_per_second"].items():
        took, used = measured["seconds"][name], measured["peak_memory"].get(name)
        memory = f"{used / 1e9:.2f} GB" if used is not None else ""
        lines.append(f"| {name} | {rate:.2f} | {min(took):.2f} to {max(took):.2f} | {memory} |")
    said = [
        f"{pair}: {statistics.median(found):.2f} times as fast (median of {len(found)} rounds, {min(found):.2f} to "
        f"{max(found):.2f})."
        for pair, found in measured["ratios"].items()
    ]
    return "\n".join([*lines, "", *said])


def main(
    gigabytes: Annotated[float, typer.Option(min=1, help="Size of each model.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    mergekit: Annotated[Path | None, typer.Option(help="mergekit-yaml, to race against.", exists=True)] = None,
    place: Annotated[Path, typer.Option(help="Where the models go meanwhile.")] = TEMPORARY,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write the table."""
    room, needed = shutil.disk_usage(place).free, 3.3e9 * gigabytes
    if room < needed:
        raise typer.BadParameter(f"{place} has {room / 1e9:.1f} GB left, and three models take {needed / 1e9:.1f}")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        measured = measure(Path(folder), gigabytes, rounds, mergekit)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "averaging.json").write_text(json.dumps({**measured, **machine}, indent=2) + "\n")
    heading = (
        f"`python -m benchmarks.averaging` on {machine['cores']} core(s) ({machine['machine']}), two models of "
        f"{measured['bytes'] / 1e9:.2f} GB, from files that are not in the cache to files on the disk. Averaging reads "
        "two models and writes one, the copy reads one and writes one. The time of a command is that of a process, "
        "which loads Python and torch first."
    )
    (output / "averaging.md").write_text(f"{heading}\n\n{markdown(measured)}\n")
    print(markdown(measured))


if __name__ == "__main__":
    typer.run(main)
