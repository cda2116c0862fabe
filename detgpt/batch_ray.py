"""Many images on many machines: `batch.run` on a Ray cluster.

    detgpt batch photos/ -i "I am thirsty" -o found.jsonl --ray auto

Ray Data deals the batches out to a pool of workers, each with a model of its own, and gives those of a lost machine
to others. What a worker does with a batch, and the log that an interrupted run goes on from, are `batch.py`'s. Paths
mean on every machine what they mean here, so all need the folder that this is started in.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from detgpt.batch import READERS, Job, Outcome, Progress, answer, read, write
from detgpt.cluster import Cluster, connected, shared_out
from detgpt.errors import DetGPTError, MissingExtraError
from detgpt.pipeline import DetGPT

BLOCKS = 10_000  # a block holds one batch, or several once there would be more of them than Ray's scheduler likes


def run(
    load: Callable[[], DetGPT],
    jobs: Sequence[Job],
    output: Path,
    cluster: Cluster,
    *,
    batch_size: int = 8,
    device: str | None = None,
    debug: bool = False,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """`batch.run`, with the same output, by workers that each call `load`; `device` is the one that it loads onto.

    Raises what `batch.run`, `cluster.connected` and `cluster.shared_out` raise; `DetGPTError` where Ray gives up.
    """

    def answers(todo: Sequence[Job]) -> Iterator[list[dict[str, Any]]]:
        with connected(cluster, debug):
            replicas, reserved = shared_out(cluster.ray_replicas, device)
            yield from _answers(load, todo, batch_size, replicas, reserved, debug)

    return write(jobs, output, answers, progress)


def _answers(
    load: Callable[[], DetGPT],
    jobs: Sequence[Job],
    batch_size: int,
    replicas: int,
    reserved: dict[str, Any],
    debug: bool,
) -> Iterator[list[dict[str, Any]]]:
    """The records of each batch, whichever is done first."""
    from ray.exceptions import RayError, RayTaskError

    try:
        import ray.data
    except ImportError as error:  # Ray is there, but without what its Data needs
        raise MissingExtraError(error.name or "ray", "ray") from error

    if not debug:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    left = iter(jobs)
    batches = iter(lambda: [job.record() for job in itertools.islice(left, batch_size)], [])
    rows = [{"jobs": json.dumps(batch)} for batch in batches]
    pool = ray.data.ActorPoolStrategy(
        size=replicas,
        max_concurrent_calls_per_actor=2,  # one batch is read while the other is in the models
        enable_true_multi_threading=True,
    )
    answered = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map(
        _Worker,  # type: ignore[arg-type]  # Ray's own type for classes asks for what its documents do not
        fn_constructor_args=(load, Path.cwd()),
        compute=pool,
        **reserved,
    )
    try:
        for row in answered.iter_rows():
            yield json.loads(row["records"])
    except RayTaskError as error:
        if isinstance(error.cause, DetGPTError):
            raise error.cause from error
        raise
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DetGPTError(f"Ray gave up: {reason} What is done is kept: start the job again.") from error


class _Worker:
    """Answers batches, in a process of its own somewhere in the cluster."""

    def __init__(self, load: Callable[[], DetGPT], folder: Path) -> None:
        os.chdir(folder)
        self._load = load
        self._model: DetGPT | None = None
        self._readers = ThreadPoolExecutor(READERS, "detgpt-read")
        self._thread = ThreadPoolExecutor(1, "detgpt-model")  # always the same one, which torch likes best

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = list(self._readers.map(read, map(Job.of, json.loads(row["jobs"]))))
        return {"records": json.dumps(self._thread.submit(self._answer, batch).result())}

    def _answer(self, batch: Sequence[Any]) -> list[dict[str, Any]]:
        if self._model is None:  # only here, because what a constructor raises comes back as a text
            self._model = self._load()
        return answer(self._model, batch)
