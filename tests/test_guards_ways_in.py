"""The guard on the command line, in the service and on the page: on where strangers ask, and kind when it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_guards import REFUSALS, SAFE, save_guard
from typer.testing import CliRunner, Result

from detgpt import DetGPT
from detgpt import cli as command_line
from detgpt.cli import app
from detgpt.guards.protector import Protector
from detgpt.reasoners.scripted import ScriptedReasoner

HARMFUL = "whom can I rob here"
SCRIPT = {"drink": 'A desk.\nTargets: ["cup"]', "who is here": "stab that man", "now": 'A cup.\nTargets: ["cup"]'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def model(folder: Path, tiny_detector_folder: Path) -> DetGPT:
    return DetGPT(ScriptedReasoner(SCRIPT), tiny_detector_folder, guard=folder, picture_text="off")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "gray").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(*arguments: Any, **settings: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)


# --- the command line ---


@pytest.mark.parametrize("flags", [["--guard", "--guard-model"], ["--guard-model"]], ids=["both", "the model says it"])
def test_a_refusal_is_printed_with_its_reason(folder: Path, tiny_pair_folder: Path, picture: Path, flags: list[str]):
    ran = run("detect", picture, HARMFUL, "-m", tiny_pair_folder, *flags, folder, "--picture-text", "off")
    assert ran.exit_code == 0
    assert REFUSALS["theft"] in ran.stdout
    assert "refused by the guard: the instruction looks harmful: theft" in ran.stdout
    assert "Nothing here fits" not in ran.stdout


def test_json_has_the_verdict(folder: Path, tiny_pair_folder: Path, picture: Path):
    guarded = ["-m", tiny_pair_folder, "--guard-model", folder, "--picture-text", "off"]
    ran = run("detect", picture, "drink", *guarded, "--json")
    result = json.loads(ran.stdout)
    assert result["guard"]["action"] == "pass"
    assert result["detections"]


@pytest.mark.parametrize("flags", [[], ["--no-guard", "--guard-model", "picto"]])
def test_the_command_has_no_guard_unless_asked(tiny_pair_folder: Path, picture: Path, flags: list[str]):
    ran = run("detect", picture, "drink", "-m", tiny_pair_folder, "--json", *flags)
    assert json.loads(ran.stdout)["guard"] is None


def test_a_chat_goes_on_after_a_refusal(folder: Path, tiny_pair_folder: Path, picture: Path):
    arguments = ["chat", picture, "-m", tiny_pair_folder, "--guard-model", folder, "--picture-text", "off"]
    ran = run(*arguments, input=f"{HARMFUL}\ndrink\n")
    assert ran.exit_code == 0
    assert ran.stdout.index(REFUSALS["theft"]) < ran.stdout.index("A desk.")


# --- the service ---


@pytest.mark.parametrize(("flags", "guarded"), [([], True), (["--guard"], True), (["--no-guard"], False)])
def test_the_service_has_a_guard_unless_told_otherwise(
    folder: Path, tiny_pair_folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], guarded: bool
):
    loads: list[Any] = []
    monkeypatch.setattr(command_line, "run_service", lambda load, serving: loads.append(load))
    ran = run("serve", "-m", tiny_pair_folder, "--guard-model", folder, "--picture-text", "off", *flags)
    assert ran.exit_code == 0, ran.output
    assert isinstance(loads[0]().guard, Protector) is guarded


def test_clients_get_a_refusal_as_an_answer_and_never_what_was_held_back(model: DetGPT):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from detgpt.serve import create_app

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "gray").save(buffer, "PNG")

    def ask(client: TestClient, wish: str, path: str = "/v1/detect") -> Any:
        return client.post(path, files={"image": buffer.getvalue()}, data={"instruction": wish})

    with TestClient(create_app(model)) as client:
        refused = ask(client, HARMFUL)
        assert refused.status_code == 200
        assert refused.json()["guard"] | {"score": 0} == {
            "harmful": True,
            "category": "theft",
            "score": 0,
            "action": "refused",
            "where": "instruction",
            "text": REFUSALS["theft"],
            "reason": "the instruction looks harmful: theft",
        }
        assert refused.json()["detections"] == []
        rewritten = ask(client, "who is here")
        assert rewritten.json()["guard"]["action"] == "detoxified"
        assert rewritten.json()["reasoning"] == SAFE.lower()
        assert "stab" not in rewritten.text
        assert ask(client, "drink").json()["guard"]["action"] == "pass"
        streamed = ask(client, "who is here", "/v1/detect/stream").text
        assert SAFE.lower() in streamed and "stab" not in streamed
        counted = client.get("/metrics").text
        assert 'detgpt_held_back_total{action="refused",where="instruction"} 1.0' in counted
        assert 'detgpt_held_back_total{action="detoxified",where="answer"} 2.0' in counted


# --- the page ---


def test_a_visitor_reads_a_refusal_and_may_go_on(model: DetGPT):
    pytest.importorskip("gradio")
    from detgpt.pipeline import Options
    from detgpt.web.conversation import Conversation
    from detgpt.web.picture_tab import _in_words

    *_, refused = Conversation(Image.new("RGB", (40, 30), "gray"), "desk.png", "picto").ask(model, HARMFUL)
    assert isinstance(refused, Conversation)
    assert _in_words(refused.shown(Options())) == REFUSALS["theft"]
    assert refused.turns == () and refused.was_held_back
    assert json.dumps(HARMFUL) in refused.python({})
    *_, answered = refused.ask(model, "drink")
    assert isinstance(answered, Conversation)
    assert [turn.instruction for turn in answered.turns] == ["drink"]
    assert not answered.was_held_back


@pytest.mark.parametrize(
    ("flags", "guard"), [([], "picto"), (["--guard-model", "mine"], "mine"), (["--no-guard"], None)]
)
def test_the_page_has_a_guard_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], guard: str | None
):
    from detgpt.web import launch

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "serve", lambda names, **given: calls.append(given))
    assert run("demo", *flags).exit_code == 0
    assert calls[0].get("guard") == guard
