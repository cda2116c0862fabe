"""`detgpt eval` and `detgpt bench-build` as their users meet them, and the report as its readers do."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from detgpt.cli import app
from detgpt.evaluation.data import Record, box_array
from detgpt.evaluation.report import html
from detgpt.evaluation.samples import Samples
from detgpt.reasoners import Request
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from detgpt.results import Detections, Target

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `detgpt` with these arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- samples and report ---


def some_samples(folder: Path, run: str = "picto · seen") -> Samples:
    """Four wishes about one picture: right, half right, wrong, and rightly nothing."""
    Image.new("RGB", (300, 200), "gray").save(folder / "a.png")
    left, right = (10.0, 10.0, 90.0, 90.0), (150.0, 50.0, 250.0, 150.0)
    samples = Samples(run)
    for wish, true, found in (
        ("a drink", [left], [left]),
        ("two <b>drinks</b>", [left, right], [left]),
        ("something warm", [right], [left]),
        ("nothing at all", [], []),
    ):
        name = "cup" if true else ""
        targets = ("cup",) if true else ()
        labels = tuple("cup" for _ in true)
        record = Record(folder / "a.png", wish, targets, box_array(true), labels, ("cup",), "need", where="line 1")
        said = tuple(Target(name, 0.9, True) for _ in found[:1])
        result = Detections(np.array(found), np.full(len(found), 0.8), ("cup",) * len(found), said, image_wh=(300, 200))
        samples.add(record, result)
    return samples


def test_samples_say_how_far_each_result_is_from_the_truth(tmp_path: Path):
    rows = [json.loads(line) for line in some_samples(tmp_path).lines().splitlines()]
    assert [row["f1_50"] for row in rows] == [1.0, pytest.approx(2 / 3, abs=1e-4), 0.0, 1.0]
    assert [row["box_iou"] for row in rows] == [1.0, pytest.approx(6400 / 16400, abs=1e-4), 0.0, 1.0]
    assert [row["names_right"] for row in rows] == [True] * 4
    assert rows[1]["true"]["boxes"] == [[10, 10, 90, 90], [150, 50, 250, 150]]
    assert rows[1]["found"]["detections"][0]["xyxy"] == [10, 10, 90, 90]


def test_the_worst_come_first_and_what_is_right_is_none_of_them(tmp_path: Path):
    samples = some_samples(tmp_path)
    assert [sample.record.instruction for sample in samples.worst(9)] == ["something warm", "two <b>drinks</b>"]
    assert len(samples.worst(1)) == 1 and samples.worst(0) == []


class Page(HTMLParser):
    """A page's tags with their attributes, and its text; void tags aside, every tag must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def numbers(n: int = 4) -> dict[str, Any]:
    end_to_end = {
        "f1_50": 0.5,
        "f1": 0.25,
        "acc_50": None,
        "rejection": 1.0,
        "cgf1": 31.4,
        "box_giou": 0.6,
        "box_ciou": 0.4,
    }
    by_kind = {"need": {"n": n, "f1_50": 0.5, "box_giou": 0.6, "rejection": 1.0}}
    return {
        "n": n,
        "reasoner": {"f1": 1.0, "by_kind": {"need": {"n": n, "f1": 1.0}}},
        "detector": {"ap50": 0.75},
        "end_to_end": {**end_to_end, "by_kind": by_kind},
    }


def test_the_report_holds_everything_and_fetches_nothing(tmp_path: Path):
    page = Page(html({"picto · seen": numbers()}, [some_samples(tmp_path)], worst=24))
    assert page.open == []
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(sources) == 4, "two cases, found beside true"
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    for shown in ("picto · seen", "31.4", "75.0", "2 worst of 2 wishes with a wrong box", "need", "two <b>drinks</b>"):
        assert shown in page.text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_what_is_found_is_drawn_beside_what_is_true(tmp_path: Path):
    page = Page(html({"picto · seen": numbers()}, [some_samples(tmp_path)], worst=1))
    found, true = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))), dtype=int)
        for tag, attributes in page.tags
        if tag == "img"
    )
    assert found.shape == true.shape == (373, 560, 3), "every picture is shown at one size"

    def is_grey(pixel: np.ndarray) -> bool:
        return bool(np.ptp(pixel) < 20)

    on_left, on_right = (93, 168), (187, 280)  # (y, x) on an edge of the left box, and on one of the other
    assert (is_grey(found[on_left]), is_grey(found[on_right])) == (False, True)
    assert (is_grey(true[on_left]), is_grey(true[on_right])) == (True, False)


def test_no_more_cases_than_asked_for(tmp_path: Path):
    page = html({"a": numbers(), "b": numbers()}, [some_samples(tmp_path, run) for run in "ab"], worst=1)
    assert page.count("<img") == 2 * 2
    assert "<img" not in html({"a": numbers()}, [some_samples(tmp_path, "a")], worst=0)


# --- detgpt eval ---


def test_eval_writes_samples_and_a_report(run: Run, tiny_pair_folder: Path):
    Image.new("RGB", (40, 30), "gray").save("000000000042.png")
    coco = {
        "images": [{"id": 42, "file_name": "000000000042.png"}],
        "annotations": [{"id": 1, "image_id": 42, "category_id": 1, "bbox": [1, 1, 8, 8]}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    Path("coco.json").write_text(json.dumps(coco))
    wishes = [
        {"image_id": 42, "instruction": "drink", "targets": ["cup"]},
        {"image_id": 42, "instruction": "swim", "targets": []},
    ]
    Path("wishes.jsonl").write_text("\n".join(map(json.dumps, wishes)))
    ran = run(
        "eval", "wishes.jsonl", "--annotations", "coco.json", "-m", tiny_pair_folder,
        "--samples", "out/samples.jsonl", "--report", "out/report.html", "-o", "out/numbers.json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    title = f"{tiny_pair_folder} · wishes.jsonl"
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [(row["run"], row["instruction"], row["names_right"]) for row in rows] == [
        (title, "drink", True),
        (title, "swim", True),
    ]
    assert title in Page(Path("out/report.html").read_text()).text
    assert json.loads(Path("out/numbers.json").read_text())[title]["reasoner"]["f1"] == 1.0
    assert sorted(path.name for path in Path("out").iterdir()) == ["numbers.json", "report.html", "samples.jsonl"]


def test_sets_of_the_same_name_stay_apart(run: Run, tiny_pair_folder: Path):
    for place in ("a/val", "b/val"):
        Path(place).mkdir(parents=True)
        Image.new("RGB", (40, 30), "gray").save(f"{place}/1.png")
        empty = {"targets": [], "boxes": [], "labels": [], "present": ["cup"]}
        Path(place, "data.jsonl").write_text(json.dumps({"image": "1.png", "instruction": "swim", **empty}))
    shown = run("eval", "a/val", "b/val", "-m", tiny_pair_folder).stdout
    assert "· a/val |" in shown and "· b/val |" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["."], "looks like no known evaluation set"),
        ([".", "--format", "voc"], "there is no format 'voc'"),
        ([".", "--format", "folder", "--split", "val"], "takes no split"),
    ],
)
def test_eval_says_what_is_wrong_with_the_data_before_it_loads_a_model(run: Run, arguments: list[str], message: str):
    ran = run("eval", *arguments, "-m", "no-such-model")
    assert ran.exit_code == 1
    assert message in ran.stderr


# --- detgpt bench-build ---


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An OpenAI-compatible server that writes wishes about cups, and the prompts that reached it."""
    prompts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts.append(body["messages"][0]["content"][1]["text"])
            asked = re.search(r'Somebody says: "(.*)"', prompts[-1])
            text = '{"wish": "I am thirsty", "fits": ["cup"]}'
            if asked:
                text = 'Targets: ["cup"]' if "cup" in prompts[-1].partition("Somebody")[0] else "Targets: []"
            elif "cup" not in prompts[-1].partition("Write")[0]:
                text = "I can think of nothing."
            choice = {"index": 0, "finish_reason": "stop", "delta": {"role": "assistant", "content": text}}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1", prompts
        listening.shutdown()


def test_bench_build_asks_a_server_and_eval_reads_what_it_wrote(
    run: Run, server: tuple[str, list[str]], tiny_pair_folder: Path
):
    pytest.importorskip("openai")
    url, prompts = server
    Path("images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 30), "gray").save(Path("images", name))
    coco = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8]},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [1, 1, 8, 8]},
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "chair"}],
    }
    Path("coco.json").write_text(json.dumps(coco))
    ran = run("bench-build", "coco.json", "images", "-o", "bench", "--reasoner", "writer", "--base-url", url)
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["wishes"] == {"need": 1, "absent": 1}
    assert all(prompt.startswith("In this picture these things are marked:") for prompt in prompts)
    assert not any("Answer in three steps" in prompt for prompt in prompts)
    rows = [json.loads(line) for line in Path("bench/data.jsonl").read_text().splitlines()]
    assert [(row["image"], row["instruction"], row["targets"]) for row in rows] == [
        ("images/1.png", "I am thirsty", ["cup"]),
        ("images/2.png", "I am thirsty", []),
    ]
    Path("bench/data.jsonl").write_text(Path("bench/data.jsonl").read_text().replace("I am thirsty", "drink"))
    assert run("eval", "bench", "-m", tiny_pair_folder).exit_code == 0


def test_bench_build_names_what_is_missing(run: Run):
    ran = run("bench-build", "coco.json", "nowhere", "-o", "bench", "--reasoner", "writer")
    assert ran.exit_code == 1
    assert "there is no folder nowhere" in ran.stderr
    Path("images").mkdir()
    ran = run(
        "bench-build", "coco.json", "images", "-o", "bench", "--reasoner", "w", "--base-url", "http://127.0.0.1:9/v1"
    )
    assert ran.exit_code == 1
    assert "cannot read coco.json" in ran.stderr and not Path("bench").exists()


def test_a_whole_prompt_reaches_a_local_model_as_it_is(tiny_reasoner_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_reasoner_folder, tmp_path / "reasoner")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("detgpt_prompt") == "bare"  # as in any checkpoint but our own
    (folder / "config.json").write_text(json.dumps(config))
    reasoner = HuggingFaceReasoner(folder)
    image = Image.new("RGB", (8, 8))
    texts = [
        reasoner._conversation(Request(image, "write a wish", verbatim=verbatim))[0]["content"][1]["text"]
        for verbatim in (True, False)
    ]
    assert texts[0] == "write a wish"
    assert "Answer in three steps" in texts[1]
