"""The page's parts without a browser, and its endpoints on a running server."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import detgpt
from detgpt.detectors import Grounding
from detgpt.pipeline import DetGPT, Options
from detgpt.reasoners.scripted import ScriptedReasoner
from detgpt.results import Detections, Target
from detgpt.web.conversation import Conversation, floor

REPOSITORY = Path(__file__).parents[1]
KITCHEN = REPOSITORY / "examples" / "kitchen.png"


class Everything:
    """A detector with a fixed crowd of overlapping boxes of many scores for every name."""

    name = "everything"

    def detect(
        self,
        images: Any,
        names: Any,
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        prompting: str = "separate",
    ) -> list[Grounding]:
        found = []
        for image, asked in zip(images, names, strict=True):
            chance = np.random.default_rng(len(asked))
            count = 60 * len(asked)
            corner = chance.uniform(0, 40, (count, 2))
            boxes = np.concatenate([corner, corner + chance.uniform(10, 40, (count, 2))], axis=1)
            boxes = np.clip(boxes, 0, np.tile(image.size, 2)).astype(np.float32)
            scores = chance.uniform(0, 1, count).astype(np.float32)
            keep = scores >= box_threshold
            index = np.arange(count) % max(1, len(asked))
            found.append(Grounding(boxes[keep], scores[keep], index[keep]))
        return found


SCRIPT = {
    "drink": 'A cup and a glass.\nTargets: ["cup", "glass"]',
    "only hot": 'The cup is hot.\nTargets: ["cup"]',
    "fly": "Nothing flies.\nTargets: []",
}


@pytest.fixture
def model() -> DetGPT:
    return DetGPT(ScriptedReasoner(SCRIPT), Everything())


@pytest.fixture
def begun() -> Conversation:
    return Conversation(Image.new("RGB", (80, 60), "gray"), "desk.png", "picto")


def answered(conversation: Conversation, model: DetGPT, wish: str) -> Conversation:
    *pieces, last = conversation.ask(model, wish)
    assert "".join(pieces) == SCRIPT[wish]  # the reasoning streams
    assert isinstance(last, Conversation)
    return last


# ----------------------------------------------------------------------------------------------- conversation


@pytest.mark.parametrize("box_threshold", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("nms_threshold", [0.05, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("share_boxes", [False, True])
def test_a_slider_shows_what_detect_gives(
    model: DetGPT, begun: Conversation, box_threshold: float, nms_threshold: float, share_boxes: bool
) -> None:
    options = Options(box_threshold=box_threshold, nms_threshold=nms_threshold, share_boxes=share_boxes)
    shown = answered(begun, model, "drink").shown(options)
    asked = {"box_threshold": box_threshold, "nms_threshold": nms_threshold, "share_boxes": share_boxes}
    assert shown == model.detect(begun.picture, "drink", **asked)


def test_a_slider_asks_no_model(model: DetGPT, begun: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = answered(begun, model, "drink")
    monkeypatch.setattr(model, "detector", None)
    monkeypatch.setattr(model, "reasoner", None)
    many, few = (conversation.shown(Options(box_threshold=least)) for least in (0.1, 0.8))
    assert many is not None and few is not None
    assert len(many) > len(few) > 0


def test_what_a_model_shows_below_the_floor_is_kept_too() -> None:
    assert floor(Options(box_threshold=0.3)) == 0.05
    assert floor(Options(box_threshold=0.01)) == 0.01


def test_each_wish_knows_those_before_it(begun: Conversation) -> None:
    seen = []

    def answer(request: Any) -> str:
        seen.append([(turn.instruction, turn.answer) for turn in request.history])
        return SCRIPT[request.instruction]

    model = DetGPT(ScriptedReasoner(answer), Everything())
    conversation = answered(answered(begun, model, "drink"), model, "only hot")
    assert seen == [[], [("drink", SCRIPT["drink"])]]
    assert [turn.instruction for turn in conversation.turns] == ["drink", "only hot"]
    assert conversation.anew().turns == () and conversation.anew().found is None


def test_names_are_found_without_reasoning(model: DetGPT, begun: Conversation) -> None:
    before = answered(begun, model, "drink")
    after = before.look_for(model, ["lamp"])
    assert after.turns == before.turns
    assert after.found is not None and set(after.found.labels) == {"lamp"} and after.found.reasoning == ""


@pytest.mark.parametrize("wishes", [["drink"], ["drink", "only hot"], ["fly", "drink", "only hot"], None])
@pytest.mark.parametrize("changed", [{}, {"box_threshold": 0.6, "nms_threshold": 0.3}])
def test_the_python_call_gives_what_is_shown(
    begun: Conversation, wishes: list[str] | None, changed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(request: Any) -> str:
        asked.append((request.instruction, request.history))
        return SCRIPT[request.instruction]

    model = DetGPT(ScriptedReasoner(answer), Everything())
    conversation = begun
    for wish in wishes or []:
        conversation = answered(conversation, model, wish)
    if wishes is None:
        conversation = conversation.look_for(model, ['12" ruler', "tasse à café"])
    on_the_page, asked = asked, []
    monkeypatch.setattr(detgpt.pipeline, "_kept", lambda name: {"picto": model}[name])
    monkeypatch.setattr(DetGPT, "from_pretrained", lambda name: {"picto": model}[name])
    monkeypatch.setattr(detgpt.pipeline, "load_image", lambda source: {"desk.png": begun.picture}[source])
    ran: dict[str, Any] = {}
    exec(conversation.python(changed), ran)
    assert ran["result"] == conversation.shown(Options().updated(changed))
    assert len(ran["result"]) > 0
    assert asked == on_the_page  # the same wishes, each after the same ones


def test_the_python_call_names_another_model(model: DetGPT, begun: Conversation) -> None:
    conversation = answered(begun.anew("base"), model, "drink")
    assert conversation.python({}) == 'import detgpt\n\nresult = detgpt.detect("desk.png", "drink", model="base")'


# ------------------------------------------------------------------------------------------- picture and words

pytest.importorskip("gradio")  # from here on

import gradio as gr  # noqa: E402

from detgpt.web import clip, launch, models, picture_tab, samples  # noqa: E402
from detgpt.web.stage import CROWD, stage  # noqa: E402
from detgpt.web.upload import read_upload  # noqa: E402


def some(*found: tuple[str, float, tuple[float, float, float, float]], targets: str = "") -> Detections:
    names = targets.split() or list(dict.fromkeys(name for name, _, _ in found))
    labels = tuple(name for name, _, _ in found)
    return Detections(
        boxes=np.array([box for _, _, box in found], np.float32),
        scores=np.array([score for _, score, _ in found], np.float32),
        labels=labels,
        targets=tuple(Target(name, found=name in labels) for name in names),
        reasoning="I see a desk.",
        image_wh=(200, 100),
    )


def test_boxes_lie_over_the_picture_in_the_colours_of_the_drawing() -> None:
    from detgpt.draw import target_colours

    html = stage("p.jpg", (200, 100), "desk.png", some(("cup", 0.9, (20, 50, 60, 100)), targets="lamp cup"))
    assert "left:10.000%;top:50.000%;width:20.000%;height:50.000%" in html
    assert html.count(f"--colour:{target_colours(2)[1]}") == 2  # the box, and the target below
    assert "cup <b>0.90</b>" in html
    assert "lamp <span>not found" in html
    assert 'alt="desk.png, boxes: 1 cup"' in html


def test_what_a_model_writes_stays_text() -> None:
    html = stage("p.jpg", (200, 100), "<b>.png", some(("<script>", 0.9, (0, 0, 9, 9))))
    assert "<script>" not in html and "<b>.png" not in html
    assert html.count("&lt;script&gt;") == 3


def test_in_a_crowd_labels_wait_until_pointed_at() -> None:
    boxes = [("cup", 0.5, (i, 0.0, i + 9.0, 9.0)) for i in range(CROWD + 1)]
    assert 'class="stage crowded"' in stage("p.jpg", (200, 100), "desk", some(*boxes))
    assert 'class="stage crowded"' not in stage("p.jpg", (200, 100), "desk", some(*boxes[:-1]))


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (some(), "**Nothing here fits.**"),
        (some(targets="coat"), "**Nothing here fits:** I looked for coat, but found none."),
        (some(("cup", 0.9, (0, 0, 9, 9))), "**Found:** cup."),
        (
            some(("a", 0.9, (0, 0, 9, 9)), ("b", 0.9, (0, 0, 9, 9)), ("c", 0.9, (0, 0, 9, 9)), targets="a b c d e"),
            "**Found:** a, b and c. I see no d or e.",
        ),
        (replace(some(), problem="no answer line."), "**I cannot use my own answer:** no answer line. Please say"),
        (
            replace(some(("cup", 0.9, (0, 0, 9, 9))), problem="The detector cannot read 'чай'."),
            "**Found:** cup.\n\nNot all of my answer could be used: The detector cannot read 'чай'.",
        ),
    ],
)
def test_the_answer_in_words(result: Detections, says: str) -> None:
    assert picture_tab._in_words(result).startswith("I see a desk.\n\n")
    assert says in picture_tab._in_words(result)


def payload(path: Path) -> dict[str, Any]:
    return {"path": str(path), "url": None, "orig_name": path.name}


def bad_picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(KITCHEN.read_bytes()[:90_000])
    elif kind == "wide":
        Image.new("RGB", (20_000, 40)).save(path)
    elif kind == "empty":
        path.touch()
    return path


BAD = {
    "text": "'text.png' is text, not an image",
    "truncated": "'truncated.png' is damaged, cut short",
    "wide": "'wide.png' is 20,000 x 40 pixels; the limit is 12,000 a side",
    "empty": "'empty.png' is empty",
}


@pytest.mark.parametrize(("kind", "says"), BAD.items())
def test_a_bad_upload_is_refused_in_words(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(gr.Error) as refused:
        read_upload(payload(bad_picture(kind, tmp_path)))
    assert refused.value.message.startswith(says)
    assert str(tmp_path) not in refused.value.message
    assert not refused.value.print_exception


def test_the_samples_are_there() -> None:
    assert all(sample.path.is_file() and sample.wishes for sample in (*samples.PICTURES, samples.CLIP))


# ------------------------------------------------------------------------------------------------------- clips


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Two seconds of a dark room, then two of a bright one, at 10 frames a second; odd sizes are made even."""
    import av

    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            picture = Image.new("RGB", (64, 48), "#202020" if number < 20 else "#e0e0e0")
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def test_a_wish_is_thought_about_once_a_scene(film: Path) -> None:
    asked = itertools.count()
    model = DetGPT(ScriptedReasoner(lambda request: f'A room.\nTargets: ["thing {next(asked)}"]'), Everything())
    sights = list(clip.watch(model, film, "drink", frames_per_second=5))
    assert [sight.seconds for sight in sights if sight.reasoned] == [0.0, 2.0]
    assert [round(sight.seconds, 1) for sight in sights] == [round(i / 5, 1) for i in range(20)]
    assert {label for sight in sights[:10] for label in sight.result.labels} == {"thing 0"}
    assert {label for sight in sights[10:] for label in sight.result.labels} == {"thing 1"}
    assert all(sight.result.reasoning == "A room." and len(sight.result) for sight in sights)


def test_where_nothing_fits_a_clip_shows_no_boxes(film: Path, model: DetGPT) -> None:
    sights = list(clip.watch(model, film, "fly", frames_per_second=2))
    assert len(sights) == 8 and not any(sight.result.targets for sight in sights)


def test_a_clip_with_boxes_plays_at_the_same_length(film: Path, model: DetGPT, tmp_path: Path) -> None:
    import av

    path = tmp_path / "out.mp4"
    sights = clip.watch(model, film, "drink", frames_per_second=5, box_threshold=0.95)
    assert len(list(clip.saved(sights, path, 5))) == 20
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 48)
        assert container.duration / av.time_base == pytest.approx(4, abs=0.3)
        frame = next(container.decode(stream)).to_ndarray(format="rgb24")
    assert np.ptp(frame.astype(int), axis=2).max() > 60  # a grey room holds no colour but that of the boxes


def test_a_clip_that_breaks_off_leaves_no_file(film: Path, model: DetGPT, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    sights = clip.saved(clip.watch(model, film, "fly"), path)
    for _ in range(38):  # the codec holds back some frames before it writes the first
        next(sights)
    assert path.exists()
    sights.close()  # type: ignore[attr-defined]
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"no film", KITCHEN.read_bytes()[:50]])
def test_what_is_no_clip_is_refused(content: bytes, model: DetGPT, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(detgpt.InputError, match="is no video that can be read"):
        list(clip.watch(model, path, "drink"))


def test_a_long_clip_is_refused_before_any_work(film: Path, model: DetGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "MAX_SECONDS", 2)
    with pytest.raises(detgpt.InputError, match="longer than 2 seconds"):
        next(clip.watch(model, film, "drink"))


# ------------------------------------------------------------------------------------------ models and options


def test_a_model_loads_once_for_all_visitors(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str) -> object:
        time.sleep(0.05)
        loaded.append(name)
        return object()

    monkeypatch.setattr(DetGPT, "from_pretrained", load)
    offered = models.Models(["picto", "base", "picto"])
    threads = [threading.Thread(target=lambda: offered["base"]) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["base"]
    assert offered.names == ("picto", "base")
    with pytest.raises(detgpt.InputError, match="'large' is not on offer here: choose one of picto, base"):
        offered["large"]


def test_each_model_says_what_it_costs() -> None:
    described = dict((name, text) for text, name in models.Models(["picto", "base"]).choices())
    assert "pictograms" in described["picto"]
    assert described["base"] == "base · photographs, better · 10 GB download, 12 GB GPU memory"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "serve", lambda names, **given: calls.append({"names": names, **given}))
    return calls


def run(*arguments: str) -> Any:
    import typer

    command = typer.Typer()
    command.command()(launch.demo)
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "offered"),
    [
        ([], ["picto", "picto", "small", "base", "large"]),
        (["--host", "::1", "--model", "base"], ["base", "picto", "small", "base", "large"]),
        (["--host", "0.0.0.0"], ["picto"]),
        (["--host", "example.org"], ["picto"]),
        (["--share"], ["picto"]),
    ],
)
def test_strangers_start_no_download(launched: list[dict[str, Any]], arguments: list[str], offered: list[str]) -> None:
    assert run(*arguments).exit_code == 0
    assert launched[0]["names"] == offered


@pytest.mark.parametrize("told_by", ["the option", "the pair"])
def test_a_served_reasoner_comes_with_its_key_and_alone(
    launched: list[dict[str, Any]], told_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETGPT_REASONER_KEY", "s3cret")
    address = "http://gpu-box:8000/v1"
    pair = {"reasoner": "vlm", "detector": "d", **({"base_url": address} if told_by == "the pair" else {})}
    (tmp_path / "detgpt.json").write_text(json.dumps(pair))
    ran = run("--model", str(tmp_path), *(["--base-url", address] if told_by == "the option" else []))
    assert ran.exit_code == 0, ran.output
    (given,) = launched
    assert (given["names"], given["base_url"], given["api_key"]) == ([str(tmp_path)], address, "s3cret")


def test_every_option_arrives(launched: list[dict[str, Any]]) -> None:
    run(*"--device cpu --port 8080 --auth me:a:b --queue-size 5 --mcp --feedback clicks".split())
    (given,) = launched
    assert given["feedback"] == Path("clicks")
    assert (given["device"], given["port"], given["login"], given["queue_size"], given["mcp"]) == (
        "cpu",
        8080,
        ("me", "a:b"),
        5,
        True,
    )


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_half_a_login_is_wrong_usage(launched: list[dict[str, Any]], auth: str) -> None:
    assert run("--auth", auth).exit_code == 2
    assert launched == []


def test_an_unknown_model_is_one_line() -> None:
    ran = run("--model", "no-such-model")
    assert ran.exit_code == 1
    assert ran.stderr.startswith("error: no model pair 'no-such-model'") and ran.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------- a running server


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("mcp")
    page = launch.serve(["picto"], device="cpu", port=0, mcp=True, wait=False)
    yield page.local_url
    page.close()


def test_programs_get_the_same_as_from_the_library(server: str) -> None:
    from gradio_client import Client, handle_file

    client = Client(server, verbose=False)
    answer = client.predict(handle_file(KITCHEN), "I am thirsty", api_name="/detect")
    result = Detections.from_json(answer)
    expected = detgpt.detect(KITCHEN, "I am thirsty")
    assert result == Detections.from_json(expected.to_json())
    assert {"coffee", "soda"} & set(result.labels)
    cups = client.predict(handle_file(KITCHEN), names="coffee, soda", box_threshold=0.5, api_name="/detect_names")
    assert json.loads(cups) == detgpt.detect(KITCHEN, names=["coffee", "soda"], box_threshold=0.5).to_dict()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"wish": " "}, "instruction is empty"),
        ({"box_threshold": 7}, "box_threshold=7"),
        ({"model": "large"}, "'large' is not on offer here"),
    ],
)
def test_programs_are_told_what_is_wrong(server: str, arguments: dict[str, Any], says: str) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    given = {"image": handle_file(KITCHEN), "wish": "drink", **arguments}
    with pytest.raises(AppError, match=says):
        Client(server, verbose=False).predict(**given, api_name="/detect")


def test_a_program_cannot_read_the_servers_files(server: str) -> None:
    import httpx

    image = {"path": "/etc/hostname", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    started = httpx.post(f"{server}gradio_api/call/detect", json={"data": [image, "drink", 0.25, "picto"]}, timeout=60)
    event = started.json()["event_id"]
    answer = httpx.get(f"{server}gradio_api/call/detect/{event}", timeout=60).text
    assert "event: error" in answer
    assert "is text" not in answer  # nothing of the file was looked at


def test_only_two_endpoints_are_public(server: str) -> None:
    from gradio_client import Client

    shown = Client(server, verbose=False).view_api(return_format="dict")
    assert set(shown["named_endpoints"]) == {"/detect", "/detect_names"}
    assert shown["unnamed_endpoints"] == {}


def test_an_agent_finds_and_calls_the_tools(server: str) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def talk() -> tuple[Any, Any, Any]:
        async with (
            streamable_http_client(f"{server}gradio_api/mcp/") as (reads, writes, _),
            ClientSession(reads, writes) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            picture = "data:image/png;base64," + base64.b64encode(KITCHEN.read_bytes()).decode()
            good = await session.call_tool("detect", {"image": picture, "wish": "I am thirsty"})
            broken = "data:image/png;base64," + base64.b64encode(b"hello").decode()
            bad = await session.call_tool("detect", {"image": broken, "wish": "I am thirsty"})
            return tools, good, bad

    tools, good, bad = asyncio.run(talk())
    detect, names = sorted(tools, key=lambda tool: tool.name)
    assert (detect.name, names.name) == ("detect", "detect_names")
    assert "Find the things in a picture that fulfil a wish" in detect.description
    properties = detect.inputSchema["properties"]
    assert list(properties) == ["image", "wish", "box_threshold", "model", "min_confidence"]
    assert all(about["description"] for about in properties.values())
    assert detect.inputSchema["required"] == ["image", "wish"]
    assert not good.isError
    assert Detections.from_json(good.content[0].text) == Detections.from_json(
        detgpt.detect(KITCHEN, "I am thirsty").to_json()
    )
    assert bad.isError and "is text, not an image" in bad.content[0].text


def test_a_port_that_is_taken_is_one_line(server: str) -> None:
    port = int(server.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(detgpt.InputError, match=f"cannot listen on 127.0.0.1:{port}"):
        launch.serve(["picto"], device="cpu", port=port, wait=False)


def test_the_command_serves_the_page(tmp_path: Path) -> None:
    """`python app.py`, from anywhere, without network, behind a login."""
    import socket

    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(REPOSITORY / "app.py"), "--device", "cpu", "--port", str(port), "--auth", "me:it"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        try:
            while True:  # until it listens; a busy machine takes its time
                time.sleep(0.2)
                assert process.poll() is None
                try:
                    assert "DetGPT" in httpx.get(page, timeout=5).text
                    break
                except httpx.TransportError:
                    continue
            assert httpx.get(f"{page}config").status_code == 401
            with httpx.Client() as visitor:
                assert visitor.post(f"{page}login", data={"username": "me", "password": "no"}).status_code == 400
                assert visitor.post(f"{page}login", data={"username": "me", "password": "it"}).status_code == 200
                assert visitor.get(f"{page}config").json()["title"] == "DetGPT"
        finally:
            process.terminate()


def test_the_package_stays_light_without_a_page() -> None:
    code = "import sys, detgpt.web; assert not {'gradio', 'torch', 'av'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
