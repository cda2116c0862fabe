"""The service on several machines: `detgpt serve --ray`.

    detgpt serve --ray auto --ray-replicas 4

Ray Serve listens on every machine that holds a copy of the model and passes each request to a copy that has little to
do. A copy is the whole service of `app.py`, with its own queue and its own batches; Ray's batching is not used, for
the reason that `docs/serve.md` gives.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detgpt.cluster import Cluster, connected, shared_out
from detgpt.errors import DetGPTError, InputError, MissingExtraError
from detgpt.serve import Serving, create_app, warn_of_strangers

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from detgpt.pipeline import DetGPT

NAME = "detgpt"  # of the application within Ray Serve


def run(
    load: Callable[[], DetGPT],
    serving: Serving,
    cluster: Cluster,
    *,
    device: str | None = None,
    debug: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C, which let running requests finish; `device` is what each copy's `load` asks for.

    Raises what `cluster.connected` and `cluster.shared_out` raise; `DetGPTError` where the service does not start.
    """
    if serving.port == 0:
        raise InputError("port=0: on a Ray cluster all machines listen on the same port: name one")
    with connected(cluster, debug):
        try:
            from ray import serve
        except ImportError as error:  # Ray is there, but without what its Serve needs
            raise MissingExtraError(error.name or "ray", "ray") from error
        if not debug:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
        replicas, reserved = shared_out(cluster.ray_replicas, device)
        warn_of_strangers(serving)
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": serving.host, "port": serving.port})
            serve.run(application(load, serving, replicas, reserved), name=NAME)
        except (RuntimeError, TimeoutError) as error:  # of the copies, or of a machine that is too busy to start them
            raise DetGPTError(f"the service does not start: {error}") from error
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            print(f"{replicas} copies of the model answer on http://{serving.host}:{serving.port}", file=sys.stderr)
            threading.Event().wait()
        finally:
            with contextlib.suppress(TimeoutError):  # after a minute, which a request may take longer than
                serve.delete(NAME)
            while NAME in serve.status().applications:
                time.sleep(0.2)


def application(load: Callable[[], DetGPT], serving: Serving, replicas: int, reserved: dict[str, Any]) -> Application:
    """What Ray Serve runs: `replicas` of the service, for each of which `reserved` is set aside."""
    from ray import serve

    folder = Path.cwd()

    def build() -> FastAPI:
        os.chdir(folder)  # a path means on every machine what it means here
        return create_app(load(), serving)

    deployed = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        ray_actor_options=reserved,
        # Our own queue refuses what is too much, with 429; Ray is only to let that, and /ready, through.
        max_ongoing_requests=2 * (serving.queue + serving.max_batch),
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=serving.timeout + 5,  # every request has ended by then
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployed(serve.ingress(build)()).bind()
