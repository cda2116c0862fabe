"""A smaller model, or the prompt, drafts the answer: the text is the same, and the model runs less often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from PIL import Image
from test_families import PICTURES, WISHES
from test_prefix import assert_same, llava_with_convolutions

from detgpt import DetGPT
from detgpt.errors import ModelError
from detgpt.reasoners import Request, Turn
from detgpt.reasoners.huggingface import HuggingFaceReasoner

REPOSITORY = Path(__file__).parent.parent
PICTO = REPOSITORY / "weights" / "picto"
KITCHEN = REPOSITORY / "examples" / "kitchen.png"


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a smaller one that is right now and then: the same without its last layer."""
    torch.manual_seed(0)
    path = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    model = HuggingFaceReasoner(path)._model
    layers = model.get_decoder().layers
    smaller = tmp_path_factory.mktemp("smaller")
    del layers[-1]
    text = model.config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    model.save_pretrained(smaller)
    HuggingFaceReasoner(path)._processor.save_pretrained(smaller)
    return path, smaller


@pytest.mark.parametrize("how", ["itself", "smaller", "prompt"])
def test_an_assistant_changes_no_word_and_no_probability(family: tuple[Path, Path], how: str) -> None:
    path, smaller = family
    plain = HuggingFaceReasoner(path, kept_images=0)
    assisted = HuggingFaceReasoner(path, assistant={"itself": path, "smaller": smaller, "prompt": "prompt"}[how])
    requests = [Request(image, wish) for image, wish in zip(PICTURES, WISHES, strict=True)]
    requests.append(Request(PICTURES[0], WISHES[1], (Turn(WISHES[0], "A cup. A cup."),)))
    for request in requests:
        assert_same(assisted.reason([request], max_new_tokens=24), plain.reason([request], max_new_tokens=24))
    if how == "itself":
        assert assisted.acceptance > 0.9  # it sees the picture; a draft may be longer than what fits


@pytest.fixture(scope="module")
def picto() -> HuggingFaceReasoner:
    return HuggingFaceReasoner(PICTO / "reasoner", device="cpu")


@pytest.mark.parametrize("assistant", ["prompt", PICTO / "reasoner"])
def test_drafts_save_passes_of_the_model(picto: HuggingFaceReasoner, assistant: str | Path) -> None:
    """The built-in model, as a user gets it, asked the same thing twice."""
    image = Image.open(KITCHEN).convert("RGB")
    (first,) = picto.reason([Request(image, "I am thirsty")])
    history = (Turn("I am thirsty", first.text),)
    (expected,) = picto.reason([Request(image, "I am thirsty", history)])
    model = DetGPT(PICTO / "reasoner", PICTO / "detector", device="cpu", assistant=assistant)
    assert model.reasoner.acceptance is None
    passes: list[int] = []
    model.reasoner._model.register_forward_hook(lambda *_: passes.append(1))
    pieces = [piece for piece in model.stream(image, "I am thirsty", history=history) if isinstance(piece, str)]
    assert "".join(pieces) == expected.text
    assert 0 < model.reasoner.acceptance <= 1
    assert len(passes) < len(expected.tokens)


def test_a_batch_runs_as_it_does_without_drafts(picto: HuggingFaceReasoner) -> None:
    assisted = HuggingFaceReasoner(PICTO / "reasoner", device="cpu", assistant="prompt")
    requests = [Request(image, wish) for image, wish in zip(PICTURES, WISHES, strict=True)]
    assert_same(assisted.reason(requests, max_new_tokens=8), picto.reason(requests, max_new_tokens=8))
    assert assisted.acceptance is None


def test_an_assistant_that_reads_prompts_otherwise_is_refused(tmp_path: Path) -> None:
    other = FAMILIES["LLaVA 1.5"](tmp_path)
    with pytest.raises(ModelError, match=r"assistant .* reads a prompt as other tokens"):
        HuggingFaceReasoner(PICTO / "reasoner", assistant=other)
    with pytest.raises(ModelError, match="no model folder"):
        HuggingFaceReasoner(PICTO / "reasoner", assistant=tmp_path / "missing")


def test_a_model_that_cannot_take_a_token_back_is_refused(tmp_path: Path) -> None:
    folder = llava_with_convolutions(tmp_path)
    with pytest.raises(ModelError, match="cannot take back a token"):
        HuggingFaceReasoner(folder, assistant="prompt")
