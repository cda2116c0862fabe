"""Averaging two checkpoints: every tensor is what the ratios say, and what cannot be averaged is refused by name."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, LANGUAGE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from detgpt.errors import InputError, ModelError
from finetune.averaging.average import average
from finetune.averaging.ratios import of_tensors
from finetune.cli import app


def weights(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(ours, theirs):
    """Bit by bit, so that NaN is NaN and -0.0 is not 0.0."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].reshape(-1).view(torch.uint8).equal(theirs[name].reshape(-1).view(torch.uint8))
        for name in ours
    )


def llama(folder, seed, dtype=torch.bfloat16, layers=5):
    """Sharded, with the values that break `a + w (b - a)` in its first tensor."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**LANGUAGE, "num_hidden_layers": layers}, vocab_size=64, attention_bias=True)
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e30, -0.0])
        model.model.embed_tokens.weight[0, :5] = odd if seed else odd.flip(0)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "notes.txt").write_text(f"of {seed}")
    (folder / "training_args.bin").write_text("no part of a model")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return llama(folder / "base", 0), llama(folder / "tuned", 1)


def test_the_ends_are_the_models_themselves_bit_by_bit(pair, tmp_path):
    base, tuned = pair
    assert same(weights(average(base, tuned, tmp_path / "tuned", base_weight=0)), weights(tuned))
    assert same(weights(average(base, tuned, tmp_path / "base", base_weight=1)), weights(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_average_is_rounded_once_to_the_dtype_of_the_models(dtype, tmp_path):
    base, tuned = llama(tmp_path / "base", 0, dtype), llama(tmp_path / "tuned", 1, dtype)
    merged = weights(average(base, tuned, tmp_path / "out", base_weight=0.3))
    ours, theirs = weights(base), weights(tuned)
    for name, value in merged.items():
        exact = ours[name].double() * 0.3 + theirs[name].double() * 0.7
        finite = exact.isfinite() & (exact.abs() < 1e3)
        assert value.dtype == dtype and finite.sum() >= finite.numel() - 5
        tolerance = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}
        torch.testing.assert_close(value.double()[finite], exact[finite], **tolerance)


def test_blocks_take_their_ratio_in_linear_layers_and_all_else_takes_the_mean(pair, tmp_path):
    base, tuned = pair
    ratios = {"language.0-1": 0.1, "language.2": 0.5, "language.3-4": 0.9, "head": 1.0}
    merged = weights(average(base, tuned, tmp_path / "out", ratios=ratios))
    ours, theirs = weights(base), weights(tuned)
    expected = {
        "model.layers.1.self_attn.q_proj.weight": 0.1,
        "model.layers.1.self_attn.q_proj.bias": 0.1,
        "model.layers.1.input_layernorm.weight": 0.5,
        "model.layers.2.mlp.up_proj.weight": 0.5,
        "model.layers.4.mlp.down_proj.weight": 0.9,
        "model.embed_tokens.weight": 0.5,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }
    for name, ratio in expected.items():
        torch.testing.assert_close(merged[name], torch.lerp(ours[name], theirs[name], ratio), equal_nan=True)


def test_one_group_is_plain_averaging(pair, tmp_path):
    one = average(*pair, tmp_path / "one", ratios={"language": 0.3})
    plain = average(*pair, tmp_path / "plain", base_weight=0.7)
    for (name, ours), theirs in zip(weights(one).items(), weights(plain).values(), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name


def test_in_however_many_pieces_the_average_is_the_same(pair, tmp_path, monkeypatch):
    """Of a row each, or fewer than there are rows, several of them together."""
    whole = average(*pair, tmp_path / "whole", base_weight=0.3)
    for piece, together in ((1, 3), (700, 2)):
        monkeypatch.setattr("finetune.averaging.weights.PIECE", piece)
        monkeypatch.setattr("finetune.averaging.weights.TOGETHER", together)
        pieces = average(*pair, tmp_path / f"of {piece}", base_weight=0.3)
        assert same(weights(pieces), weights(whole))


def test_shards_are_those_of_the_base_and_every_other_file_is_the_tuned_models(pair, tmp_path):
    base, tuned = pair
    other = tmp_path / "other shards"
    AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16).save_pretrained(other)
    shutil.copy(tuned / "notes.txt", other)
    (other / "pytorch_model.bin.index.json").write_text("{}")
    out = average(base, other, tmp_path / "out", base_weight=0.5)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes() and not (other / index).exists()
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} - {"training_args.bin"}
    assert (out / "notes.txt").read_text() == "of 1"
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(out / file.name, "pt") as after:
            assert before.keys() == after.keys() and before.metadata() == after.metadata() == {"format": "pt"}
    assert AutoModelForCausalLM.from_pretrained(out)(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)


def changed(folder, to, **tensors):
    """A copy with other tensors in its only file; None takes one away."""
    shutil.copytree(folder, to)
    kept = {name: value for name, value in {**weights(folder), **tensors}.items() if value is not None}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "base"
    folder.mkdir()
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.zeros(4),
        "counted": torch.tensor(3),
        "codes": torch.arange(4, dtype=torch.int8),
        "none": torch.zeros(0, 3),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"b": None, "c": torch.zeros(4)}, "'b' is in .*base alone"),
        ({"d": torch.zeros(4)}, "'d' is in .*tuned alone"),
        ({"a": torch.ones(3, 2), "b": torch.zeros(5)}, r"'a' is F32\[2, 3\] in .*base, but F32\[3, 2\] in .*tuned"),
        ({"b": torch.zeros(4).half()}, r"'b' is F32\[4\] in .*base, but F16\[4\]"),
        ({"codes": torch.zeros(4, dtype=torch.int8)}, "'codes' is of I8 and differs: quantised weights"),
    ],
    ids=["missing", "extra", "shape", "dtype", "quantised"],
)
def test_what_is_not_of_one_architecture_is_refused_by_the_first_tensor_that_differs(tensors, named, plain, tmp_path):
    tuned = changed(plain, tmp_path / "tuned", **tensors)
    with pytest.raises(ModelError, match=named):
        average(plain, tuned, tmp_path / "out", base_weight=0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["tuned"]  # nothing half-written


def test_counters_are_the_bases_unless_the_result_is_the_tuned_model(plain, tmp_path):
    tuned = changed(plain, tmp_path / "tuned", counted=torch.tensor(9), a=torch.full((2, 3), 3.0))
    half = weights(average(plain, tuned, tmp_path / "half", base_weight=0.5))
    assert half["counted"] == 3 and (half["a"] == 2).all() and half["none"].shape == (0, 3)
    assert weights(average(plain, tuned, tmp_path / "end", base_weight=0))["counted"] == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either base_weight"),
        ({"base_weight": 0.1, "ratios": {"language": 1}}, "either base_weight"),
        ({"base_weight": 1.1}, "base_weight=1.1"),
        ({"base_weight": float("nan")}, "base_weight=nan"),
        ({"ratios": {"language": -0.1}}, "language: -0.1 is no ratio"),
        ({"ratios": {"language": "half"}}, "language: 'half' is no ratio"),
        ({"ratios": {"language.0-3": 0.1}}, "block 4 of 5 is in no group"),
        ({"ratios": {"language.0-3": 0.1, "language.3-4": 0.1}}, "block 3, but another group has it too"),
        ({"ratios": {"language.0-5": 0.1}}, "block 5, but there are 5"),
        ({"ratios": {"language": 0.1, "haed": 0.1}}, "'haed' is no part"),
        ({"ratios": {}}, "block 0 of 5 is in no group"),
    ],
)
def test_wrong_weights_are_refused(arguments, said, pair, tmp_path):
    with pytest.raises(InputError, match=said):
        average(*pair, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_nothing_is_left(pair, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
    size = max(file.stat().st_size for file in pair[0].glob("*.safetensors"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*make room"):
            average(*pair, tmp_path / "out", base_weight=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_refused(pair, plain, tmp_path):
    broken = shutil.copytree(plain, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read as safetensors"):
        average(plain, broken, tmp_path / "out", base_weight=0.5)
    with pytest.raises(ModelError, match="has no weights in safetensors"):
        average(tmp_path, plain, tmp_path / "out", base_weight=0.5)
    with pytest.raises(InputError, match="exists already"):
        average(*pair, broken, base_weight=0.5)
    with pytest.raises(InputError, match="cannot write"):
        average(*pair, file / "out", base_weight=0.5)
    with pytest.raises(InputError, match="are for models with a language model"):
        of_tensors({"vision_tower.patches.weight": (2, 2)}, {"language": 0.1})


MODELS = {
    "llava": (lambda folder: FAMILIES["LLaVA 1.5"](folder), AutoModelForImageTextToText, ".*language.*(q|up)_proj"),
    "llama": (lambda folder: llama(folder / "base", 0), AutoModelForCausalLM, ".*(k|down)_proj"),
    "gpt2": (lambda folder: gpt2(folder / "base"), AutoModelForCausalLM, ".*c_attn"),
}


def gpt2(folder):
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {"modules_to_save": ["multi_modal_projector"]}),
        ("llama", {"use_rslora": True, "bias": "lora_only"}),
        ("llama", {"alpha_pattern": {r".*\.1\..*k_proj": 7}, "rank_pattern": {"down_proj": 2}}),
        ("gpt2", {"fan_in_fan_out": True}),
    ],
    ids=["llava", "rslora", "patterns", "transposed"],
)
def test_adapters_are_merged_as_peft_merges_them(name, settings, tmp_path):
    build, auto_class, targets = MODELS[name]
    base = build(tmp_path)
    model = auto_class.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    model = auto_class.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")

    theirs, before = weights(tmp_path / "merged"), weights(base)
    ours = weights(average(base, tmp_path / "adapter", tmp_path / "out", base_weight=0))
    assert ours.keys() == theirs.keys()
    assert sum(not torch.equal(before[key].nan_to_num(), ours[key].nan_to_num()) for key in ours) >= 2
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], equal_nan=True, msg=key)
    half = average(base, tmp_path / "adapter", tmp_path / "half", base_weight=0.5)
    auto_class.from_pretrained(half)  # with the base's configuration
    assert not list(half.glob("adapter_*"))
    for key, value in weights(half).items():
        torch.testing.assert_close(value, torch.lerp(before[key], theirs[key], 0.5), equal_nan=True, msg=key)


def test_an_adapter_of_another_model_or_kind_is_refused_by_its_first_tensor(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "longer", 0, layers=6))
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"'model.layers.5.*lora_A.weight' fits no linear layer"):
        average(pair[0], tmp_path / "adapter", tmp_path / "out", base_weight=0.5)
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(ModelError, match=r"lora_magnitude_vector' fits no linear layer"):
        average(pair[0], tmp_path / "dora", tmp_path / "out", base_weight=0.5)


def test_the_memory_is_that_of_a_few_pieces(tmp_path):
    """Of two models of 96 MB, in a process that may have 64 MB more than it has when it begins."""
    script = """
import resource, sys
from finetune.averaging.average import average
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + 64 * 2**20,) * 2)
average(*sys.argv[1:], base_weight=0.5)
"""
    numbers = (torch.arange(2**24) % 251).bfloat16().reshape(4096, 4096)
    for name, more in (("base", 0), ("tuned", 2)):
        (tmp_path / name).mkdir()
        save_file({f"{i}": numbers + more for i in range(3)}, tmp_path / name / "model.safetensors", {"format": "pt"})
    places = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    subprocess.run([sys.executable, "-c", script, *places], check=True)
    assert all(torch.equal(value, numbers + 1) for value in weights(tmp_path / "out").values())


def test_from_the_command_line(pair, tmp_path):
    base, tuned = map(str, pair)
    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({"language.0-2": 0.2, "language.3-4": 0.4}))
    run = CliRunner().invoke
    assert run(app, ["average", base, tuned, str(tmp_path / "one"), "--ratios", str(ratios)]).exit_code == 0
    assert run(app, ["average", base, tuned, str(tmp_path / "two"), "--base-weight", "0.4"]).exit_code == 0
    expected = average(*pair, tmp_path / "three", ratios=json.loads(ratios.read_text()))
    assert same(weights(tmp_path / "one"), weights(expected))
    ratios.write_text("[0.1]")
    failed = run(app, ["average", base, tuned, str(tmp_path / "four"), "--ratios", str(ratios)])
    assert failed.exit_code == 1 and "must hold ratios by part" in failed.output


def test_towers_have_blocks_too_but_theirs_are_not_the_language_models():
    with safe_open("weights/picto/reasoner/model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    ratios = of_tensors(shapes, {"language.0-1": 0.2, "language.2-3": 0.6, "vision": 0.0, "projector": 0.1})
    of_part = {
        part: {ratio for name, ratio in ratios.items() if part in name}
        for part in ("vision_tower", "projector", "embed_tokens", "layers.0.mlp", "language_model.model.norm")
    }
    assert of_part["vision_tower"] == {0.0} and of_part["projector"] == {0.1}
    assert of_part["layers.0.mlp"] == {0.2}
    assert of_part["embed_tokens"] == of_part["language_model.model.norm"] == {0.4}
