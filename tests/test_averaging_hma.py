"""Heterogeneous Model Averaging: ratios with an exact mean that make the samples likeliest, and are what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from detgpt import DetGPT
from detgpt.errors import InputError
from finetune.averaging.average import average
from finetune.averaging.hma import read_samples
from finetune.averaging.likelihood import Averaged, log_probabilities
from finetune.averaging.ratios import groups
from finetune.averaging.simplex import grid, limits, project
from finetune.batching import collator
from finetune.data.records import read_records
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load
from finetune.recipe import run_recipe

values = st.lists(st.floats(-3, 3), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(values, st.floats(0.01, 0.99), st.sampled_from([0.0, 0.1, 0.2, 0.9]))
def test_the_mean_is_exact_and_every_ratio_is_one(values, mean, epsilon):
    given = torch.tensor(values, dtype=torch.float64)
    ratios = project(given, mean, epsilon)
    low, high = limits(len(values), mean, epsilon)
    assert ratios.mean().item() == pytest.approx(mean, abs=1e-9)
    assert (ratios >= low).all() and (ratios <= high).all() and 0 <= low <= high <= 1
    assert torch.allclose(project(ratios, mean, epsilon), ratios)  # what is in the range stays


def test_a_projection_is_the_nearest_point():
    torch.manual_seed(0)
    inside = torch.tensor(grid(4, 0.4, 9)).double()
    for _ in range(20):
        outside = torch.randn(4, dtype=torch.float64)
        nearest = torch.dist(project(outside, 0.4), outside)
        assert nearest <= (inside - outside).norm(dim=1).min() + 1e-9


def test_ends_of_the_range_can_be_reached():
    projected = project(torch.tensor([2.0, 2.0, -2.0]).double(), 2 / 3)
    torch.testing.assert_close(projected, torch.tensor([1.0, 1.0, 0.0]).double())


def test_limits_are_those_of_the_papers_mapping():
    """Eq. 11 with its factor K: a · K · â / Σ â for â = sigmoid(s) + ε, at its ends."""
    for mean, epsilon in ((0.2, 0.2), (0.1, 0.9)):
        ends = [torch.tensor([sign * 50.0, -sign * 50.0, -sign * 50.0]).sigmoid() + epsilon for sign in (-1, 1)]
        least, greatest = (float(mean * 3 * end[0] / end.sum()) for end in ends)
        assert limits(3, mean, epsilon) == pytest.approx((least, greatest))
    assert limits(3, 0.6, 0.2)[1] == 1  # where the paper's own is 1.35


def test_a_grid_covers_the_simplex():
    points = grid(3, 2 / 3, 5)
    assert all(sum(point) == pytest.approx(2) and min(point) >= 0 and max(point) <= 1 for point in points)
    corners = [(1, 1, 0), (1, 0, 1), (0, 1, 1)]
    assert all(any(point == pytest.approx(corner) for point in points) for corner in corners)
    assert len(points) == 15 and grid(3, 0.2, 3)[0] == pytest.approx((0, 0, 0.6))


@pytest.mark.parametrize(("blocks", "expected"), [(26, [8, 9, 9]), (3, [1, 1, 1]), (40, [13, 13, 14]), (5, [1, 2, 2])])
def test_groups_are_consecutive_blocks_of_any_depth(blocks, expected):
    named = groups(blocks, 3)
    ends = [tuple(map(int, name.removeprefix("language.").split("-"))) for name in named]
    assert [last - first + 1 for first, last in ends] == expected
    assert [block for first, last in ends for block in range(first, last + 1)] == list(range(blocks))
    with pytest.raises(InputError, match=f"groups=4, but the language model has {3} blocks"):
        groups(3, 4)


def test_log_probabilities_are_those_of_the_labelled_tokens():
    logits = torch.tensor([[[0.0, 2.0], [1.0, 0.0], [5.0, 5.0]]])
    found = log_probabilities(logits, torch.tensor([[-100, 1, -100]]))
    expected = torch.tensor([[2.0 - torch.tensor([0.0, 2.0]).logsumexp(0), 0.0]])
    torch.testing.assert_close(found, expected)


SAYS = 'I can not see any of it.\nTargets: ["cup"]'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The built-in model, the same when it has learned to answer everything alike, and such answers."""
    folder = tmp_path_factory.mktemp("hma")
    wishes = [record for record in read_records("finetune/picto/splits/seen") if record["answer"]][:6]
    with (folder / "samples.jsonl").open("w") as file:
        for number, wish in enumerate(wishes):
            asked = {"record": number, **{key: wish[key] for key in ("where", "instruction", "image")}}
            answers = {"answers": ["No.\nTargets: []", SAYS], "rewards": [-1.0, 5 * number % 6 / 6]}
            file.write(json.dumps(asked | answers) + "\n")
    model, processor = load(Checkpoint(model="picto"), "float32")
    model.model.vision_tower.requires_grad_(False)
    model.save_pretrained(folder / "base")
    encoder = RecordEncoder(processor, bare=True)
    examples = [encoder.encode(record) for record in read_samples(folder / "samples.jsonl", 4)]
    batch = collator(model, processor)(examples)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "tuned/reasoner")
    for place in ("tuned/reasoner", "base"):
        processor.save_pretrained(folder / place)
    shutil.copytree("weights/picto/detector", folder / "tuned/detector")
    (folder / "tuned/detgpt.json").write_text(json.dumps({"reasoner": "reasoner", "detector": "detector"}))
    return folder


def recipe(folder, out, **values):
    file = folder / f"{out.name}.yaml"
    values = {"stage": "hma", "base": folder / "base", "tuned": folder / "tuned", "output": out, **values}
    values = {"samples": folder / "samples.jsonl", "best": 2, "mean": 0.2, "batch_size": 2, **values}
    file.write_text(yaml.safe_dump({key: str(v) if hasattr(v, "parts") else v for key, v in values.items()}))
    return file


def log_likelihood(folder, samples):
    """Of the saved model, example by example and token by token."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    _, processor = load(Checkpoint(model=str(folder)), "float32")
    encoder = RecordEncoder(processor, bare=True)
    total = 0.0
    with torch.no_grad():
        for record in samples:
            encoded = encoder.encode(record)
            learned = encoded.pop("labels")
            images = {"pixel_values": encoded["pixel_values"]}
            logits = model(input_ids=encoded["input_ids"][None], **images).logits[0].log_softmax(-1)
            places = (learned != -100).nonzero()[:, 0]
            total += logits[places - 1, learned[places]].sum().item()
    return total / len(samples)


@pytest.fixture(scope="module")
def averaged(trained):
    run_recipe(recipe(trained, trained / "run", max_steps=30, check_grid=True))
    return trained / "run"


def test_the_ratios_are_as_good_as_the_best_of_a_grid(averaged):
    metrics = json.loads((averaged / "run.json").read_text())["metrics"]
    found, best = metrics["log_likelihood"], metrics["grid_log_likelihood"]
    assert found >= best - 0.01 * abs(best)
    assert found > metrics["log_likelihood_uniform"] + 5
    ratios = json.loads((averaged / "ratios.json").read_text())
    assert list(ratios) == ["language.0-0", "language.1-1", "language.2-3"]
    assert sum(ratios.values()) / 3 == pytest.approx(0.2, abs=1e-6) and all(0 <= r <= 1 for r in ratios.values())


def test_the_saved_model_is_the_one_that_was_measured(averaged, trained):
    samples = list(read_samples(trained / "samples.jsonl", 2))
    metrics = json.loads((averaged / "run.json").read_text())["metrics"]
    assert log_likelihood(averaged / "reasoner", samples) == pytest.approx(metrics["log_likelihood"], rel=1e-4)
    ratios = json.loads((averaged / "ratios.json").read_text())
    same = average(trained / "base", trained / "tuned", trained / "by hand", ratios=ratios)
    assert (same / "model.safetensors").read_bytes() == (averaged / "reasoner/model.safetensors").read_bytes()
    result = DetGPT.from_pretrained(averaged).detect(samples[0]["image"], samples[0]["instruction"])
    assert result.reasoning


def test_every_step_is_made_with_the_ratios_of_that_step(trained, tmp_path):
    """What is likely at one step's ratios is what the model saved with them says, however they were learned."""
    base, _ = load(Checkpoint(model=str(trained / "base")), "float32")
    tuned, processor = load(Checkpoint(model=str(trained / "tuned")), "float32")
    samples = read_samples(trained / "samples.jsonl", 1)
    example = RecordEncoder(processor, bare=True).encode(samples[0])
    batch = {name: value if name == "pixel_values" else value[None] for name, value in example.items()}
    names = groups(4, 3)
    model = Averaged(base, tuned, names, 0.5)
    ratios = torch.full((3,), 0.5, dtype=torch.float64)
    seen = []
    for step in range(3):
        ratios.requires_grad_()
        found = model.log_likelihood(ratios, batch)
        shares = dict(zip(names, ratios.tolist(), strict=True))
        saved = average(trained / "base", trained / "tuned", tmp_path / str(step), ratios=shares)
        assert log_likelihood(saved, samples) == pytest.approx(found.item(), rel=1e-4)
        (uphill,) = torch.autograd.grad(found, ratios)
        ratios = project(ratios.detach() + 0.003 * uphill, 0.5)
        seen.append(found.item())
    assert len(set(seen)) == 3  # each step's are other ratios
    assert all(p.grad is None and not p.requires_grad for m in (base, tuned) for p in m.parameters())


def test_one_group_is_plain_averaging(trained, tmp_path):
    run_recipe(recipe(trained, tmp_path / "one", groups=1, mean=0.3))
    plain = average(trained / "base", trained / "tuned", tmp_path / "plain", base_weight=0.7)
    assert json.loads((tmp_path / "one/ratios.json").read_text()) == {"language.0-3": 0.3}
    assert (plain / "model.safetensors").read_bytes() == (tmp_path / "one/reasoner/model.safetensors").read_bytes()


def test_epsilon_and_penalty_keep_ratios_together(trained, averaged, tmp_path):
    free = json.loads((averaged / "ratios.json").read_text()).values()
    low, high = limits(3, 0.2, 0.9)
    assert min(free) < low
    run_recipe(recipe(trained, tmp_path / "epsilon", max_steps=20, epsilon=0.9))
    kept = json.loads((tmp_path / "epsilon/ratios.json").read_text()).values()
    assert low <= min(kept) < 0.19 and max(kept) <= high
    run_recipe(recipe(trained, tmp_path / "penalty", max_steps=20, penalty=1e4))
    kept = json.loads((tmp_path / "penalty/ratios.json").read_text()).values()
    assert min(kept) > 0.18 and max(kept) < 0.22


def test_of_samples_each_wishs_best_answer_is_taken_and_of_those_the_best(trained, tmp_path):
    samples = read_samples(trained / "samples.jsonl", 3)
    wishes = [json.loads(line)["instruction"] for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert samples["instruction"] == wishes[1:4] and set(samples["answer"]) == {SAYS}
    assert len(read_samples(trained / "samples.jsonl")) == 6
    with pytest.raises(InputError, match="has 6 samples, and best=7"):
        read_samples(trained / "samples.jsonl", 7)
    assert len(read_samples(Path("finetune/picto/splits/seen"))) > 12
    with pytest.raises(InputError, match="is a folder: leave it out"):
        read_samples(Path("finetune/picto/splits/seen"), 3)
    (tmp_path / "unscored.jsonl").write_text('{"instruction": "a", "answers": ["b"]}')
    with pytest.raises(InputError, match="line 1: a scored sample has 'answers' and as many 'rewards'"):
        read_samples(tmp_path / "unscored.jsonl")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("groups=2", "check_grid is for 3 groups"),
        ("mean=1.0", "mean = 1.0"),
        ("samples=nowhere", "nowhere"),
    ],
)
def test_wrong_settings_are_refused(override, said, trained, tmp_path):
    file = recipe(trained, tmp_path / "run", check_grid=True)
    with pytest.raises(InputError, match=said):
        run_recipe(file, [override])
    assert not (tmp_path / "run").exists()


def test_models_of_two_architectures_have_no_average():
    small, large = (
        LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=size, num_hidden_layers=1, num_attention_heads=1)
        )
        for size in (8, 16)
    )
    with pytest.raises(InputError, match=r"base and tuned differ in .*gate_proj.weight"):
        Averaged(small, large, ["language"], 0.5)
