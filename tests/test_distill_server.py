"""A teacher behind a server that tells the log-probabilities of a prompt, in vLLM's protocol: the built-in model,
served by a few lines of HTTP."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from detgpt.errors import InputError, ModelError
from finetune.distill import teacher
from finetune.distill.cache import Cache
from finetune.distill.recalibration import recalibration
from finetune.loading import Checkpoint, load

pytest.importorskip("openai")

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/seen"


class Server(ThreadingHTTPServer):
    """Reads a prompt of token ids, or a conversation with a picture, and tells `most` tokens of each place."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.processor = load(Checkpoint(model="picto"), "float32")
        self.lock, self.asked, self.most, self.tells, self.template = threading.Lock(), [], 20, True, None

    def told(self, asked):
        if "prompt" in asked:
            inputs = {"input_ids": torch.tensor([asked["prompt"]])}
        else:
            turns = [{**turn, "content": [_part(part) for part in turn["content"]]} for turn in asked["messages"]]
            inputs = self.processor.apply_chat_template(
                [turns], tokenize=True, return_dict=True, return_tensors="pt", chat_template=self.template
            )
        with self.lock, torch.inference_mode():
            logprobs = self.model(**inputs).logits[0].log_softmax(-1)
        rows = [None]
        for row, token in zip(logprobs[:-1], inputs["input_ids"][0, 1:].tolist(), strict=True):
            likeliest = row.topk(min(asked["prompt_logprobs"], self.most)).indices.tolist()
            rows.append({str(i): {"logprob": row[i].item()} for i in {*likeliest, token}})
        return rows


def _part(part):
    if part["type"] == "text":
        return part
    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(content)).convert("RGB")}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        told = {"prompt_logprobs": self.server.told(asked)} if self.server.tells else {}
        is_chat = self.path.endswith("/chat/completions")
        said = {"message": {"role": "assistant", "content": "a"}} if is_chat else {"text": "a"}
        choice = {"index": 0, "finish_reason": "length", **said, **({} if is_chat else told)}
        reply = {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice], **(told if is_chat else {})}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    served = Server()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def records(tmp_path):
    lines = [json.loads(line) for line in (SPLIT / "data.jsonl").read_text().splitlines()[:3]]
    said = [{"role": "user", "content": "is a cup a tool?"}, {"role": "assistant", "content": "No. A cup holds tea."}]
    rows = [{**line, "image": str(SPLIT / line["image"]), "reasoning": "I see it."} for line in lines]
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [{"messages": said}, *rows])))
    return folder


def cached(records, output, server=None, **settings):
    if server is not None:
        settings["server"] = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "served", "retries": 0}
    teacher.run(teacher.Config(model="picto", train=records, output=output, **settings))
    return Cache(output)


def test_a_served_teacher_says_what_it_says_here(server, records, tmp_path):
    served, local = cached(records, tmp_path / "served", server), cached(records, tmp_path / "local")
    assert (served.header.teacher, served.header.temperatures) == ("served", (1.0,))
    assert served.header.rows == local.header.rows
    rows = torch.arange(local.header.rows)
    theirs, ours = served.kept(rows), local.kept(rows)
    assert (theirs.ids == ours.ids).float().mean() > 0.98
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, rtol=2e-3, atol=3e-3)
    torch.testing.assert_close(theirs.tails[:, 0].exp(), ours.tails[:, 0].exp(), rtol=0, atol=2e-3)
    paths = [path for path, _ in server.asked]
    assert paths.count("/v1/completions") == 1 and paths.count("/v1/chat/completions") == 3
    assert all(asked["model"] == "served" and asked["max_tokens"] == 1 for _, asked in server.asked)
    found = json.loads((tmp_path / "served/concentration.json").read_text())
    assert len(found["mass"]) == 5  # a server tells no more than it is asked for


def test_what_a_server_cannot_tell_is_said(server, records, tmp_path):
    served = cached(records, tmp_path / "served", server)
    with pytest.raises(InputError, match="needs the tail at two temperatures"):
        recalibration(served.header, "temperature")
    assert recalibration(served.header, "smoothing", 0.1).strength == 0.1
    with pytest.raises(ValueError, match="a server tells its likeliest tokens alone"):
        cached(records, tmp_path / "random", server, kept="random")


def test_a_server_that_does_not_do_is_refused(server, records, tmp_path):
    server.most = 2
    with pytest.raises(InputError, match="start it with --max-logprobs 5"):
        cached(records, tmp_path / "few", server)
    server.most, server.template = 20, server.processor.chat_template.replace("</s>", "</s> ")
    with pytest.raises(ModelError, match="line 2: the server writes this conversation in another way"):
        cached(records, tmp_path / "template", server)
    server.tells = False
    with pytest.raises(ModelError, match="tells no prompt_logprobs: serve the teacher by vLLM"):
        cached(records, tmp_path / "silent", server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ModelError, match="did not answer"):
        cached(records, tmp_path / "gone", server)
    assert not list(tmp_path.rglob("*.safetensors"))
