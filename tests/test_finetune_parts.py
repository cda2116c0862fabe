"""Every parameter belongs to one part, and exactly the parts that are to train do."""

import re

import pytest
import torch
from families import FAMILIES, LANGUAGE
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from detgpt.errors import InputError, ModelError
from finetune.parts import part_of, parts_of
from finetune.tuning import Group, Lora, tuned

ALL = ["vision", "projector", "embeddings", "language.0", "language.1", "head"]


def frozen(**others):
    return {group: others.get(group.value, "frozen") for group in Group}


def trained_parts(model):
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_parts_in_the_model_in_its_file_and_under_adapters(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    parts = parts_of(name for name, _ in model.named_parameters())
    assert sorted(parts) == sorted(ALL)
    sizes = {part: sum(model.get_parameter(name).numel() for name in names) for part, names in parts.items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        in_file = {
            part: sum(file.get_tensor(name).numel() for name in names) for part, names in parts_of(file.keys()).items()
        }
    assert in_file == sizes

    assert trained_parts(tuned(model, frozen(projector="full"), Lora())) == {"projector"}
    assert trained_parts(tuned(model, frozen(language="full"), Lora())) == set(ALL) - {"vision", "projector"}
    adapted = tuned(model, frozen(projector="full", language="lora"), Lora(r=2))
    assert trained_parts(adapted) == {"projector", "language.0", "language.1"}
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or part_of(name) == "projector" for name in trained)


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(vocab_size=16, **LANGUAGE)),
        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2)),
    ],
    ids=["llama", "gpt2"],
)
def test_a_language_model_has_no_eyes(model):
    assert sorted(parts_of(model.state_dict())) == ["embeddings", "head", "language.0", "language.1"]
    with pytest.raises(InputError, match=r"vision='full', but this \w+ model has no such part"):
        tuned(model, frozen(vision="full"), Lora())


def test_an_unknown_architecture_is_refused_by_its_first_parameter():
    names = ["model.embed_tokens.weight", "model.mystery.weight", "model.riddle.weight"]
    with pytest.raises(ModelError, match=re.escape("'model.mystery.weight' is in no part")):
        parts_of(names)


def test_batch_norms_that_do_not_train_keep_their_statistics():
    """The built-in model's tower has them; the trainer puts the whole model in training mode at every step."""
    model = AutoModelForImageTextToText.from_pretrained("weights/picto/reasoner", dtype=torch.float32)
    model = tuned(model, frozen(projector="full"), Lora()).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.model.get_image_features(torch.rand(2, 3, 224, 224))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
