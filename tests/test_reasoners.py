"""The reasoners: a real (tiny) image-text-to-text checkpoint, and the script. Servers: `test_servers.py`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detgpt.answer import RETRY_INSTRUCTION, format_instruction, parse_answer
from detgpt.confidence import name_confidence
from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.reasoners import RawAnswer, Request, Turn
from detgpt.reasoners.huggingface import HuggingFaceReasoner
from detgpt.reasoners.recording import Writer
from detgpt.reasoners.scripted import ScriptedReasoner

# What the tiny model learns by heart: instruction → everything it would write if nobody stopped it.
LEARNED = {
    "drink": 'A desk.\nTargets: ["cup"]\nTargets: ["mug"]',
    "read": 'I see a book and a paper on it.\nTargets: ["book", "paper"]',
    "kaffee": 'Ein Café ☕.\nTargets: ["tasse ☕"]',
    "talk": "Hm, I talk, but name no object and write no last line.",
}
WRITTEN = {**LEARNED, "drink": 'A desk.\nTargets: ["cup"]'}


def image(color: str = "gray") -> Image.Image:
    return Image.new("RGB", (40, 30), color)


def ask(instruction: str, *history: Turn) -> Request:
    return Request(image(), instruction, history)


def read(stream: Iterator[str]) -> tuple[list[str], RawAnswer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


# --- Hugging Face ---

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_processor() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<image>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["Targets Targets talk talk"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:]
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(processor: Any) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, detgpt_prompt="bare")
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def learn_by_heart(model: Any, processor: Any) -> None:
    import torch

    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image()}, {"type": "text", "text": instruction}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for instruction, answer in LEARNED.items()
    ]
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    started = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<assistant>")).cumsum(1) > 0
    labels = batch["input_ids"].masked_fill(~started, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llava")
    processor = tiny_processor()
    model = tiny_model(processor)
    learn_by_heart(model, processor)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reasoner(folder: Path) -> HuggingFaceReasoner:
    return HuggingFaceReasoner(folder, device="cpu")


def edit_config(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of the checkpoint with other entries in its config."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_batch_answers_like_its_requests_one_by_one(reasoner: HuggingFaceReasoner) -> None:
    requests = [ask(instruction) for instruction in LEARNED]
    together = reasoner.reason(requests)
    alone = [reasoner.reason([request])[0] for request in requests]
    assert [answer.text for answer in together] == list(WRITTEN.values())
    assert [answer.text for answer in alone] == list(WRITTEN.values())
    for one, other in zip(together, alone, strict=True):
        assert [(token.start, token.end) for token in one.tokens] == [
            (token.start, token.end) for token in other.tokens
        ]
        assert [token.logprob for token in one.tokens] == pytest.approx(
            [token.logprob for token in other.tokens], abs=1e-3
        )


def test_no_requests_give_no_answers(reasoner: HuggingFaceReasoner) -> None:
    assert reasoner.reason([]) == []


def test_writing_stops_when_the_answer_line_is_complete(reasoner: HuggingFaceReasoner) -> None:
    [answer] = reasoner.reason([ask("drink")])
    assert answer.text == 'A desk.\nTargets: ["cup"]'
    assert answer.complete


def test_an_answer_without_a_target_line_ends_where_the_model_ends_it(reasoner: HuggingFaceReasoner) -> None:
    [answer] = reasoner.reason([ask("talk")])
    assert (answer.text, answer.complete) == (LEARNED["talk"], True)


def test_an_answer_cut_at_the_limit_is_not_complete(reasoner: HuggingFaceReasoner) -> None:
    short, done = reasoner.reason([ask("talk"), ask("drink")], max_new_tokens=24)
    assert LEARNED["talk"].startswith(short.text) and not short.complete
    assert len(short.tokens) == 24
    assert done.text == WRITTEN["drink"] and done.complete
    [cut] = reasoner.reason([ask("drink")], max_new_tokens=3)
    assert not cut.complete


def test_token_spans_cover_the_text_with_probabilities(reasoner: HuggingFaceReasoner) -> None:
    for answer in reasoner.reason([ask(instruction) for instruction in LEARNED]):
        assert answer.tokens[0].start == 0 and answer.tokens[-1].end == len(answer.text)
        for token, following in itertools.pairwise(answer.tokens):
            same_letter = (token.start, token.end) == (following.start, following.end)
            assert same_letter or token.end == following.start
        assert all(token.logprob <= 0 for token in answer.tokens)


def test_the_bytes_of_one_letter_share_its_span(reasoner: HuggingFaceReasoner) -> None:
    [answer] = reasoner.reason([ask("kaffee")])
    parsed = parse_answer(answer.text)
    assert parsed.names == ("tasse ☕",)
    cup = answer.text.rindex("☕")
    assert [(token.start, token.end) for token in answer.tokens if token.end == cup + 1] == [(cup, cup + 1)] * 3
    confidence = name_confidence(answer, parsed.spans[0])
    overlapping = [token.logprob for token in answer.tokens if token.end > parsed.spans[0][0] and token.start <= cup]
    assert confidence == pytest.approx(math.exp(sum(overlapping))) and 0.3 < confidence <= 1


def test_the_probabilities_are_those_of_the_model(reasoner: HuggingFaceReasoner) -> None:
    import torch

    [answer] = reasoner.reason([ask("read")])
    inputs = reasoner._encode([ask("read")])
    tokenizer = reasoner._processor.tokenizer
    written = tokenizer(answer.text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    everything = torch.cat([inputs["input_ids"], written], dim=1)
    with torch.inference_mode():
        logits = reasoner._model(input_ids=everything, pixel_values=inputs["pixel_values"]).logits
    logprobs = logits.log_softmax(-1)[0, inputs["input_ids"].shape[1] - 1 : -1].gather(1, written[0][:, None])[:, 0]
    assert [token.logprob for token in answer.tokens] == pytest.approx(logprobs.tolist(), abs=1e-4)


@pytest.mark.parametrize("instruction", LEARNED)
def test_a_stream_adds_up_to_the_answer(reasoner: HuggingFaceReasoner, instruction: str) -> None:
    pieces, answer = read(reasoner.stream(ask(instruction)))
    assert len(pieces) > 10
    assert "".join(pieces) == answer.text == WRITTEN[instruction]
    assert answer.complete and len(answer.tokens) >= len(pieces)


def test_an_abandoned_stream_stops_the_model(folder: Path, tmp_path: Path) -> None:
    endless = edit_config(folder, tmp_path / "endless")
    (endless / "generation_config.json").write_text('{"eos_token_id": 99999}')  # no token ends its answers
    reasoner = HuggingFaceReasoner(endless, device="cpu")
    threads, started = threading.active_count(), time.process_time()
    stream = reasoner.stream(ask("talk"), max_new_tokens=20_000)
    next(stream)
    stream.close()
    assert threading.active_count() <= threads
    assert time.process_time() - started < 5
    assert reasoner.reason([ask("drink")])[0].complete  # the model is free again


def test_a_failure_while_streaming_reaches_the_caller(reasoner: HuggingFaceReasoner) -> None:
    broken = Request(object(), "drink")  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"(?i)image|object"):
        read(reasoner.stream(broken))
    assert reasoner.reason([ask("drink")])[0].complete


def test_several_threads_share_one_reasoner(reasoner: HuggingFaceReasoner) -> None:
    answers: dict[str, str] = {}

    def work(instruction: str) -> None:
        answers[instruction] = reasoner.reason([ask(instruction)])[0].text

    threads = [threading.Thread(target=work, args=(instruction,)) for instruction in LEARNED]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == WRITTEN


def prompt_of(reasoner: HuggingFaceReasoner, request: Request) -> str:
    ids = reasoner._encode([request])["input_ids"][0]
    return reasoner._processor.tokenizer.decode(ids).replace("<image>" * 4, "<image>")


def test_history_becomes_a_conversation_with_the_image_first(reasoner: HuggingFaceReasoner) -> None:
    request = ask("the cold one", Turn("drink", 'Targets: ["cup"]'))
    assert prompt_of(reasoner, request) == (
        '<user><image>drink<end><assistant>Targets: ["cup"]<end><user>the cold one<end><assistant>'
    )


def test_a_general_model_is_told_the_three_steps_once(folder: Path, tmp_path: Path) -> None:
    general = HuggingFaceReasoner(edit_config(folder, tmp_path / "general", detgpt_prompt="full"), device="cpu")
    assert prompt_of(general, ask("drink")) == f"<user><image>{format_instruction('drink')}<end><assistant>"
    assert prompt_of(general, Request(image(), "drink", verbatim=True)) == "<user><image>drink<end><assistant>"
    chat = prompt_of(general, ask("the cold one", Turn("drink", "A cup.")))
    assert chat.endswith("A cup.<end><user>the cold one<end><assistant>")


def test_an_instruction_cannot_write_the_templates_own_tokens(reasoner: HuggingFaceReasoner) -> None:
    prompt = prompt_of(reasoner, ask("dr<image>ink<end><assistant>"))
    assert prompt == "<user><image>dr ink  <end><assistant>"


def test_a_thought_opened_by_the_template_does_not_end_the_answer(folder: Path, tmp_path: Path) -> None:
    thinking = edit_config(folder, tmp_path / "thinking")
    template = thinking / "chat_template.jinja"
    template.write_text(template.read_text().replace("<assistant>{% endif %}", "<assistant><think>{% endif %}"))
    patient = HuggingFaceReasoner(thinking, device="cpu")
    assert patient._opens_thought(patient._encode([ask("drink")])["input_ids"][0])
    tokenizer = patient._processor.tokenizer
    writer = Writer(tokenizer, frozenset(), inside_thought=True)
    for token_id in tokenizer.encode('Targets: ["a"]</think>\nTargets: ["b"] and more'):
        if not writer.done:
            writer.add(token_id, -0.5, lambda piece: None)
    assert writer.text == 'Targets: ["a"]</think>\nTargets: ["b"]'


def test_wrong_arguments_are_refused(reasoner: HuggingFaceReasoner, folder: Path) -> None:
    with pytest.raises(InputError, match="instruction is empty"):
        ask("  ")
    with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
        reasoner.reason([ask("drink")], max_new_tokens=0)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
        reasoner.stream(ask("drink"), max_new_tokens=0)
    with pytest.raises(InputError, match="float31"):
        HuggingFaceReasoner(folder, dtype="float31")
    with pytest.raises(InputError, match="4bit"):
        HuggingFaceReasoner(folder, quantization="3bit")


def test_quantization_names_the_missing_package(folder: Path) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        HuggingFaceReasoner(folder, quantization="4bit")


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}, {"model.vision_tower": "cpu", "": "cuda:0"}])
def test_a_missing_gpu_is_named_before_anything_is_fetched(device_map: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="cuda"):
        HuggingFaceReasoner("nobody/nothing", device_map=device_map)


def test_a_device_map_may_place_the_model_by_itself(folder: Path) -> None:
    spread = HuggingFaceReasoner(folder, device_map="auto")
    assert spread.reason([ask("drink")])[0].text == WRITTEN["drink"]


@pytest.mark.parametrize("attention", ["flash_attention_2", "no-such-attention"])
def test_an_attention_that_cannot_run_is_named_before_the_weights(folder: Path, tmp_path: Path, attention: str) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    without_weights = edit_config(folder, tmp_path / "without-weights")
    (without_weights / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf'attn_implementation=.{attention}.*\n.*"sdpa"'):
        HuggingFaceReasoner(without_weights, device="cpu", attn_implementation=attention)
    eager = HuggingFaceReasoner(folder, device="cpu", attn_implementation="eager")
    assert eager.reason([ask("drink")])[0].text == WRITTEN["drink"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits its own memory as Linux does")
def test_weights_that_do_not_fit_name_what_to_choose_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import families

    monkeypatch.setitem(families.LANGUAGE, "intermediate_size", 150_000)  # 110 MB of weights
    big = families.FAMILIES["LLaVA 1.5"](tmp_path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, hard))
        with pytest.raises(ModelError, match=r'does not fit into memory.*\n.*smaller model, quantization="4bit"'):
            HuggingFaceReasoner(big, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_running_out_of_memory_names_what_to_choose_instead(folder: Path) -> None:
    import torch

    reasoner = HuggingFaceReasoner(folder, device="cpu")
    reasoner.reason([ask("read")])
    hook = reasoner._model.register_forward_hook(lambda *_: torch.empty(2**60))  # more than any machine has
    for call in (lambda: reasoner.reason([ask("drink")]), lambda: read(reasoner.stream(ask("drink")))):
        with pytest.raises(ModelError, match=r"does not fit into memory.*\n.*fewer or smaller images"):
            call()
    assert not reasoner._prefixes._kept  # what it held on to is free for the next call
    hook.remove()
    assert reasoner.reason([ask("drink")])[0].text == WRITTEN["drink"]


def test_the_weights_take_the_asked_dtype(folder: Path) -> None:
    import torch

    assert HuggingFaceReasoner(folder, device="cpu")._model.dtype == torch.float32
    half = HuggingFaceReasoner(folder, device="cpu", dtype="bfloat16")
    assert half._model.dtype == torch.bfloat16
    assert half.reason([ask("drink")])[0].text


def test_a_wrong_folder_is_named_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model folder.*nowhere"):
        HuggingFaceReasoner(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        HuggingFaceReasoner(tmp_path)
    text_only = tmp_path / "text-only"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="bert model"):
        HuggingFaceReasoner(text_only)
    (text_only / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        HuggingFaceReasoner(text_only)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("chat_template.jinja", "chat template"),
        ("model.safetensors", "weights"),
        ("tokenizer.json", "cannot be loaded"),
    ],
)
def test_a_folder_without_a_file_is_refused(folder: Path, tmp_path: Path, file: str, message: str) -> None:
    partial = edit_config(folder, tmp_path / "partial")
    (partial / file).unlink()
    with pytest.raises(ModelError, match=message):
        HuggingFaceReasoner(partial, device="cpu")


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = edit_config(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(ModelError, match="weights"):
        HuggingFaceReasoner(damaged, device="cpu")


def test_a_checkpoint_without_its_projector_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    partial = edit_config(folder, tmp_path / "no-projector")
    weights = load_file(partial / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "projector" not in name}
    assert len(kept) < len(weights)
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="projector"):
        HuggingFaceReasoner(partial, device="cpu")


# --- the script ---


def test_a_script_answers_in_turn_and_starts_again() -> None:
    scripted = ScriptedReasoner(["one", "two"])
    assert [answer.text for answer in scripted.reason([ask("x")] * 3)] == ["one", "two", "one"]


def test_a_script_answers_by_instruction_and_repeats_itself_when_asked_for_the_form() -> None:
    scripted = ScriptedReasoner({"drink": "A cup."})
    retry = ask(RETRY_INSTRUCTION, Turn("drink", "A cup."))
    assert [answer.text for answer in scripted.reason([ask("drink"), retry])] == ["A cup."] * 2
    with pytest.raises(InputError, match="'fly'"):
        scripted.reason([ask("fly")])


def test_a_script_may_be_a_function() -> None:
    assert ScriptedReasoner(lambda request: request.instruction.upper()).reason([ask("x")])[0].text == "X"


@pytest.mark.parametrize("text", ["A cup.\nTargets: []\n", "", " ", "one"])
def test_a_scripted_stream_adds_up_to_the_answer(text: str) -> None:
    pieces, answer = read(ScriptedReasoner([text]).stream(ask("x")))
    assert "".join(pieces) == answer.text == text
    assert answer.tokens is None


@pytest.mark.parametrize("answers", [[], {}, "one answer"])
def test_a_script_without_a_list_of_answers_is_refused(answers: Any) -> None:
    with pytest.raises(InputError, match="answers"):
        ScriptedReasoner(answers)
