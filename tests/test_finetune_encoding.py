"""Encoded conversations: a model learns the answers and nothing else, and is asked in training as at inference."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, chatml, tokenizer, turns
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from detgpt.errors import InputError, ModelError
from detgpt.reasoners import Request, Turn
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from finetune.batching import IGNORED, Padded
from finetune.encoding import RecordEncoder, encode, truncated

ANSWERS = ['A desk.\nTargets: ["cup"]', "Targets: []"]
TALK = [
    {"role": "user", "content": "I am thirsty"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "only <image> cold ones"},
    {"role": "assistant", "content": ANSWERS[1]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp("family")) for name, build in FAMILIES.items()}


@pytest.fixture(scope="module")
def image():
    return Image.effect_noise((60, 40), 90).convert("RGB")


def learned(encoded, tokens):
    """The texts that the labels say, one for each run of tokens that is learned."""
    runs, before = [], IGNORED
    for label in encoded["labels"].tolist():
        if label != IGNORED:
            runs = [*runs, [label]] if before == IGNORED else [*runs[:-1], [*runs[-1], label]]
        before = label
    return [tokens.decode(run) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_is_the_answers_and_their_ends(folders, image, family):
    processor = AutoProcessor.from_pretrained(folders[family])
    end = processor.tokenizer.eos_token
    for picture in (image, None):
        encoded = encode(processor, TALK, picture)
        assert learned(encoded, processor.tokenizer) == [answer + end for answer in ANSWERS]
        assert ("pixel_values" in encoded) == (picture is not None)
        taught = encoded["labels"] != IGNORED
        assert torch.equal(encoded["labels"][taught], encoded["input_ids"][taught])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wish_is_asked_in_training_as_at_inference(folders, image, family, tmp_path):
    picture = tmp_path / "picture.png"
    image.save(picture)
    reasoner = HuggingFaceReasoner(folders[family], device="cpu")
    request = Request(image, TALK[2]["content"], (Turn(TALK[0]["content"], ANSWERS[0]),))
    asked = reasoner._encode([request])["input_ids"][0].tolist()
    record = {"image": str(picture), "instruction": TALK[0]["content"], "messages": TALK}
    ids = RecordEncoder(reasoner._processor, bare=False).encode(record)["input_ids"].tolist()
    assert ids[: len(asked)] == asked


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_learned_has_no_gradient(folders, image, family):
    processor = AutoProcessor.from_pretrained(folders[family])
    model = AutoModelForImageTextToText.from_pretrained(folders[family])
    batch = Padded(processor.tokenizer.pad_token_id)(
        [encode(processor, TALK, image), encode(processor, TALK[:2], image)]
    )
    output = model(**batch)
    output.logits.retain_grad()
    output.loss.backward()
    has_gradient = output.logits.grad.abs().sum(-1) > 0
    is_learned = torch.nn.functional.pad(batch["labels"] != IGNORED, (0, 1))[:, 1:]  # each logit speaks of the next
    assert torch.equal(has_gradient, is_learned)


def text_tokenizer(template):
    tokens = tokenizer("<|im_start|>", end="<|im_end|>")
    tokens.chat_template = template
    return tokens


TEXT_TEMPLATE = chatml("").replace("{% for part in message.content %}", "{{ message.content }}{% for part in [] %}")


def test_a_language_model_is_encoded_through_its_tokenizer():
    tokens = text_tokenizer(TEXT_TEMPLATE)
    encoded = encode(tokens, [{"role": "system", "content": "Be brief."}, *TALK])
    assert set(encoded) == {"input_ids", "labels"}
    assert learned(encoded, tokens) == [answer + "<|im_end|>" for answer in ANSWERS]
    with pytest.raises(InputError, match="sees no image"):
        encode(tokens, TALK, Image.new("RGB", (8, 8)))


def test_an_answer_that_the_template_leaves_open_gets_its_end(folders, image):
    """LLaVA 1.5's own template: a space after each text, and no end token at all."""
    processor = AutoProcessor.from_pretrained(folders["LLaVA 1.5"])
    processor.chat_template = turns("USER: ", "<image>\n", " ", answers="ASSISTANT:", end_of_answer=" ")
    encoded = encode(processor, TALK, image)
    assert learned(encoded, processor.tokenizer) == [ANSWERS[0], ANSWERS[1] + "</s>"]
    assert encoded["input_ids"][-1] == processor.tokenizer.eos_token_id


def test_a_template_that_rewrites_what_was_said_is_refused(folders, image):
    processor = AutoProcessor.from_pretrained(folders["Qwen3-VL"])
    processor.chat_template = "{{ messages | length }} turns\n" + processor.chat_template
    with pytest.raises(ModelError, match="beginning in another way"):
        encode(processor, TALK, image)
    processor.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        encode(processor, TALK, image)


def test_a_long_example_is_cut_but_not_into_one_without_an_answer(folders, image):
    processor = AutoProcessor.from_pretrained(folders["Qwen3-VL"])
    encoded = encode(processor, TALK, image)
    begins = int((encoded["labels"] != IGNORED).nonzero()[0])
    cut = truncated(encoded, begins + 3, "data.jsonl:1")
    assert {len(cut[name]) for name in ("input_ids", "labels", "mm_token_type_ids")} == {begins + 3}
    assert torch.equal(cut["pixel_values"], encoded["pixel_values"])
    with pytest.raises(InputError, match=rf"data.jsonl:1: the answer begins at token {begins}, behind max_length=9"):
        truncated(encoded, 9, "data.jsonl:1")


def test_records_are_encoded_as_they_are_drawn(folders, image, tmp_path):
    """With and without a picture in one batch; a conversation goes as it is, a bare model's wish as well."""
    picture = Path(tmp_path / "picture.png")
    image.save(picture)
    processor = AutoProcessor.from_pretrained(folders["Qwen3-VL"])
    rows = {"image": [str(picture), None], "instruction": ["I am thirsty", None], "messages": [TALK, TALK]}
    drawn = RecordEncoder(processor, bare=False)(rows)
    assert drawn["pixel_values"][0] is not None and drawn["pixel_values"][1] is None
    texts = [processor.tokenizer.decode(ids) for ids in drawn["input_ids"]]
    assert ["three steps" in text for text in texts] == [True, False]
    assert "three steps" not in processor.tokenizer.decode(RecordEncoder(processor, bare=True)(rows)["input_ids"][0])
    with pytest.raises(InputError, match="nothing said"):
        RecordEncoder(processor, bare=True)({"image": [None], "messages": [[]]})
