"""What batching across clients brings: `detgpt serve` beside the same service with one request at a time.

    python -m benchmarks.serving --requests 96 --rounds 3

Writes `benchmarks/results/serving.json` and `serving.md`. Both services run from start to end and take turns, so that
they meet the same machine; each client sends its next request when the last is answered. The limit is the rate of
`DetGPT.detect_batch` alone, on the same pictures and wishes in batches of the same size, between the same turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

RESULTS = Path(__file__).parent / "results"
PICTURES = sorted((Path(__file__).parent.parent / "examples").glob("*.png"))
WISHES = ["I am thirsty", "It is raining", "My finger is bleeding", "I want to write something down"]
CLIENTS = (1, 4, 16)
START = """
import json, sys
from detgpt import DetGPT
from detgpt.serve import Serving, run
run(lambda: DetGPT.from_pretrained("picto"), Serving(**json.loads(sys.argv[1])))
"""


@contextlib.contextmanager
def service(**settings: Any) -> Iterator[str]:
    """A service in a process of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", START, json.dumps({"port": port, **settings})]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError("the service did not start: nothing was measured")
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/ready").raise_for_status()
                break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def asked(number: int) -> list[tuple[bytes, str]]:
    """So many different requests: every wish about every picture, again and again."""
    pairs = itertools.cycle((path.read_bytes(), wish) for wish in WISHES for path in PICTURES)
    return list(itertools.islice(pairs, number))


async def load(url: str, clients: int, requests: list[tuple[bytes, str]]) -> tuple[float, list[float]]:
    """Seconds in which so many clients got all requests answered, and the seconds of each request."""
    left, latencies = iter(requests), []

    async def client(http: httpx.AsyncClient) -> None:
        for image, wish in left:
            start = time.perf_counter()
            response = await http.post("/v1/detect", files={"image": image}, data={"instruction": wish})
            response.raise_for_status()
            latencies.append(time.perf_counter() - start)

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - start, latencies


def alone(model: Any, requests: list[tuple[bytes, str]], batch: int) -> float:
    """Seconds of `detect_batch` for all requests."""
    start = time.perf_counter()
    for first in range(0, len(requests), batch):
        model.detect_batch(requests[first : first + batch])
    return time.perf_counter() - start


def measure(requests: int, rounds: int, batch: int) -> dict[str, Any]:
    import detgpt

    sent, model = asked(requests), detgpt.DetGPT.from_pretrained("picto")
    seconds: dict[tuple[str, int], float] = dict.fromkeys(itertools.product(("batched", "single"), CLIENTS), 0.0)
    latencies: dict[tuple[str, int], list[float]] = {key: [] for key in seconds}
    limit = 0.0
    with service(max_batch=batch) as batched, service(max_batch=1, max_wait=0) as single:
        urls = {"batched": batched, "single": single}
        for url in urls.values():
            asyncio.run(load(url, batch, asked(2 * batch)))  # warm up
        alone(model, asked(batch), batch)
        for _ in range(rounds):
            for clients, served in itertools.product(CLIENTS, urls):
                took, each = asyncio.run(load(urls[served], clients, sent))
                seconds[served, clients] += took
                latencies[served, clients] += each
            limit += alone(model, sent, batch)
    rows: list[dict[str, Any]] = [
        {
            "served": served,
            "clients": clients,
            "requests_per_second": rounds * requests / seconds[served, clients],
            **{f"p{n}": statistics.quantiles(latencies[served, clients], n=100)[n - 1] for n in (50, 95, 99)},
        }
        for clients, served in itertools.product(CLIENTS, urls)
    ]
    rate = {(row["served"], row["clients"]): row["requests_per_second"] for row in rows}
    most = CLIENTS[-1]
    tail = next(row["p99"] / row["p50"] for row in rows if (row["served"], row["clients"]) == ("batched", most))
    return {
        "rows": rows,
        "max_batch": batch,
        "detect_batch_per_second": rounds * requests / limit,
        "times_single": rate["batched", most] / rate["single", most],
        "share_of_detect_batch": rate["batched", most] / (rounds * requests / limit),
        "p99_over_p50": tail,
    }


def markdown(measured: dict[str, Any]) -> str:
    names = {"batched": f"batches of up to {measured['max_batch']}", "single": "one at a time"}
    lines = ["| clients | served | requests/s | p50 | p95 | p99 |", "|---:|---|---:|---:|---:|---:|"]
    for row in measured["rows"]:
        times = " | ".join(f"{row[name]:.2f} s" for name in ("p50", "p95", "p99"))
        lines.append(f"| {row['clients']} | {names[row['served']]} | {row['requests_per_second']:.2f} | {times} |")
    lines.append(f"|  | `detect_batch` alone | {measured['detect_batch_per_second']:.2f} |  |  |  |")
    return "\n".join(
        [
            *lines,
            "",
            f"With {CLIENTS[-1]} clients: {measured['times_single']:.2f} times the rate of one at a time, "
            f"{measured['share_of_detect_batch']:.0%} of the rate of `detect_batch` alone, "
            f"p99 {measured['p99_over_p50']:.2f} times p50.",
        ]
    )


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests per turn.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
    batch: Annotated[int, typer.Option(min=2, help="Largest batch.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write the table."""
    measured = measure(requests, rounds, batch)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    output.mkdir(parents=True, exist_ok=True)
    (output / "serving.json").write_text(json.dumps({**measured, **machine}, indent=2) + "\n")
    heading = f"`python -m benchmarks.serving` on {machine['cpus']} cores ({machine['machine']}), built-in model:"
    (output / "serving.md").write_text(f"{heading}\n\n{markdown(measured)}\n")
    print(markdown(measured))


if __name__ == "__main__":
    typer.run(main)
