"""The batch job and the service on a real Ray cluster: one of this machine, with two copies of the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from test_serve import PROBLEM, free_port, png

from detgpt import DetGPT, InputError, MissingExtraError, ModelError, batch_ray
from detgpt import batch as batches
from detgpt.batch import Outcome, read_jobs
from detgpt.cluster import Cluster, connected, shared_out

if not os.environ.get("CI"):  # where it must be there
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'detgpt[ray]'")

TWO = Cluster("local", 2)
COMMAND = [sys.executable, "-c", "from detgpt.cli import main; main()"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that runs as long as these tests; this process is connected to it."""
    import ray

    with connected(TWO):
        yield ray.get_runtime_context().gcs_address
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of different sizes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(30):
        Image.new("RGB", (40 + i, 30), "gray").save(folder / f"{i:02}.png")
    (folder / "15-broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def plain(tiny_pair_folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job gives without Ray, on one thread as in a worker: more of them round otherwise."""
    output = tmp_path_factory.mktemp("plain") / "found.jsonl"
    model = DetGPT.from_pretrained(tiny_pair_folder, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert batches.run(model, read_jobs(str(photos), "drink"), output, batch_size=3) == Outcome(30, 1, 0)
    torch.set_num_threads(threads)
    return output


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def assert_same(output: Path, plain: Path) -> None:
    """The same records in the same order; boxes may differ by what other threads round."""
    for got, expected in zip(records(output), records(plain), strict=True):
        boxes, same = ([found.pop("xyxy") for found in record.get("detections", [])] for record in (got, expected))
        assert boxes == [pytest.approx(box, abs=0.02) for box in same]
        scores, same = ([found.pop("score") for found in record.get("detections", [])] for record in (got, expected))
        assert scores == pytest.approx(same, abs=1e-4)
        confidences, same = (
            [target.pop("confidence") for target in record.get("targets", [])] for record in (got, expected)
        )
        assert confidences == pytest.approx(same, abs=1e-4)
        assert got == expected


def noting(model: Path, notes: Path) -> Callable[[], DetGPT]:
    """Loads the model, and leaves a note of the process and its folder."""

    def load() -> DetGPT:
        (notes / str(os.getpid())).write_text(str(Path.cwd()))
        return DetGPT.from_pretrained(model, device="cpu")

    return load


def test_two_workers_give_the_same_output_as_none(
    address: str, tiny_pair_folder: Path, photos: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tiny_pair_folder.parent)
    load = noting(Path(tiny_pair_folder.name), tmp_path / "notes")  # a path from the folder we are in
    seen: list[tuple[int, int]] = []
    jobs = read_jobs(str(photos), "drink")
    outcome = batch_ray.run(load, jobs, tmp_path / "found.jsonl", TWO, batch_size=3, progress=lambda *p: seen.append(p))
    assert outcome == Outcome(30, 1, 0)
    assert_same(tmp_path / "found.jsonl", plain)
    assert len(list((tmp_path / "notes").iterdir())) == 2, "each of the two workers loads the model once"
    assert [note.read_text() for note in (tmp_path / "notes").iterdir()] == [str(tiny_pair_folder.parent)] * 2
    assert seen[0] == (0, 31) and seen[-1] == (31, 31) and len(seen) == 12
    assert batch_ray.run(load, jobs, tmp_path / "found.jsonl", TWO) == Outcome(0, 0, 31)


def test_a_killed_job_goes_on_without_losing_or_repeating_a_picture(
    address: str, tiny_pair_folder: Path, photos: Path, plain: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found.jsonl"
    arguments = ["-i", "drink", "-m", tiny_pair_folder, "-o", output, "--batch-size", "1", "--device", "cpu"]
    cluster = ["--ray", address, "--ray-replicas", "2"]
    started = subprocess.Popen([*COMMAND, "batch", *map(str, [photos, *arguments, *cluster])])
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert started.poll() is None
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = output.read_bytes().count(b"\n")
    assert 3 <= kept < 31
    outcome = batch_ray.run(
        lambda: DetGPT.from_pretrained(tiny_pair_folder, device="cpu"),
        read_jobs(str(photos), "drink"),
        output,
        TWO,
    )
    assert outcome.earlier == kept and outcome.answered + outcome.unreadable == 31 - kept
    assert_same(output, plain)


def test_what_goes_wrong_in_a_worker_is_raised_here_as_what_it_is(address: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    with pytest.raises(ModelError, match="no model pair '/nowhere'"):
        batch_ray.run(lambda: DetGPT.from_pretrained("/nowhere"), read_jobs(str(photos), "drink"), output, TWO)
    assert not output.exists()


def test_the_service_on_two_copies_answers_as_one(address: str, tiny_pair_folder: Path) -> None:
    model = DetGPT.from_pretrained(tiny_pair_folder, device="cpu")
    port = free_port()
    arguments = ["--ray", address, "--ray-replicas", 2, "-m", tiny_pair_folder, "--device", "cpu", "--port", port]
    process = subprocess.Popen([*COMMAND, "serve", *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(12) as pool:

        def ask(image: bytes) -> httpx.Response:
            return client.post("/v1/detect", files={"image": image}, data={"instruction": "drink"})

        try:
            told = next(line for line in process.stderr if not line.startswith("["))  # but for Ray's own log
            assert told == f"2 copies of the model answer on http://127.0.0.1:{port}\n"
            images = [png((40 + i, 30)) for i in range(12)]
            started = time.monotonic()
            responses = list(pool.map(ask, images))
            for image, response in zip(images, responses, strict=True):
                got, expected = response.json(), json.loads(model.detect(image, "drink").to_json())
                assert got["targets"][0]["name"] == "cup" and got["image_wh"] == expected["image_wh"]
                boxes, same = ([found["xyxy"] for found in answer["detections"]] for answer in (got, expected))
                assert boxes == [pytest.approx(box, abs=0.02) for box in same] and boxes
            bad = ask(b"no picture")
            assert (bad.status_code, bad.headers["content-type"]) == (422, PROBLEM)
            while len({batches_of(client) for _ in range(40)} - {None}) < 2:  # which copy answers is Ray's choice
                assert time.monotonic() < started + 60, "both copies are asked"
                list(pool.map(ask, images))

            last = [pool.submit(ask, image) for image in images]
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert [response.result().status_code for response in last] == [200] * 12  # they were under way
            assert process.wait(60) == 0
        finally:
            process.kill()
            assert process.communicate()[1] == "", "nothing else is said"
    with pytest.raises(httpx.HTTPError), httpx.Client(timeout=5) as late:
        late.get(f"http://127.0.0.1:{port}/health").raise_for_status()


def batches_of(client: httpx.Client) -> str | None:
    """When the copy that answers this began to count batches, which tells the copies apart; None before its first."""
    lines = client.get("/metrics").text.splitlines()
    if "detgpt_batch_size_count 0.0" in lines:
        return None
    return next(line for line in lines if line.startswith("detgpt_batch_size_created "))


def test_what_the_cluster_has_is_shared_out(address: str) -> None:
    import ray

    cores = int(ray.cluster_resources()["CPU"])
    assert shared_out(None, None) == (1, {"num_cpus": cores})
    assert shared_out(cores, "cpu") == (cores, {"num_cpus": 1})
    with pytest.raises(InputError, match=f"the Ray cluster has {cores} CPUs"):
        shared_out(cores + 1, None)
    with pytest.raises(InputError, match="the Ray cluster has no GPU"):
        shared_out(1, "cuda")


# ------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("settings", "says"), [({"ray_replicas": 2}, "but no cluster"), ({"ray": "local", "ray_replicas": 0}, "nobody")]
)
def test_wrong_settings_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Cluster(**settings)


def test_a_cluster_that_is_not_there_is_told_at_once(photos: Path, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    arguments = [photos, "-i", "drink", "-o", tmp_path / "found.jsonl", "--ray", nowhere]
    ran = subprocess.run([*COMMAND, "batch", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"error: no Ray cluster at '{nowhere}'")


def test_without_ray_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[ray\]'"), connected(TWO):
        pass
