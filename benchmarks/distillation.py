"""What keeping a teacher's distributions costs: `distill.cache` against a plain forward pass over the same batches.

    python -m benchmarks.distillation

The built-in reasoner reads conversations about scenes (`picto.talks`), in turn by a plain pass, whose logits are thrown
away, and by the stage, which keeps the likeliest tokens and tails of each and writes them to shards. Both read the same
pictures and make the same batches. Writes `benchmarks/results/distillation.json` and `distillation.md`.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
SEED = 51  # of the scenes


def main(
    scenes: Annotated[int, typer.Option(help="Scenes, with a conversation each.")] = 96,
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 5,
    k: Annotated[int, typer.Option("--k", help="Tokens of each distribution that are kept.")] = 5,
) -> None:
    """Measure, and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        row = measured(Path(folder), scenes, repeats, k)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "distillation.json").write_text(json.dumps(row, indent=2) + "\n")
    (RESULTS / "distillation.md").write_text(table(row) + "\n")
    print(table(row))


def measured(folder: Path, scenes: int, repeats: int, k: int) -> dict[str, Any]:
    import torch

    from finetune.data.records import load_records
    from finetune.distill import teacher
    from finetune.picto import talks

    talks.run(talks.Config(stage="picto.talks", seed=SEED, scenes=scenes, output=folder / "talks"))
    records = load_records(folder / "talks")
    config = teacher.Config(model="picto", train=folder / "talks", output=folder / "cache", k=k)
    local = teacher.Local(config, torch.device("cpu"))
    tokens = 0

    def plain() -> None:
        for batch, _ in local.batches(records):
            local.logits(batch)

    def cached() -> None:
        nonlocal tokens
        rows = {place: row for place, *row in local.read(records, torch.Generator())}
        teacher.write_rows(folder / "shard.safetensors", [rows[i] for i in range(len(records))], local.vocabulary)
        tokens = sum(len(row[0]) for row in rows.values())

    plain()  # the first pass is slower
    seconds: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(repeats):
        for name, contender in (("plain", plain), ("cached", cached)):
            seconds[name].append(_seconds(contender))
    size = (folder / "shard.safetensors").stat().st_size
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "records": len(records),
        "tokens": tokens,
        "k": k,
        "vocabulary": local.vocabulary,
        "seconds": seconds,
        "throughput": median(seconds["plain"]) / median(seconds["cached"]),
        "bytes_per_token": size / tokens,
        "dense_bytes_per_token": 2 * local.vocabulary,
    }


def _seconds(contender: Callable[[], None]) -> float:
    began = time.perf_counter()
    contender()
    return time.perf_counter() - began


def table(row: dict[str, Any]) -> str:
    lines = ["| | learned tokens/s | against a plain pass | bytes/token |", "|---|---:|---:|---:|"]
    plain, cached = (row["tokens"] / median(row["seconds"][name]) for name in ("plain", "cached"))
    lines.append(f"| plain forward pass | {plain:,.0f} | 1.00 | {row['dense_bytes_per_token']:,} if it kept all |")
    lines.append(
        f"| `distill.cache`, k = {row['k']} | {cached:,.0f} | {row['throughput']:.2f} | {row['bytes_per_token']:.1f} |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
