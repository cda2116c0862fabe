"""`detgpt serve` as its clients meet it: real servers in processes of their own, spoken to over HTTP.

Most of them answer from a script, so that a request takes as long as its wish says and every answer is known; one
runs the built-in model.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import detgpt
from detgpt.errors import InputError, MissingExtraError
from detgpt.serve import Serving, create_app, run

pytest.importorskip("fastapi")

EXAMPLES = Path(__file__).parents[1] / "examples"
PROBLEM = "application/problem+json"

PICTO = """
from detgpt import DetGPT
load = lambda: DetGPT.from_pretrained("picto", device="cpu")
"""

# A wish "1.5 red cup" takes 1.5 seconds in the model and names the red cup; its box is the whole image.
SCRIPTED = """
import time
import numpy as np
from detgpt import DetGPT
from detgpt.detectors import Grounding
from detgpt.reasoners.scripted import ScriptedReasoner

def answer(request):
    seconds, name = request.instruction.split(" ", 1)
    time.sleep(float(seconds))
    if name == "crash":
        raise RuntimeError("the model died in /etc/secret")
    return f'I see it.\\nTargets: ["{name}"]'

class WholeImage:
    name = "whole-image"

    def detect(self, images, names, *, box_threshold=0.25, text_threshold=0.25, prompting="separate"):
        if ["vanish"] in [list(asked) for asked in names]:
            raise RuntimeError("the detector died in /etc/secret")
        asked = [list(some) if box_threshold <= 0.5 else [] for some in names]
        return [
            Grounding(
                np.array([[0, 0, *image.size]] * len(some), np.float32).reshape(-1, 4),
                np.full(len(some), 0.5, np.float32),
                np.arange(len(some)),
            )
            for image, some in zip(images, asked)
        ]

load = lambda: DetGPT(ScriptedReasoner(answer), WholeImage())
"""

# Always outlines, in up to nine parts: every pixel of a box is its thing.
OUTLINED = (
    SCRIPTED
    + """
from detgpt import Options

class WholeBox:
    name = "whole-box"

    def segment(self, image, boxes):
        masks = np.zeros((len(boxes), image.height, image.width), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
            mask[y0:y1, x0:x1] = True
        return masks

load = lambda: DetGPT(
    ScriptedReasoner(answer), WholeImage(), segmenter=WholeBox(), options=Options(tiles=3, masks=True)
)
"""
)

START = "import sys, json\nfrom detgpt.serve import Serving, run\nrun(load, Serving(**json.loads(sys.argv[1])))"


class Service:
    """A server process, and a client for it."""

    def __init__(self, model: str, **settings: Any) -> None:
        settings.setdefault("port", free_port())
        self.url = f"http://127.0.0.1:{settings['port']}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", model + START, json.dumps(settings)], stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True).start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        wait_for(lambda: self.answers("/ready"))

    def answers(self, path: str) -> bool:
        assert self.process.poll() is None, "".join(self.log)
        with contextlib.suppress(httpx.TransportError):
            return self.client.get(path).status_code == 200
        return False

    def detect(self, image: bytes | None = None, path: str = "/v1/detect", **fields: Any) -> httpx.Response:
        files = (
            {"image": image or png()} if "image_url" not in fields else {"image_url": (None, fields.pop("image_url"))}
        )
        return self.client.post(path, files=files, data=fields)

    def metric(self, name: str) -> float:
        """The sum over a metric's labels that `name` leaves open."""
        start, *labels = name.rstrip("}").split("{")
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(start) and all(x in line for x in labels)
        )

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "gray").save(file, "PNG")
    return file.getvalue()


def events(text: str) -> list[tuple[str, Any]]:
    return [(name, json.loads(data)) for name, data in re.findall(r"^event: (\w+)\ndata: (.*)\n\n", text, re.MULTILINE)]


def at_once(*calls: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """The responses to calls that are made together."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


@contextlib.contextmanager
def under_way(service: Service, *wishes: str) -> Iterator[list[httpx.Response]]:
    """While requests with these wishes are in the service; afterwards the list holds their responses."""
    responses: list[httpx.Response] = []
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = pool.map(lambda wish: service.detect(instruction=wish), wishes)
        wait_for(lambda: service.metric("detgpt_in_flight") == len(wishes))
        yield responses
        responses += answers


@pytest.fixture(scope="module")
def picto() -> Iterator[Service]:
    with Service(PICTO) as service:
        yield service


@pytest.fixture(scope="module")
def scripted() -> Iterator[Service]:
    with Service(SCRIPTED, max_batch=4, max_wait=0.2, queue=60, timeout=20) as service:
        yield service


@pytest.fixture(scope="module")
def narrow() -> Iterator[Service]:
    """One request at work, one that waits, four seconds for each; and who asks must have a key."""
    origins, keys = ["https://shop.example"], ["right", "also-right"]
    settings = {"max_batch": 1, "queue": 1, "timeout": 4, "allow_urls": True, "api_keys": keys, "cors_origins": origins}
    with Service(SCRIPTED, **settings) as service:
        service.client.headers["Authorization"] = "Bearer right"
        yield service


# --------------------------------------------------------------------------------------------------- the answer


@pytest.fixture(scope="module")
def expected() -> detgpt.Detections:
    return detgpt.detect(EXAMPLES / "kitchen.png", "I am thirsty")


def assert_same(answer: dict[str, Any], expected: detgpt.Detections) -> None:
    got = detgpt.Detections.from_dict(answer)
    assert (got.answer, got.reasoning, got.labels) == (expected.answer, expected.reasoning, expected.labels)
    assert got.image_wh == expected.image_wh
    assert abs(got.boxes - expected.boxes).max(initial=0) < 1
    assert abs(got.scores - expected.scores).max(initial=0) < 0.01


def test_every_way_to_send_a_picture_gives_what_detect_gives(picto: Service, expected: detgpt.Detections) -> None:
    data = (EXAMPLES / "kitchen.png").read_bytes()
    text = base64.encodebytes(data).decode()  # with line breaks, as the base64 command writes it
    uploaded = picto.detect(data, instruction="I am thirsty")
    assert uploaded.headers["content-type"] == "application/json"
    assert_same(uploaded.json(), expected)
    for image in (text, f"data:image/png;base64,{text}"):
        assert_same(
            picto.client.post("/v1/detect", json={"image": image, "instruction": "I am thirsty"}).json(), expected
        )


def test_names_are_found_without_reasoning(picto: Service) -> None:
    answer = picto.detect((EXAMPLES / "kitchen.png").read_bytes(), names=["coffee", "soda"]).json()
    assert [target["name"] for target in answer["targets"]] == ["coffee", "soda"]
    assert answer["instruction"] is None and answer["reasoning"] == ""
    assert {found["label"] for found in answer["detections"]} <= {"coffee", "soda"}


def test_the_reasoning_streams_and_then_come_the_detections(picto: Service, expected: detgpt.Detections) -> None:
    data = (EXAMPLES / "kitchen.png").read_bytes()
    response = picto.detect(data, "/v1/detect/stream", instruction="I am thirsty")
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, (last, answer) = events(response.text)
    assert len(pieces) > 3 and {name for name, _ in pieces} == {"reasoning"}
    assert "".join(piece["text"] for _, piece in pieces) == expected.answer
    assert last == "detections"
    assert_same(answer, expected)


def test_a_server_that_was_started_with_masks_sends_them_unless_a_client_wants_none() -> None:
    with Service(OUTLINED) as service:
        first = service.detect(instruction="0 cup").json()
        assert detgpt.Detections.from_dict(first).masks.all()
        assert first["detections"][0]["mask"] == {"size": [30, 40], "counts": [0, 1200]}
        assert "mask" not in service.detect(instruction="0 cup", masks=False, tiles=1).json()["detections"][0]
        assert service.detect(instruction="0 cup", tiles=3).status_code == 200
        assert service.detect(instruction="0 cup", tiles=4).status_code == 422


def test_names_may_be_streamed_too(scripted: Service) -> None:
    response = scripted.detect(path="/v1/detect/stream", names=["cup"])
    assert [name for name, _ in events(response.text)] == ["detections"]


def test_different_pictures_in_one_batch_get_their_own_answers(picto: Service) -> None:
    asked = [(path, wish) for path in sorted(EXAMPLES.glob("*.png")) for wish in ("I am thirsty", "It is raining")]
    direct = [detgpt.detect(path, wish) for path, wish in asked]
    before = picto.metric("detgpt_batch_size_count")
    responses = at_once(
        *(lambda path=path, wish=wish: picto.detect(path.read_bytes(), instruction=wish) for path, wish in asked)
    )
    assert picto.metric("detgpt_batch_size_count") - before < len(asked)  # some went together
    for response, result in zip(responses, direct, strict=True):
        assert_same(response.json(), result)


def test_fifty_clients_at_once_each_get_the_answer_to_their_picture(scripted: Service) -> None:
    batches = scripted.metric("detgpt_batch_size_count")

    async def ask(client: httpx.AsyncClient, number: int) -> dict[str, Any]:
        # Pictures and wishes all differ, and so do the options of every other one.
        fields = {"instruction": f"0.01 thing {number}", "box_threshold": str(number % 2)}
        response = await client.post("/v1/detect", files={"image": png((100 + number, 50))}, data=fields)
        assert response.status_code == 200, response.text
        return response.json()

    async def all_at_once() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=scripted.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(50)))

    for number, answer in enumerate(asyncio.run(all_at_once())):
        assert answer["image_wh"] == [100 + number, 50]
        assert [target["name"] for target in answer["targets"]] == [f"thing {number}"]
        boxes = [found["xyxy"] for found in answer["detections"]]
        assert boxes == ([] if number % 2 else [[0, 0, 100 + number, 50]])
    assert scripted.metric("detgpt_batch_size_count") - batches <= 25  # four to a batch, had all come together


# ------------------------------------------------------------------------------------------------ when it goes wrong


def bomb() -> bytes:
    """A small PNG whose header promises ten thousand million pixels."""
    whole = png()
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + whole[24:29]
    return whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"hello, I am no picture", "text, not an image"),
        (bytes(range(256)) * 20, "not an image in a supported format"),
        (png((300, 300))[:200], "damaged"),
        (bomb(), "over the limit"),
        (png((20_000, 2_000)), "over the limit of 32000000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text, not an image"),
    ],
    ids=["text", "noise", "truncated", "bomb", "too-large", "postscript"],
)
def test_a_bad_picture_is_refused_with_what_is_wrong(scripted: Service, image: bytes, says: str) -> None:
    response = scripted.detect(image, instruction="0 cup")
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)
    assert says in response.json()["detail"]


def test_a_wide_picture_within_the_limit_is_answered(scripted: Service) -> None:
    assert scripted.detect(png((20_000, 50)), instruction="0 cup").json()["detections"][0]["xyxy"] == [0, 0, 20_000, 50]


PICTURE = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "give one picture"),
        ({"image": PICTURE}, "give one wish"),
        ({"image": PICTURE, "instruction": "cup", "names": ["cup"]}, "give one wish"),
        ({"image": PICTURE, "image_url": "http://a.example", "instruction": "cup"}, "give one picture"),
        ({"image": PICTURE, "instruction": " "}, "instruction is empty"),
        ({"image": PICTURE, "instruction": "x" * 3000}, "instruction"),
        ({"image": PICTURE, "names": []}, "names"),
        ({"image": PICTURE, "names": [" "]}, "empty"),
        ({"image": PICTURE, "names": ["cup"] * 51}, "names"),
        ({"image": PICTURE, "names": "cup"}, "names"),
        ({"image": str(EXAMPLES / "kitchen.png"), "instruction": "cup"}, "image: must be the base64"),
        ({"image": "file:///etc/passwd", "instruction": "cup"}, "image: must be the base64"),
        ({"image": 7, "instruction": "cup"}, "image: must be the base64"),
        ({"image": PICTURE, "instruction": "cup", "box_threshold": 7}, "box_threshold"),
        ({"image": PICTURE, "instruction": "cup", "box_threshold": "0.5"}, "box_threshold"),
        ({"image": PICTURE, "instruction": "cup", "prompting": "together"}, "prompting='together'"),
        ({"image": PICTURE, "instruction": "cup", "max_new_tokens": 10**6}, "at most 512"),
        ({"image": PICTURE, "instruction": "cup", "tiles": 2}, "tiles may be at most 1"),
        ({"image": PICTURE, "instruction": "cup", "tiles": 0}, "tiles"),
        ({"image": PICTURE, "instruction": "cup", "masks": True}, "masks may be at most False"),
        ({"image": PICTURE, "instruction": "cup", "box_treshold": 0.5}, "box_treshold"),
        ({"image_url": "http://example.com/a.png", "instruction": "cup"}, "fetches no addresses"),
        ([], "should be an object"),
    ],
)
def test_a_wrong_request_is_told_which_field_is_wrong(scripted: Service, body: Any, says: str) -> None:
    response = scripted.client.post("/v1/detect", json=body)
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)
    assert says in response.json()["detail"]


def part(name: str, value: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 422),
        (b"[" * 10_000, "application/json", 422),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b"", "", 415),
        (b"no form", "multipart/form-data", 400),
        (b"no form", "multipart/form-data; boundary=x", 400),
        (part("instruction", b"\xff\xff") + b"--x--\r\n", "multipart/form-data; boundary=x", 422),
        (part("prompting", b"joint") * 2 + b"--x--\r\n", "multipart/form-data; boundary=x", 422),
    ],
)
def test_what_is_no_request_is_refused(scripted: Service, content: bytes, kind: str, status: int) -> None:
    response = scripted.client.post("/v1/detect", content=content, headers={"Content-Type": kind})
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused(scripted: Service, announced: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(60):
            yield bytes(2**20)

    content = b"".join(chunks()) if announced else chunks()
    response = scripted.client.post("/v1/detect", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_a_failing_request_takes_no_other_with_it_and_tells_nothing_of_the_server(scripted: Service) -> None:
    good, bad, also_good = at_once(
        *(lambda wish=wish: scripted.detect(instruction=wish) for wish in ("0 cup", "0 crash", "0 lamp"))
    )
    assert good.json()["targets"][0]["name"] == "cup"
    assert also_good.json()["targets"][0]["name"] == "lamp"
    assert (bad.status_code, bad.headers["content-type"]) == (500, PROBLEM)
    assert "secret" not in bad.text and "Traceback" not in bad.text
    wait_for(lambda: "the model died" in "".join(scripted.log))


def test_a_stream_that_fails_ends_with_an_error(scripted: Service) -> None:
    response = scripted.detect(path="/v1/detect/stream", instruction="0 vanish")
    *_, (last, told) = events(response.text)
    assert (last, told["status"]) == ("error", 500)
    assert "secret" not in response.text
    wait_for(lambda: "the detector died" in "".join(scripted.log))
    assert scripted.metric('detgpt_requests_total{stream"{status="500"') == 1


def test_other_addresses_and_methods_answer_with_problems_too(scripted: Service) -> None:
    for response, status in ((scripted.client.get("/nothing"), 404), (scripted.client.get("/v1/detect"), 405)):
        assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)


# ------------------------------------------------------------------------------------- queue, time and coming and going


def test_a_full_queue_answers_429_and_when_to_try_again_and_is_not_ready(narrow: Service) -> None:
    with under_way(narrow, "1.2 cup", "1.2 cup") as accepted:
        refused = narrow.detect(instruction="0 cup")
        ready, health = narrow.client.get("/ready"), narrow.client.get("/health")
    assert [response.status_code for response in accepted] == [200, 200]
    assert (refused.status_code, refused.headers["content-type"]) == (429, PROBLEM)
    assert int(refused.headers["Retry-After"]) >= 1
    assert (ready.status_code, health.status_code) == (503, 200)
    assert narrow.client.get("/ready").status_code == 200
    assert narrow.detect(instruction="0 cup").status_code == 200  # there is room again


def test_after_the_timeout_a_request_is_answered_504_and_dropped_from_the_queue(narrow: Service) -> None:
    before = narrow.metric("detgpt_batch_size_sum")
    start = time.monotonic()
    late = at_once(*[lambda: narrow.detect(instruction="5 cup")] * 2)
    assert time.monotonic() - start < 5
    assert [(answer.status_code, answer.headers["content-type"]) for answer in late] == [(504, PROBLEM)] * 2
    assert narrow.detect(instruction="0 cup").status_code == 200
    assert narrow.metric("detgpt_batch_size_sum") - before == 2  # the one at work, and the last


def test_a_client_who_hangs_up_gives_back_its_place(narrow: Service) -> None:
    before = narrow.metric("detgpt_batch_size_sum")
    impatient = httpx.Timeout(5, read=0.3)
    with under_way(narrow, "1.5 cup") as stayed, pytest.raises(httpx.ReadTimeout):
        narrow.client.post("/v1/detect", files={"image": png()}, data={"instruction": "0 cup"}, timeout=impatient)
    assert stayed[0].status_code == 200
    wait_for(lambda: narrow.metric('detgpt_requests_total{status="499"') == 1)
    assert narrow.metric("detgpt_batch_size_sum") - before == 1
    assert (narrow.metric("detgpt_queue_depth"), narrow.metric("detgpt_in_flight")) == (0, 0)


def test_a_stream_that_nobody_hears_stops_the_model(picto: Service) -> None:
    start = picto.metric('detgpt_requests_total{stream"')
    files, data = {"image": (EXAMPLES / "kitchen.png").read_bytes()}, {"instruction": "I am thirsty"}
    with picto.client.stream("POST", "/v1/detect/stream", files=files, data=data) as response:
        next(response.iter_text())
    wait_for(lambda: picto.metric('detgpt_requests_total{stream"') == start + 1)
    assert picto.answers("/ready")
    assert picto.detect(files["image"], **data).status_code == 200


def test_sigterm_lets_running_and_waiting_requests_finish() -> None:
    with Service(SCRIPTED, max_batch=1) as service:
        with under_way(service, "1.5 cup", "1.5 cup") as answers:
            service.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not connects(service.url))
            assert service.process.poll() is None  # it takes no more, but is still at work
        assert [response.status_code for response in answers] == [200, 200]
        assert service.process.wait(30) == -signal.SIGTERM
        assert not any("Traceback" in line for line in service.log)


def connects(url: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), 1):
        return True
    return False


def test_after_a_crash_it_starts_again_on_the_same_port() -> None:
    port = free_port()
    with Service(SCRIPTED, port=port) as first, pytest.raises(httpx.TransportError), under_way(first, "9 cup"):
        first.process.kill()
    with Service(SCRIPTED, port=port) as second:
        assert second.detect(instruction="0 cup").status_code == 200


def test_a_taken_port_is_told_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        run(lambda: pytest.fail("the model was loaded"), Serving(port=taken.getsockname()[1]))


# --------------------------------------------------------------------------------------------------- who may do what


def test_without_a_key_nothing_is_answered(narrow: Service) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "right"}):
        response = httpx.post(
            f"{narrow.url}/v1/detect", files={"image": png()}, data={"instruction": "0 cup"}, headers=header
        )
        assert (response.status_code, response.headers["content-type"]) == (401, PROBLEM)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert httpx.get(f"{narrow.url}/health").status_code == 200
    also = {"Authorization": "Bearer also-right"}
    ran = httpx.post(f"{narrow.url}/v1/detect", files={"image": png()}, data={"instruction": "0 cup"}, headers=also)
    assert ran.status_code == 200


def test_web_pages_read_answers_only_where_that_is_allowed(scripted: Service, narrow: Service) -> None:
    page = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in scripted.client.get("/health", headers=page).headers
    asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert narrow.client.options("/v1/detect", headers=asks).status_code == 200
    allowed = narrow.client.get("/health", headers=page).headers
    assert allowed["access-control-allow-origin"] == "https://shop.example"
    other = narrow.client.get("/health", headers={"Origin": "https://evil.example"}).headers
    assert "access-control-allow-origin" not in other


@pytest.fixture
def website() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and the paths that were asked of it."""
    asked: list[str] = []

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", f"http://{self.path[4:]}:{self.server.server_address[1]}/picture.png")
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(png((70, 50)))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1"])
def test_an_address_in_the_servers_own_network_is_never_fetched(
    narrow: Service, website: tuple[str, list[str]], host: str
) -> None:
    url, asked = website
    response = narrow.detect(image_url=url.replace("127.0.0.1", host) + "/picture.png", instruction="x")
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)
    assert "cannot be fetched" in response.json()["detail"]
    assert asked == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "ftp://example.com/a.png", "http://", "x"])
def test_only_web_addresses_are_fetched(narrow: Service, url: str) -> None:
    response = narrow.detect(image_url=url, instruction="x")
    assert response.status_code == 422
    assert "cannot be fetched" in response.json()["detail"]


def test_a_public_address_is_fetched_but_not_its_redirect_into_the_network(website: tuple[str, list[str]]) -> None:
    url, asked = website
    # There is no internet in a test: to this one server 127.0.0.1 is public; 127.0.0.2 stays what it is.
    public = "import detgpt.download\ndetgpt.download._is_public = lambda address: address == '127.0.0.1'\n"
    with Service(SCRIPTED + public, allow_urls=True) as service:
        fetched = service.detect(image_url=f"{url}/picture.png", instruction="0 cup")
        assert fetched.json()["image_wh"] == [70, 50]
        assert service.detect(image_url=f"{url}/to/127.0.0.1", instruction="0 cup").status_code == 200
        asked.clear()
        refused = service.detect(image_url=f"{url}/to/127.0.0.2", instruction="0 cup")
    assert refused.status_code == 422
    assert "non-public" not in refused.text  # nothing about who is there
    assert asked == ["/to/127.0.0.2"]


# ---------------------------------------------------------------------------------------------- document and numbers


def test_the_metrics_count_requests_by_outcome_their_time_and_the_batches(scripted: Service) -> None:
    names = {
        'requests_total{endpoint="/v1/detect"{status="200"': 3,
        'requests_total{endpoint="/v1/detect"{status="422"': 1,
        'request_seconds_count{endpoint="/v1/detect"': 3,
        "batch_size_sum": 3,
    }
    before = {name: scripted.metric(f"detgpt_{name}") for name in names}
    at_once(*[lambda: scripted.detect(instruction="0 cup")] * 3)
    scripted.detect(b"no picture", instruction="0 cup")
    assert {name: scripted.metric(f"detgpt_{name}") - before[name] for name in names} == names


def test_the_document_names_every_option_and_describes_the_answer(scripted: Service) -> None:
    document = scripted.client.get("/openapi.json").json()
    body = document["paths"]["/v1/detect"]["post"]["requestBody"]["content"]
    for kind in ("application/json", "multipart/form-data"):
        properties = body[kind]["schema"]["properties"]
        assert set(detgpt.Options.__dataclass_fields__) < set(properties)
        assert all(properties[name]["description"] for name in properties)
    answer = scripted.detect(instruction="0 cup").json()
    assert set(document["components"]["schemas"]["Answer"]["properties"]) == set(answer)


def test_what_is_sent_at_random_is_answered_as_the_document_says(scripted: Service) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    from detgpt.serve.app import COSTLY

    document = schemathesis.openapi.from_url(f"{scripted.url}/openapi.json")
    # A document cannot say "base64 of a picture", so that what fits it may still be refused.
    left_out = [checks.positive_data_acceptance]
    seen: dict[str, set[int]] = {}
    for found in document.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def answered(case: Any) -> None:
            if isinstance(case.body, dict) and len(str(case.body)) % 2:  # every other one gets further
                case.body.update(image=PICTURE if case.media_type == "application/json" else png())
                case.body.pop("image_url", None)
                case.body.pop("names", None)
                case.body["instruction"] = "0 cup"
                for costly in COSTLY:
                    case.body.pop(costly, None)
            response = case.call_and_validate(excluded_checks=left_out)
            seen.setdefault(case.path, set()).add(response.status_code)

        answered()
    assert set(seen) == {"/v1/detect", "/v1/detect/stream", "/health", "/ready", "/metrics"}
    assert {200, 422} <= seen["/v1/detect"] and {200, 422} <= seen["/v1/detect/stream"]


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_batch": 0}, "max_batch=0"),
        ({"queue": 0}, "queue=0"),
        ({"max_wait": 70}, "max_wait=70"),
        ({"api_keys": ("",)}, "API key is empty"),
        ({"api_keys": ("two words",)}, "holds a space"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Serving(**settings)


def test_without_its_extra_the_service_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fastapi", "detgpt.serve."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delattr("detgpt.serve.app", raising=False)
    for start in (lambda: create_app(None), lambda: run(lambda: pytest.fail("the model was loaded"), Serving())):  # type: ignore[arg-type]
        with pytest.raises(MissingExtraError, match=r"pip install 'detgpt\[serve\]'"):
            start()


def test_importing_the_service_loads_no_web_framework() -> None:
    code = "import detgpt.serve, sys; assert not {'fastapi', 'uvicorn', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
