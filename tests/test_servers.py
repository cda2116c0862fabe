"""A reasoner behind a server: one that speaks as it should, several that do not, and `transformers serve` itself."""

from __future__ import annotations

import base64
import codecs
import io
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_reasoners import ask, image, read
from typer.testing import CliRunner

from detgpt import DetGPT
from detgpt.answer import format_instruction, parse_answer
from detgpt.cli import app
from detgpt.confidence import name_confidence
from detgpt.errors import InputError, ModelError
from detgpt.reasoners import RawAnswer, Request, TokenSpan, Turn
from detgpt.reasoners.openai import OpenAIReasoner

pytest.importorskip("openai")

REPOSITORY = Path(__file__).parents[1]
PIECES = [b"A desk", b" \xe2\x98", b"\x95.", b"\nTargets: [", b'"cup"', b"]"]  # a letter in two tokens
TEXT = 'A desk ☕.\nTargets: ["cup"]'

Fault = Callable[["ChatHandler"], None]


class ChatServer(ThreadingHTTPServer):
    """Speaks the chat-completions protocol: `pieces`, a token each, after what `faults` do to the first requests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, pieces: list[bytes], *, faults: Iterable[Fault] = (), **manner: Any) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.pieces, self.faults = pieces, iter(faults)
        self.refuses: dict[str, str] = manner.pop("refuses", {})
        self.finish: str | None = manner.pop("finish", "stop")
        assert not manner
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.sent = 0
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        self.hung_up.set()


class ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers.append(self.headers)
        fault = next(self.server.faults, None)
        refusals = [why for name, why in self.server.refuses.items() if name in asked]
        if fault:
            fault(self)
        elif self.path != "/v1/chat/completions":
            self.reply(404, b'{"error": {"message": "no such path"}}')
        elif refusals:
            self.reply(400, json.dumps({"error": {"message": refusals[0]}}).encode())
        else:
            self.speak(self.server.pieces, self.server.finish, bool(asked.get("logprobs")))

    def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def start_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, **choice: Any) -> None:
        choices = [{"index": 0, **choice}]
        chunk = {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": choices}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.server.sent += 1

    def speak(self, pieces: list[bytes], finish: str | None, logprobs: bool, pause: float = 0) -> None:
        self.start_events()
        decoder = codecs.getincrementaldecoder("utf-8")()
        for piece in pieces:
            token = {"token": repr(piece), "bytes": list(piece), "logprob": -0.5}
            given = {"content": [token]} if logprobs else None
            self.event(delta={"content": decoder.decode(piece)}, logprobs=given)
            time.sleep(pause)
        if finish:
            self.event(delta={}, finish_reason=finish)
            self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    servers: list[ChatServer] = []

    def start(*pieces: bytes, **manner: Any) -> ChatServer:
        server = ChatServer(list(pieces) or PIECES, **manner)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[..., ChatServer]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# --- a server as it should be ---


def test_a_server_answers_with_text_and_token_probabilities(serve: Serve) -> None:
    server = serve()
    answers = OpenAIReasoner("vlm", server.url).reason([ask("drink"), ask("read")], max_new_tokens=99)
    assert [answer.text for answer in answers] == [TEXT] * 2
    assert answers[0].tokens[:3] == (TokenSpan(0, 6, -0.5), TokenSpan(6, 8, -0.5), TokenSpan(7, 9, -0.5))
    assert name_confidence(answers[0], parse_answer(answers[0].text).spans[0]) == pytest.approx(math.exp(-0.5))
    assert answers[0].complete
    assert {asked["max_tokens"] for asked in server.asked} == {99} and server.asked[0]["model"] == "vlm"


def test_the_server_gets_the_picture_the_history_and_the_key(serve: Serve) -> None:
    server = serve()
    reasoner = OpenAIReasoner("vlm", server.url, api_key="secret")
    reasoner.reason([Request(image("red"), "the cold one", (Turn("drink", "A cup."),))])
    first, second, third = server.asked[0]["messages"]
    assert first["content"][1]["text"] == format_instruction("drink")
    assert sent_picture(server).getpixel((0, 0)) == (254, 0, 0)
    assert (second["role"], second["content"]) == ("assistant", "A cup.")
    assert (third["role"], third["content"]) == ("user", "the cold one")
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_wish_may_go_as_it_is(serve: Serve) -> None:
    server = serve()
    OpenAIReasoner("vlm", server.url, prompt="bare").reason([ask("drink")])
    OpenAIReasoner("vlm", server.url).reason([Request(image(), "drink", verbatim=True)])
    assert [asked["messages"][0]["content"][1]["text"] for asked in server.asked] == ["drink", "drink"]


def test_a_question_without_a_picture_goes_as_text(serve: Serve) -> None:
    server = serve()
    OpenAIReasoner("vlm", server.url).reason([Request(None, "is water wet", verbatim=True)])
    assert server.asked[0]["messages"][0]["content"] == [{"type": "text", "text": "is water wet"}]


def test_a_servers_stream_adds_up_to_the_answer(serve: Serve) -> None:
    reasoner = OpenAIReasoner("vlm", serve().url)
    pieces, answer = read(reasoner.stream(ask("drink")))
    assert pieces == ["A desk", " ", "☕.", "\nTargets: [", '"cup"', "]"]
    assert answer == reasoner.reason([ask("drink")])[0]


def test_an_answer_ends_with_its_answer_line_whatever_the_model_would_still_say(serve: Serve) -> None:
    def talk_for_ever(handler: ChatHandler) -> None:
        handler.speak([*PIECES, *[b" and so on"] * 500], "stop", logprobs=True, pause=0.01)

    server = serve(faults=[talk_for_ever])
    [answer] = OpenAIReasoner("vlm", server.url).reason([ask("drink")])
    assert (answer.text, answer.complete, len(answer.tokens)) == (TEXT, True, 6)
    assert server.hung_up.wait(2), "the server goes on"
    assert server.sent < 50


def test_closing_a_stream_ends_the_request(serve: Serve) -> None:
    server = serve(faults=[lambda handler: handler.speak([b"talk "] * 500, "stop", logprobs=False, pause=0.01)])
    stream = OpenAIReasoner("vlm", server.url).stream(ask("talk"))
    next(stream)
    stream.close()
    assert server.hung_up.wait(2), "the server goes on"


def test_an_answer_that_the_server_cut_is_not_complete(serve: Serve) -> None:
    reasoner = OpenAIReasoner("vlm", serve(b"A desk and", finish="length").url)
    assert not reasoner.reason([ask("drink")])[0].complete
    assert not read(reasoner.stream(ask("drink")))[1].complete


def test_a_server_without_token_probabilities_leaves_them_unknown(serve: Serve) -> None:
    server = serve(refuses={"logprobs": "logprobs are not supported"})
    reasoner = OpenAIReasoner("vlm", server.url)
    assert reasoner.reason([ask("drink")])[0] == RawAnswer(TEXT, None, True)
    assert read(reasoner.stream(ask("drink")))[1].tokens is None
    assert len(server.asked) == 3  # the refusal is remembered


def test_a_server_may_refuse_what_others_want(serve: Serve) -> None:
    """The newest models of OpenAI take neither a temperature nor `max_tokens`."""
    server = serve(
        refuses={
            "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
        }
    )
    reasoner = OpenAIReasoner("vlm", server.url)
    assert reasoner.reason([ask("drink")], max_new_tokens=99)[0].text == TEXT
    assert server.asked[-1]["max_completion_tokens"] == 99


# --- pictures ---


def sent_picture(server: ChatServer) -> Image.Image:
    return Image.open(io.BytesIO(sent_bytes(server)))


def sent_bytes(server: ChatServer) -> bytes:
    kind, data = server.asked[-1]["messages"][0]["content"][0]["image_url"]["url"].split(";base64,")
    assert kind == "data:image/jpeg"
    return base64.b64decode(data)


def noise(width: int, height: int) -> Image.Image:
    """The picture that compresses worst."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "limits", "sent"),
    [
        ((640, 480), {}, (640, 480)),
        ((6000, 400), {}, (1536, 102)),
        ((300, 1200), {"max_image_side": 400}, (100, 400)),
        ((3000, 1), {"max_image_side": 64}, (64, 1)),
    ],
)
def test_a_picture_travels_no_larger_than_it_may(serve: Serve, size: Any, limits: Any, sent: Any) -> None:
    server = serve()
    OpenAIReasoner("vlm", server.url, **limits).reason([Request(Image.new("RGB", size), "drink")])
    assert sent_picture(server).size == sent


@pytest.mark.parametrize("limit", [4096, 50_000, 400_000])
def test_a_picture_is_pressed_into_its_bytes(serve: Serve, limit: int) -> None:
    server = serve()
    OpenAIReasoner("vlm", server.url, max_image_bytes=limit).reason([Request(noise(700, 500), "drink")])
    assert limit / 4 < len(sent_bytes(server)) <= limit
    width, height = sent_picture(server).size
    assert width / height == pytest.approx(1.4, abs=0.05)


# --- who gets the key ---


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment full of them, as the openai package reads it."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: s3cret\nauthorization: Bearer s3cret")


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("environments_own", [None, "https://gateway.example/v1"])
@pytest.mark.parametrize("given", [None, "mine"])
def test_the_environments_secrets_stay_away_from_other_servers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, environments_own: str | None, given: str | None
) -> None:
    if environments_own:
        monkeypatch.setenv("OPENAI_BASE_URL", environments_own)
    server = serve()
    OpenAIReasoner("vlm", server.url, given).reason([ask("drink")])
    assert "s3cret" not in str(server.headers[0])
    assert server.headers[0].get_all("Authorization") == [f"Bearer {given or 'none'}"]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("named", [None, "with a slash"])
def test_the_environments_server_gets_the_environments_key(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    server = serve()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.delenv("OPENAI_CUSTOM_HEADERS")
    OpenAIReasoner("vlm", f"{server.url}/" if named else None).reason([ask("drink")])
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def test_a_servers_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="OPENAI_BASE_URL"):
        OpenAIReasoner("vlm")
    with pytest.raises(InputError, match="http://"):
        OpenAIReasoner("vlm", "localhost:8000")
    with pytest.raises(InputError, match="max_new_tokens"):
        OpenAIReasoner("vlm", "http://localhost").reason([ask("drink")], max_new_tokens=0)
    wrong = {"prompt": "none", "timeout": 0, "max_retries": -1, "concurrency": 0, "max_image_bytes": 100}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=name):
            OpenAIReasoner("vlm", "http://localhost", **{name: value})  # type: ignore[arg-type]


# --- servers as they should not be ---


def drop(handler: ChatHandler) -> None:
    """Hang up without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: ChatHandler) -> None:
    """Hang up in the middle of the answer."""
    handler.speak(PIECES[:3], None, logprobs=True)


def break_off_a_chunk(handler: ChatHandler) -> None:
    """The same in HTTP 1.1, whose chunks tell the client how much is missing."""
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "A desk"}}]}\n\n'
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.wfile.write(b"%x\r\n%s\r\nff\r\ndata: " % (len(event), event))


def stall(handler: ChatHandler) -> None:
    time.sleep(5)


def stall_in_the_answer(handler: ChatHandler) -> None:
    handler.speak(PIECES[:3], None, logprobs=True)
    time.sleep(5)


def refuse(status: int, **headers: str) -> Fault:
    body = json.dumps({"error": {"message": "the model is not loaded"}}).encode()
    return lambda handler: handler.reply(status, body, **headers)


def say(body: bytes, kind: str = "text/event-stream") -> Fault:
    return lambda handler: handler.reply(200, body, kind)


def drip(start: bytes, drop: bytes) -> Fault:
    """Answer with a little at a time, and never with enough."""

    def fault(handler: ChatHandler) -> None:
        handler.wfile.write(start)
        for _ in range(100):
            time.sleep(0.05)
            handler.wfile.write(drop)

    return fault


@pytest.mark.parametrize(
    "fault", [drop, refuse(429), refuse(500), refuse(503), refuse(408), break_off, break_off_a_chunk]
)
def test_a_passing_trouble_passes(serve: Serve, fault: Fault) -> None:
    server = serve(faults=[fault])
    with within(3):
        [answer] = OpenAIReasoner("vlm", server.url).reason([ask("drink")])
    assert (answer.text, len(answer.tokens), len(server.asked)) == (TEXT, 6, 2)


def test_a_stream_that_has_said_nothing_is_asked_for_again(serve: Serve) -> None:
    pieces, _ = read(OpenAIReasoner("vlm", serve(faults=[refuse(500)]).url).stream(ask("drink")))
    assert "".join(pieces) == TEXT


def test_a_stream_that_breaks_off_is_an_error_and_nothing_is_said_twice(serve: Serve) -> None:
    server = serve(faults=[break_off])
    said = []
    with pytest.raises(ModelError, match="before the answer"):
        for piece in OpenAIReasoner("vlm", server.url).stream(ask("drink")):
            said.append(piece)
    assert "".join(said) == "A desk ☕."
    assert len(server.asked) == 1


def test_a_busy_server_is_given_the_time_it_asks_for(serve: Serve) -> None:
    server = serve(faults=[refuse(429, Retry_After="1")])
    started = time.monotonic()
    OpenAIReasoner("vlm", server.url).reason([ask("drink")])
    assert 1 <= time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("fault", "tries", "says"),
    [
        (drop, 2, "Connection error"),
        (break_off, 2, "before the answer"),
        (break_off_a_chunk, 2, "Connection error"),
        (refuse(500), 2, "not loaded"),
        (refuse(429), 2, "not loaded"),
        (refuse(400), 1, "not loaded"),
        (refuse(401), 1, "not loaded"),
        (refuse(404), 1, "not loaded"),
        (say(b"<!DOCTYPE html><html>Welcome</html>", "text/html"), 1, "text/html"),
        (say(b'{"choices": [{"index": 0, "mess', "application/json"), 1, "application/json"),
        (say(b"", "text/plain"), 1, "text/plain"),
        (say(b'data: {"choices": [{"delta": {"con\n\n'), 1, "no chat completion"),
        (say(b"data: 7\n\n"), 1, "no chat completion"),
        (say(b"data: [1, 2]\n\n"), 1, "no chat completion"),
        (say(b'data: {"choices": "none"}\n\n'), 1, "no chat completion"),
        (say(b'data: {"choices": [{"delta": null}]}\n\n'), 1, "no chat completion"),
        (say(b'data: {"choices": [{"delta": {"content": 7}}]}\n\n'), 1, "no chat completion"),
        (say(b"data: \xff\xfe\x00\n\n"), 1, "no chat completion"),
        (say(b'data: {"error": "out of memory"}\n\n'), 1, "out of memory"),
        (say(b"data: [DONE]\n\n"), 2, "before the answer"),
    ],
)
def test_a_trouble_that_stays_is_an_error_that_names_server_and_reason(
    serve: Serve, fault: Fault, tries: int, says: str
) -> None:
    server = serve(faults=itertools.repeat(fault))
    reasoner = OpenAIReasoner("vlm", server.url, max_retries=1)
    with within(3), pytest.raises(ModelError, match=f"(?s){server.url}.*{says}"):
        reasoner.reason([ask("drink")])
    assert len(server.asked) == tries


@pytest.mark.parametrize(
    "fault",
    [
        stall,
        stall_in_the_answer,
        lambda handler: handler.speak([b"talk "] * 100, "stop", logprobs=True, pause=0.05),
        drip(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", b": still there\n\n"),
        drip(b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
        refuse(429, Retry_After="100"),
    ],
    ids=["stalls", "stalls in the answer", "a token at a time", "comments for ever", "headers for ever", "come later"],
)
def test_nobody_waits_longer_than_the_time_out(serve: Serve, fault: Fault) -> None:
    reasoner = OpenAIReasoner("vlm", serve(faults=itertools.repeat(fault)).url, timeout=0.5)
    for call in (lambda: reasoner.reason([ask("drink")]), lambda: read(reasoner.stream(ask("drink")))):
        with within(2), pytest.raises(ModelError, match=r"within 0\.5 s"):
            call()


def test_an_absent_server_is_an_error_with_its_address() -> None:
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1.*refused"):
        OpenAIReasoner("vlm", "http://127.0.0.1:9/v1", max_retries=0).reason([ask("drink")])


# --- the ways in ---


def test_the_command_line_asks_a_server(serve: Serve, tiny_detector_folder: Path, tmp_path: Path) -> None:
    server = serve()
    image().save(tmp_path / "a.png")
    parts = ["--reasoner", "some/vlm", "--detector", str(tiny_detector_folder), "--base-url", server.url]
    command = ["detect", str(tmp_path / "a.png"), "drink", *parts, "--box-threshold", "0", "--json"]
    ran = CliRunner().invoke(app, command, env={"DETGPT_REASONER_KEY": "mine", "OPENAI_API_KEY": "s3cret"})
    assert ran.exit_code == 0, ran.output
    confidence = pytest.approx(math.exp(-0.5), abs=1e-4)
    assert json.loads(ran.stdout)["targets"] == [{"name": "cup", "confidence": confidence, "found": True}]
    assert server.asked[0]["model"] == "some/vlm"
    assert server.headers[0]["Authorization"] == "Bearer mine"


@pytest.mark.parametrize("command", [["chat"], ["batch", "-i", "drink", "-o", "out.jsonl"]])
def test_a_pairs_reasoner_may_run_elsewhere(
    serve: Serve, tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    server = serve(b"The server speaks.", b'\nTargets: ["cup"]')
    monkeypatch.chdir(tmp_path)
    image().save("a.png")
    model = ["--model", str(tiny_pair_folder), "--base-url", server.url]
    ran = CliRunner().invoke(
        app, [command[0], "a.png" if command == ["chat"] else ".", *command[1:], *model], "drink\n"
    )
    assert ran.exit_code == 0, ran.output
    assert "The server speaks." in ran.stdout + "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_a_pair_may_name_a_server(serve: Serve, tiny_detector_folder: Path, tmp_path: Path) -> None:
    server = serve()
    (tmp_path / "detector").symlink_to(tiny_detector_folder)
    described = {"reasoner": "some/vlm", "detector": "detector", "base_url": server.url}
    (tmp_path / "detgpt.json").write_text(json.dumps(described))
    model = DetGPT.from_pretrained(tmp_path)
    assert [target.name for target in model.detect(image(), "drink").targets] == ["cup"]
    assert server.asked[0]["model"] == "some/vlm"


# --- a server of others ---


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the built-in reasoner.

    It comes with transformers, needs only what the tests need anyway (fastapi, uvicorn, openai), and runs any class of
    transformers on a CPU. vLLM's package is built for CUDA and pins an older torch and transformers than these tests
    run with. `transformers serve` gives no token probabilities: those are tested with the server above.
    """
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", SERVED]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *options], stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(10)


SERVED = str(REPOSITORY / "weights/picto/reasoner")
KITCHEN = REPOSITORY / "examples/kitchen.png"


@pytest.fixture(scope="module")
def local() -> DetGPT:
    return DetGPT.from_pretrained("picto", device="cpu")


@pytest.fixture(scope="module")
def served(transformers_serve: str, local: DetGPT) -> DetGPT:
    return DetGPT(OpenAIReasoner(SERVED, transformers_serve, prompt="bare"), local.detector, options=local.options)


@pytest.mark.parametrize("wish", ["I am thirsty", "I want to cut something", "I want to drive a nail into the wall"])
def test_a_served_model_names_and_boxes_what_the_same_model_does_here(served: DetGPT, local: DetGPT, wish: str) -> None:
    there, here = served.detect(KITCHEN, wish), local.detect(KITCHEN, wish)
    assert [target.name for target in there.targets] == [target.name for target in here.targets]
    assert there.answer == here.answer
    assert there.labels == here.labels and np.array_equal(there.boxes, here.boxes)
    assert {target.confidence for target in there.targets} <= {None}


def test_a_served_model_streams_converses_and_takes_several_at_once(served: DetGPT, local: DetGPT) -> None:
    *pieces, result = served.stream(KITCHEN, "I am thirsty")
    assert len(pieces) > 10 and "".join(pieces) == result.answer  # type: ignore[union-attr]
    there, here = served.chat(KITCHEN), local.chat(KITCHEN)
    for wish in ("I am thirsty", "I am hungry"):
        assert there.ask(wish).answer == here.ask(wish).answer
    wishes = ["I am thirsty", "I am hungry", "I want to cut something"]
    answers = [result.answer for result in served.detect_batch([(KITCHEN, wish) for wish in wishes])]
    assert answers == [local.detect(KITCHEN, wish).answer for wish in wishes]


def test_a_model_that_is_not_served_is_told_with_its_name(transformers_serve: str) -> None:
    with pytest.raises(ModelError, match="pinned"):
        OpenAIReasoner("another/model", transformers_serve).reason([ask("drink")])
