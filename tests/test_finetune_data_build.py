"""`detgpt-finetune data build`: wishes and reasoned answers from an annotation, by a writer on a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_servers import ChatHandler
from typer.testing import CliRunner

from detgpt.answer import parse_answer
from detgpt.errors import InputError
from detgpt.evaluation.building import Plan, build
from detgpt.evaluation.readers import read_dataset
from detgpt.reasoners import Request
from detgpt.reasoners.scripted import ScriptedReasoner
from finetune.cli import app
from finetune.data.check import check
from finetune.data.cost import estimate
from finetune.data.records import load_records

SERVES = {"cup": "I am thirsty", "chair": "my legs are tired", "umbrella": "it is raining", "bed": "I am sleepy"}
SHOWN = [("cup", "chair"), ("chair",), ("umbrella", "cup"), ("bed",), ("cup",)]


def writes(prompt: str) -> str:
    """What a good writer answers."""
    first = prompt.partition("\n")[0]
    things = first.removeprefix("In this picture these things are marked: ").removesuffix(".").split(", ")
    said = re.search(r'Somebody says: "(.*)"', prompt)
    if said is None:
        return "\n".join(json.dumps({"wish": SERVES[thing], "fits": [thing]}) for thing in things)
    fitting = [thing for thing in things if SERVES[thing] == said.group(1)]
    why = f"The {fitting[0]} helps with that." if fitting else "Nothing helps with that."
    return f"A room with a {things[0]}. {why}\nTargets: {json.dumps(fitting)}"


class Writer(ChatHandler):
    """Answers as `writes` does; from the request numbered `server.stops_at` on it lets its client wait."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"][1]["text"]
        self.server.prompts.append(prompt)
        if len(self.server.prompts) > self.server.stops_at:
            self.server.stopped.set()
            self.server.goes_on.wait(60)
            return
        self.start_events()
        self.event(delta={"content": writes(prompt)})
        self.event(delta={}, finish_reason="stop")
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[Any]:
    pytest.importorskip("openai")
    with ThreadingHTTPServer(("127.0.0.1", 0), Writer) as listening:
        listening.prompts, listening.sent, listening.stops_at = [], 0, 10**6
        listening.stopped, listening.goes_on = threading.Event(), threading.Event()
        listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield listening
        listening.goes_on.set()
        listening.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Five annotated pictures, and captions of the first."""
    names = sorted(SERVES)
    document: dict[str, list[Any]] = {"images": [], "annotations": []}
    document["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    (tmp_path / "pictures").mkdir()
    for image_id, shown in enumerate(SHOWN, start=1):
        Image.new("RGB", (90, 60), (40 * image_id, 0, 0)).save(tmp_path / f"pictures/{image_id}.png")
        document["images"].append({"id": image_id, "file_name": f"{image_id}.png"})
        for i, name in enumerate(shown):
            row = {"id": 10 * image_id + i, "image_id": image_id, "category_id": names.index(name)}
            document["annotations"].append({**row, "bbox": [10 + 30 * i, 10, 20, 20]})
    (tmp_path / "coco.json").write_text(json.dumps(document))
    captions = [{"id": 1, "image_id": 1, "caption": "A cup by a chair."}, {"id": 2, "image_id": 1, "caption": "Tea."}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": document["images"], "annotations": captions}))
    return tmp_path


def arguments(place: Path, server: Any, output: str, *more: str) -> list[str]:
    places = [str(place / "coco.json"), str(place / "pictures"), "-o", str(place / output)]
    return ["data", "build", *places, "--reasoner", "writer", "--base-url", server.url, "--batch-size", "1", *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def built(
    place: Path, writer: Any = lambda request: writes(request.instruction), output: str = "out", **plan: Any
) -> Any:
    options = {"explain": True, "distinct": True, **plan}
    return build(ScriptedReasoner(writer), place / "coco.json", place / "pictures", place / output, Plan(**options))


def test_a_server_writes_data_that_training_and_evaluation_read(place: Path, server: Any):
    ran = CliRunner().invoke(app, arguments(place, server, "out", "--yes", "--captions", str(place / "captions.json")))
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["wishes"] == {"need": 7, "absent": 5}
    records = list(load_records(place / "out"))
    first = records[0]
    assert first["answer"] == 'A room with a cup. The cup helps with that.\nTargets: ["cup"]'
    assert (first["instruction"], first["boxes"]) == ("I am thirsty", [[10, 10, 30, 30]])
    for record in records:
        assert list(parse_answer(record["answer"]).names) == record["targets"]
        assert "helps with that" in record["answer"], "what fits and why, or why nothing does"
    assert sum(record["targets"] == [] for record in records) == 5
    assert len(read_dataset(place / "out").records) == 12
    assert check([place / "out"]).errors == 0
    told = [prompt for prompt in server.prompts if "Somebody described it so: A cup by a chair." in prompt]
    assert told and all("Tea." in prompt and "marked: cup, chair" in prompt for prompt in told)


def test_a_run_that_was_killed_goes_on_and_ends_the_same(place: Path, server: Any):
    assert CliRunner().invoke(app, arguments(place, server, "whole", "--yes")).exit_code == 0
    whole = len(server.prompts)
    server.prompts.clear()
    server.stops_at = 8
    command = [sys.executable, "-m", "finetune.cli", *arguments(place, server, "out", "--yes")]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    try:
        assert server.stopped.wait(60), "the run asked less than it should"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (place / "out/data.jsonl").exists() and (place / "out/progress.jsonl").is_file()
    server.stops_at = 10**6
    asked = len(server.prompts)
    ran = CliRunner().invoke(app, arguments(place, server, "out", "--yes"))
    assert ran.exit_code == 0, ran.output
    assert rows(place / "out") == rows(place / "whole")
    assert 0 < len(server.prompts) - asked < whole - 4, "what was answered is not asked again"
    assert "5 pictures: 13 to 23 calls" in ran.stderr, "three of five pictures were done"


def test_nothing_is_asked_before_the_user_has_seen_what_it_takes(place: Path, server: Any):
    prices = ("--price-in", "0.5", "--price-out", "2")
    ran = CliRunner().invoke(app, arguments(place, server, "out", *prices), input="n\n")
    assert ran.exit_code == 1
    assert re.search(
        r"5 pictures: 25 to 35 calls, about [\d,]+ to [\d,]+ tokens in and .* it costs about 0\.0", ran.stderr
    )
    assert server.prompts == [] and not (place / "out").exists()
    assert CliRunner().invoke(app, arguments(place, server, "out", *prices), input="y\n").exit_code == 0
    assert len(server.prompts) <= 35


def test_the_estimate_counts_what_is_asked(place: Path):
    asked: list[Request] = []
    built(place, lambda request: asked.append(request) or writes(request.instruction), wishes=1)
    expected = estimate(place / "coco.json", place / "pictures", place / "new", Plan(wishes=1, explain=True), {})
    # One wish was asked for, but this writer makes one for each of the seven things.
    assert expected.calls[0] <= len(asked) - 2 <= expected.calls[1]
    characters = sum(len(request.instruction) for request in asked) / len(asked)
    assert expected.tokens_in == pytest.approx(characters / 4 + 90 * 60 / 784, rel=0.1)
    assert expected.in_words(1e6, None).endswith(
        f"costs about {15 * expected.tokens_in:,.2f} to {25 * expected.tokens_in:,.2f}"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('Targets: ["cup"]', "answered without an explanation"),
        ('The cup is marked.\nTargets: ["cup"]', "answered without an explanation"),
        ('A cup.\nTargets: ["jug"]', "answered otherwise when asked again"),
    ],
)
def test_a_wish_without_a_good_answer_is_left_out(place: Path, answer: str, reason: str):
    def writer(request: Request) -> str:
        return answer if f'Somebody says: "{SERVES["cup"]}"' in request.instruction else writes(request.instruction)

    about = built(place, writer)
    assert about["counts"]["refused"][reason] == 3
    assert all(row["instruction"] != SERVES["cup"] for row in rows(place / "out") if row["targets"])


def test_the_same_picture_is_written_about_once(place: Path):
    (place / "pictures/2.png").write_bytes((place / "pictures/1.png").read_bytes())
    about = built(place)
    assert about["counts"]["refused"] == {"the same picture again": 1}
    assert {row["image"] for row in rows(place / "out")} == {f"images/{n}.png" for n in (1, 3, 4, 5)}


def test_explanations_need_the_check():
    with pytest.raises(InputError, match="explanations, need the check"):
        Plan(explain=True, check=False, absent=0)


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import atexit, sys; heavy = {'torch', 'transformers', 'datasets', 'gradio', 'trl', 'openai', 'pandas'}; "
        "atexit.register(lambda: print(*heavy & set(sys.modules), file=sys.stderr)); "
        "sys.argv = ['detgpt-finetune', *sys.argv[1:]]; from finetune.cli import main; main()"
    )
    for command in ([], ["run"], ["data"], ["data", "build"]):
        line = [sys.executable, "-c", code, *command, "--help"]
        ran = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.split() == []
