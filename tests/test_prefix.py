"""An image is encoded once, and nobody can tell from the answers: the same text and probabilities as without."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image

from detgpt.errors import InputError
from detgpt.images import image_key
from detgpt.reasoners import RawAnswer, Request, Turn
from detgpt.reasoners.huggingface import HuggingFaceReasoner

REPOSITORY = Path(__file__).parent.parent
BUILT_IN = "the built-in model"
WISHES = ["I am thirsty after a long day in the sun", "tea", "something to read"]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


A, B, C = picture((64, 48), 0), picture((30, 60), 1), picture((50, 50), 2)


class Compared:
    """A reasoner that keeps prefixes beside one of the same weights that keeps none."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.keeping = HuggingFaceReasoner(folder, device="cpu", **options)
        self.plain = HuggingFaceReasoner(folder, device="cpu", kept_images=0)
        self.looks = self.pixels = 0
        base = self.keeping._model.base_model
        encode = base.get_image_features

        @functools.wraps(encode)
        def counted(**kwargs: Any) -> Any:
            self.looks += 1
            self.pixels += kwargs["pixel_values"].numel()
            return encode(**kwargs)

        base.get_image_features = counted

    def forget(self) -> None:
        self.keeping._prefixes.clear()

    def ask(self, *requests: Request) -> int:
        """Both answer, and alike; how often the keeping one ran its image tower."""
        before = self.looks
        answers = self.keeping.reason(requests, max_new_tokens=12)
        assert_same(answers, self.plain.reason(requests, max_new_tokens=12))
        return self.looks - before


def assert_same(answers: Sequence[RawAnswer], expected: Sequence[RawAnswer]) -> None:
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert [token.logprob for token in answer.tokens] == pytest.approx(
            [token.logprob for token in other.tokens], abs=1e-4
        )


@pytest.fixture(scope="module", params=[*FAMILIES, BUILT_IN])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    if request.param == BUILT_IN:
        return Compared(REPOSITORY / "weights" / "picto" / "reasoner")
    torch.manual_seed(0)
    return Compared(FAMILIES[request.param](tmp_path_factory.mktemp("family")))


@pytest.fixture
def compared(loaded: Compared) -> Compared:
    loaded.forget()
    return loaded


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return FAMILIES["LLaVA 1.5"](tmp_path_factory.mktemp("llava"))


def test_another_instruction_on_an_image_does_not_encode_it_again(compared: Compared) -> None:
    assert compared.ask(Request(A, WISHES[0])) == 1
    assert compared.ask(Request(A.copy(), WISHES[1])) == 0
    assert compared.ask(Request(A, WISHES[2])) == 0


def test_the_turns_of_a_conversation_do_not_encode_the_image_again(compared: Compared) -> None:
    history: tuple[Turn, ...] = ()
    for turn, wish in enumerate(WISHES):
        request = Request(A, wish, history)
        assert compared.ask(request) == (1 if turn == 0 else 0)
        assert compared.ask(Request(B, wish)) == (1 if turn == 0 else 0)  # another client talks in between
        history += (Turn(wish, compared.plain.reason([request], max_new_tokens=12)[0].text),)


def test_another_image_is_looked_at(compared: Compared) -> None:
    assert compared.ask(Request(A, WISHES[0])) == 1
    one_pixel_off = A.copy()
    one_pixel_off.putpixel((0, 0), (0, 0, 0) if A.getpixel((0, 0)) != (0, 0, 0) else (255, 255, 255))
    assert compared.ask(Request(one_pixel_off, WISHES[0])) == 1
    assert compared.ask(Request(A.rotate(180), WISHES[0])) == 1


def test_several_instructions_at_once_encode_their_image_once(compared: Compared) -> None:
    together = [Request(A, wish) for wish in WISHES]
    before = compared.pixels
    assert compared.ask(*together) == 1
    once = compared.pixels - before
    assert compared.ask(*reversed(together)) == 0
    compared.forget()
    compared.ask(Request(A, WISHES[0]))
    assert compared.pixels == before + 2 * once
    for request in together:
        assert compared.ask(request) == 0


def test_a_batch_of_several_images_goes_on_from_each(compared: Compared) -> None:
    turns = (Turn(WISHES[1], "A cup."),)
    requests = [Request(A, WISHES[0]), Request(B, WISHES[1]), Request(A, WISHES[2], turns), Request(C, WISHES[2])]
    assert compared.ask(*requests[:2]) == 1  # nothing is shared: both images in one pass
    assert compared.ask(*requests) == 1  # only the new one
    assert compared.ask(*requests) == 0


def test_a_stream_goes_on_from_a_kept_image(compared: Compared) -> None:
    compared.ask(Request(A, WISHES[0]))
    stream = compared.keeping.stream(Request(A, WISHES[1]), max_new_tokens=12)
    pieces, looks = [], compared.looks
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            answer = stop.value
            break
    assert_same([answer], compared.plain.reason([Request(A, WISHES[1])], max_new_tokens=12))
    assert "".join(pieces) == answer.text
    assert compared.looks == looks


def test_only_the_last_images_are_kept(llava: Path) -> None:
    compared = Compared(llava, kept_images=2)
    for image in (A, B, A, C):  # B is now the one that was asked about the longest ago
        compared.ask(Request(image, WISHES[0]))
    assert list(compared.keeping._prefixes._kept) == [image_key(A), image_key(C)]
    assert compared.ask(Request(A, WISHES[1])) == 0
    assert compared.ask(Request(B, WISHES[1])) == 1
    assert compared.ask(*[Request(image, wish) for image in (A, B, C) for wish in WISHES]) == 1  # one pass for them all
    assert len(compared.keeping._prefixes._kept) == 2


def test_a_kept_prompt_takes_no_more_than_its_own_tokens(llava: Path) -> None:
    """A row of a batch is a copy: it does not hold the tensors of the whole batch, nor the padding."""
    compared = Compared(llava)
    compared.ask(*[Request(A, wish) for wish in WISHES])
    (kept,) = compared.keeping._prefixes._kept.values()
    for part in (kept.ids, *(tensor for layer in kept.layers for tensor in layer)):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    assert all(part.shape[1] == len(kept.ids) for layer in kept.layers for part in layer)


def test_nothing_is_kept_where_it_is_switched_off(llava: Path) -> None:
    compared = Compared(llava, kept_images=0)
    assert [compared.ask(Request(A, wish)) for wish in WISHES] == [1, 1, 1]
    assert not compared.keeping._prefixes._kept
    with pytest.raises(InputError, match="kept_images"):
        HuggingFaceReasoner(llava, kept_images=-1)


@pytest.mark.parametrize("window", [8, 300, 1000])
def test_a_sliding_window_forgets_no_more_and_no_less(tmp_path: Path, window: int) -> None:
    """Windows shorter than the image, than the prompt, and than the conversation."""
    torch.manual_seed(0)
    folder = FAMILIES["Gemma 3"](tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    compared = Compared(folder)
    assert compared.ask(Request(A, WISHES[0])) == 1
    assert compared.ask(Request(A, WISHES[1], (Turn(WISHES[0], "A cup on a table. " * 9),))) == 0
    assert compared.ask(Request(A, WISHES[2])) == 0
    fits = window == 1000
    assert compared.ask(*[Request(A, wish) for wish in WISHES]) == (0 if fits else 1)


def llava_with_convolutions(folder: Path) -> Path:
    from transformers import AutoProcessor, Lfm2Config, LlavaConfig, LlavaForConditionalGeneration

    FAMILIES["LLaVA 1.5"](folder)
    config = LlavaConfig.from_pretrained(folder)
    size = config.text_config
    config.text_config = Lfm2Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = AutoProcessor.from_pretrained(folder).tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def test_a_language_model_with_a_state_runs_the_whole_prompt(tmp_path: Path) -> None:
    """A convolution's state cannot be taken back to the end of the image."""
    compared = Compared(llava_with_convolutions(tmp_path))
    assert [compared.ask(Request(A, wish)) for wish in WISHES] == [1, 1, 1]


def test_threads_that_share_a_reasoner_each_get_their_own_answer(compared: Compared) -> None:
    requests = [Request(image, wish) for wish in WISHES for image in (A, B)]
    answers: dict[int, RawAnswer] = {}

    def work(index: int) -> None:
        answers[index] = compared.keeping.reason([requests[index]], max_new_tokens=12)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [compared.plain.reason([request], max_new_tokens=12)[0] for request in requests]
    assert_same([answers[index] for index in range(len(requests))], expected)
