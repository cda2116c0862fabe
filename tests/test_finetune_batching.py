"""Batches for training: whatever way they are made, the loss and the gradients are those of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from detgpt.errors import InputError
from finetune.batching import PACKABLE_TEXT, PACKABLE_WITH_PICTURES, LengthBuckets, best_fit, collator, draw_by_length

TURNS = [
    ("tea", "A cup."),
    ("I am thirsty after a long day in the sun", 'I see a glass and a bottle of water.\nTargets: ["glass", "bottle"]'),
    ("something to read", 'Targets: ["book"]'),
    ("what keeps the rain off, and where do I find it?", "Nothing."),
    ("hm", 'There is a lamp on the desk beside the window.\nTargets: ["lamp"]'),
    ("hi", "Hello."),
]
SIZES = [(64, 48), None, (30, 60), (50, 50), None, None]  # three conversations have no picture


def examples(processor: Any) -> list[dict[str, Any]]:
    """As the training stages encode them: the labels are the answer's tokens."""
    return [encoded(processor, *turn, size, seed) for seed, (turn, size) in enumerate(zip(TURNS, SIZES, strict=True))]


def encoded(processor: Any, wish: str, answer: str, size: tuple[int, int] | None, seed: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": wish}]
    if size:
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
        content.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template([messages], add_generation_prompt=True, **options)["input_ids"].shape[1]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    example = dict(processor.apply_chat_template([messages], **options))
    example["labels"] = example["input_ids"].clone()
    example["labels"][:, :asked] = -100
    return example


def loss_and_gradient(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def assert_same_step(model: Any, batch: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    loss, gradient = loss_and_gradient(model, batch)
    other_loss, other_gradient = loss_and_gradient(model, other)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    torch.manual_seed(0)
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("family"))
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture
def family(any_family: tuple[Any, Any]) -> tuple[Any, Any]:
    if any_family[0].config.model_type not in PACKABLE_WITH_PICTURES:
        pytest.skip("is not packed")
    return any_family


def text_model(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    size |= {"vocab_size": 300, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = AutoConfig.for_model(kind, **{**size, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def tokens(lengths: Sequence[int]) -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 300, (length,), generator=chance) for length in lengths]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]


class Tokenizer:
    pad_token_id = 0


# --- what a batch holds ---


def test_a_padded_batch_is_what_its_examples_are_one_by_one(any_family: tuple[Any, Any]) -> None:
    """The mean over the answers' tokens, whatever is padded and whether there is a picture."""
    model, processor = any_family
    these = examples(processor)
    collate = collator(model, processor)
    with torch.no_grad():
        alone = [(model(**collate([x])).loss.item(), int((x["labels"] != -100).sum())) for x in these]
        together = model(**collate(these)).loss.item()
    assert together == pytest.approx(sum(loss * n for loss, n in alone) / sum(n for _, n in alone), rel=1e-5)


@pytest.mark.parametrize("one_row", [False, True])
def test_a_packed_batch_is_the_padded_one(family: tuple[Any, Any], one_row: bool) -> None:
    """Loss and gradients, for all families, with and without pictures in a row."""
    model, processor = family
    these = examples(processor)
    pack = collator(model, processor, packing=True)
    pack._one_row = one_row  # as for flash attention, which needs a GPU
    packed, padded = pack(these), collator(model, processor)(these)
    assert (len(packed["input_ids"]) == 1) == one_row
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    assert_same_step(model, packed, padded)


def test_a_packed_batch_of_text_alone_is_the_padded_one(family: tuple[Any, Any]) -> None:
    model, processor = family
    these = [x for x in examples(processor) if x.get("pixel_values") is None]
    assert len(these) == 3
    assert_same_step(model, collator(model, processor, packing=True)(these), collator(model, processor)(these))


def test_a_neighbour_in_the_row_changes_nothing(family: tuple[Any, Any]) -> None:
    """The logits of an example, next to one neighbour and next to another."""
    model, processor = family
    collate = collator(model, processor, packing=True)
    first, *others = sorted(examples(processor), key=lambda x: -x["input_ids"].numel())
    width = first["input_ids"].numel()
    collate._one_row = True
    with torch.no_grad():
        logits = [model(**collate([first, other])).logits[0, :width] for other in others[:2]]
        behind = [model(**collate([other, first])).logits[0, :width] for other in others[:2]]
    for beside in logits[1:] + behind:  # the longest stands first, whatever the order
        torch.testing.assert_close(beside, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(PACKABLE_TEXT))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_text_is_the_padded_text(kind: str, attention: str) -> None:
    window = {"sliding_window": 6} if kind in ("mistral", "gemma3_text") else {}
    model = text_model(kind, **window)
    model.set_attn_implementation(attention)
    these = tokens([5, 17, 3, 9, 12, 1])
    packed = collator(model, Tokenizer, packing=True)(these)
    assert packed["input_ids"].shape == (3, 17)
    assert_same_step(model, packed, collator(model, Tokenizer)(these))


@pytest.mark.parametrize("kind", ["bloom", "opt", "mamba"])
def test_a_family_that_is_not_known_to_keep_examples_apart_is_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=rf"{kind}.*cannot be packed.*leave packing out"):
        collator(model, Tokenizer, packing=True)
    assert collator(model, Tokenizer)(tokens([2, 3]))["input_ids"].shape == (2, 3)


def test_gemma_3_with_pictures_is_refused(tmp_path: Path) -> None:
    folder = FAMILIES["Gemma 3"](tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(InputError, match="'gemma3' model cannot be packed"):
        collator(model, AutoProcessor.from_pretrained(folder), packing=True)


def test_a_language_model_with_a_state_is_refused(tmp_path: Path) -> None:
    from transformers import Lfm2Config

    folder = FAMILIES["LLaVA 1.5"](tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.config.text_config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(InputError, match=r"lfm2.*state"):
        collator(model, AutoProcessor.from_pretrained(folder), packing=True)


def test_flash_attention_gets_one_row() -> None:
    model = text_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    batch = collator(model, Tokenizer, packing=True)(tokens([5, 17, 3]))
    assert batch["input_ids"].shape == (1, 25)
    assert batch["position_ids"][0].tolist() == [*range(17), *range(5), *range(3)]


def test_the_first_token_is_no_answer_to_the_example_before_it() -> None:
    """Whole texts have labels from their first token on, as in pretraining."""
    batch = collator(text_model("llama"), Tokenizer, packing=True)(tokens([4, 4, 3]))
    starts = batch["position_ids"] == 0
    assert starts.sum() == 3 + 1  # of examples and of padding
    assert (batch["labels"][starts] == -100).all()


# --- order ---


def test_rows_are_filled_best_fit_first() -> None:
    assert best_fit([3, 9, 5, 4, 1], capacity=10) == [[1, 4], [2, 3], [0]]
    drawn = np.random.default_rng(0).integers(1, 100, 200).tolist()
    rows = best_fit(drawn, 100)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(drawn[i] for i in row) for row in rows) <= 100
    assert len(rows) < 1.06 * sum(drawn) / 100


LENGTHS = np.random.default_rng(0).integers(5, 500, 403).tolist()


def batches(sampler: LengthBuckets, size: int = 8) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(groups: Sequence[Sequence[int]]) -> float:
    """Share of padding in batches."""
    cells = sum(len(group) * max(LENGTHS[i] for i in group) for group in groups)
    return 1 - sum(LENGTHS) / cells


def test_batches_are_of_like_lengths_and_hold_every_example_once() -> None:
    groups = batches(LengthBuckets(LENGTHS, 8))
    assert sorted(i for group in groups for i in group) == list(range(403))
    assert padding(groups) < 0.15 < 0.35 < padding(batches(range(403)))
    assert max(LENGTHS) in [LENGTHS[i] for i in groups[0]]
    longest = [max(LENGTHS[i] for i in group) for group in groups]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3, "no way from long to short through the epoch"


def test_an_epoch_has_its_own_order_and_has_it_again() -> None:
    sampler = LengthBuckets(LENGTHS, 8, seed=1)
    first = list(sampler)
    torch.rand(7)  # the order does not hang on the global generator
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = LengthBuckets(LENGTHS, 8, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(LengthBuckets(LENGTHS, 8, seed=2)) != first


@pytest.mark.parametrize("lengths", [[], [3], [3, 4], [5] * 8, [5] * 9])
def test_small_splits_are_drawn_whole(lengths: list[int]) -> None:
    if lengths:
        assert sorted(LengthBuckets(lengths, 8)) == list(range(len(lengths)))


class Texts(torch.utils.data.Dataset):
    def __init__(self, count: int = 41) -> None:
        self.texts = tokens([2 + i * 7 % 23 for i in range(count)])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.texts[index]


def train(folder: Path, packing: bool, resume: bool = False, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = text_model("llama")
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=2, logging_steps=1, save_steps=5, report_to=[],
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-3, **options,
    )  # fmt: skip
    data = Texts()
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator(model, Tokenizer, packing=packing))
    draw_by_length(trainer, [len(text["input_ids"]) for text in data.texts])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-15") if resume else None)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_that_was_interrupted_sees_the_batches_that_it_would_have_seen(tmp_path: Path) -> None:
    """In the second epoch, whose order the trainer tells the sampler; packed runs train as padded ones."""
    whole = train(tmp_path / "run", packing=True)
    weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    resumed = train(tmp_path / "run", packing=True, resume=True)
    assert losses(resumed) == losses(whole)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    padded = train(tmp_path / "padded", packing=False)
    assert losses(padded) == pytest.approx(losses(whole), rel=1e-4)
