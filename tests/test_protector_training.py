"""How a guard learns: by the paper's loss, on the words of inference, with a threshold that spares the harmless."""

import json

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from detgpt.errors import InputError
from detgpt.guards.parts import HarmDetector, Questions
from detgpt.guards.template import harm_prompt, rewrite_prompt
from finetune.batching import IGNORED
from finetune.protector.data import exchanges
from finetune.protector.detoxifier import REFUSAL, encoded, rewritings
from finetune.protector.exchanges import Exchange, read_exchange, read_questions, write_rows
from finetune.protector.fresh import Size, write_detector, write_detoxifier
from finetune.protector.harm_detector import Collator, Judged, harm_loss, load_classifier, misspelled
from finetune.protector.measure import Scored, auroc, choose_threshold, resampled, roc, score, share_interval
from finetune.recipe import RECIPES, read_recipe, run_recipe

PAIR = Exchange("take it?", ("Yes, steal it.", "No."), (True, False), True, ("theft",))
BOTH_SAFE = Exchange("take it?", ("No.", "Never."), (False, False), True, ("theft",))
BOTH_HARMFUL = Exchange("take it?", ("Yes.", "Sure."), (True, True), True, ("theft",))


@pytest.fixture(scope="module")
def some():
    return [read_exchange(row, "here") for row in exchanges("train", 60, 0, set())]


@pytest.fixture(scope="module")
def detector(some, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh") / "detector"
    write_detector(folder, some, Size(vocabulary=600, width=32, layers=1))
    return load_classifier(str(folder), ["hate", "theft"])


# ------------------------------------------------------------------------------------------------------- the loss


def test_a_pair_with_both_safe_is_not_ranked():
    items = [Judged([exchange], ["theft"])[0] for exchange in (PAIR, BOTH_SAFE, BOTH_HARMFUL)]
    assert [item["pair"] for item in items] == [(2, 1), None, None]
    assert [item["harmful"].tolist() for item in items] == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_ranking_changes_the_loss_of_pairs_alone():
    logits, harmful = torch.tensor([[0.3, 0.1], [-0.2, 0.4]]), torch.tensor([1.0, 0.0])
    categories = torch.tensor([[1.0], [0.0]])
    none, pair = torch.empty(0, 2, dtype=torch.long), torch.tensor([[1, 0]])
    without = harm_loss(logits, harmful, categories, none)
    assert harm_loss(logits, harmful, categories, none, ranking=5.0) == without
    ranked = harm_loss(logits, harmful, categories, pair, ranking=2.0) - without
    assert ranked == pytest.approx(2 * np.log1p(np.exp(-0.5)), abs=1e-6)  # −2·log σ(r_safe − r_harmful), 0.2 − −0.3


def test_a_kind_of_harm_is_learned_from_harmful_texts_alone():
    logits = torch.zeros(2, 3, requires_grad=True)
    none = torch.empty(0, 2, dtype=torch.long)
    harm_loss(logits, torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), none).backward()
    assert logits.grad[0, 1:].abs().min() > 0 and logits.grad[1, 1:].abs().max() == 0


def test_a_batch_keeps_its_pairs_together(detector):
    _, tokenizer = detector
    judged = Judged([BOTH_SAFE, PAIR], ["hate", "theft"])
    batch = Collator(tokenizer, 64)([judged[0], judged[1]])
    ids = [row for chunk in batch["texts"] for row in chunk["input_ids"].tolist()]
    ((safe, harmful),) = batch["pairs"].tolist()
    for row, answer in ((harmful, PAIR.answers[0]), (safe, PAIR.answers[1])):
        expected = tokenizer(harm_prompt(PAIR.question, answer))["input_ids"]
        assert ids[row][: len(expected)] == expected
    assert (batch["harmful"][safe], batch["harmful"][harmful], sum(batch["harmful"])) == (0, 1, 3)
    assert batch["categories"][harmful].tolist() == [0, 1] and len(ids) == 6


# ------------------------------------------------------------------------------------------- the words of inference


def test_training_and_scoring_read_the_template_of_inference(some, tmp_path, monkeypatch):
    """The released code trains on question and answer, and evaluates the answer alone."""
    write_detector(tmp_path, some, Size(vocabulary=600, width=32, layers=1))
    judge = HarmDetector(tmp_path, ["theft"], torch.device("cpu"))
    read, tokenize = [], PreTrainedTokenizerFast.__call__

    def listen(tokenizer, texts, **settings):
        read.extend([texts] if isinstance(texts, str) else texts)
        return tokenize(tokenizer, texts, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", listen)
    score(judge, [PAIR])
    assert set(read) == set(Judged([PAIR], ["theft"])[0]["texts"])
    assert set(read) == {harm_prompt(PAIR.question, answer) for answer in (None, *PAIR.answers)}


def test_the_detoxifier_learns_the_rewrite_alone_behind_the_prompt_of_inference(some, tmp_path):
    write_detoxifier(tmp_path / "model", some, Size(vocabulary=600, width=32, layers=1))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ((prompt, rewrite),) = rewritings(PAIR, REFUSAL)
    assert (prompt, rewrite) == (rewrite_prompt(PAIR.question, "Yes, steal it."), " No.")
    row = encoded(tokenizer, prompt, rewrite)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == f" No.{tokenizer.eos_token}"
    assert row["input_ids"][: -len(learned)] == tokenizer(prompt)["input_ids"]


def test_where_all_answers_are_harmful_the_detoxifier_learns_a_fixed_refusal():
    assert [rewrite for _, rewrite in rewritings(BOTH_HARMFUL, REFUSAL)] == [f" {REFUSAL}"] * 2
    assert list(rewritings(BOTH_SAFE, REFUSAL)) == []


def test_a_misspelled_text_keeps_its_words():
    text = "I would like to follow somebody home"
    drawn = {misspelled(np.random.default_rng(i), text) for i in range(20)}
    assert len(drawn) > 10 and all(len(other.split()) == len(text.split()) for other in drawn)
    assert misspelled(np.random.default_rng(0), "a cup") == "a cup"


# --------------------------------------------------------------------------------------------------- the threshold


def scored(harmless, harmful):
    harm = np.array([*harmless, *harmful], np.float32)
    truth = np.arange(len(harm)) >= len(harmless)
    return harm, truth


def test_the_area_under_the_curve_counts_ties_as_half():
    assert auroc(*scored([0.1, 0.2], [0.8, 0.9])) == 1
    assert auroc(*scored([0.5, 0.5], [0.5])) == 0.5
    with pytest.raises(InputError, match="only one kind"):
        auroc(np.array([0.1, 0.2]), np.array([True, True]))


def test_a_curve_begins_with_what_scores_highest_and_ends_with_all():
    thresholds, false, true = roc(*scored([0.1, 0.6], [0.4, 0.9]))
    assert thresholds.tolist() == pytest.approx([0.9, 0.6, 0.4, 0.1])
    assert false.tolist() == [0, 0.5, 0.5, 1] and true.tolist() == [0.5, 0.5, 1, 1]


def test_the_threshold_spares_the_harmless():
    rng = np.random.default_rng(0)
    harm, truth = scored(rng.normal(0, 1, 2000), rng.normal(2, 1, 2000))
    threshold = choose_threshold(harm, truth, most=0.02)
    false = int((harm[~truth] >= threshold).sum())
    assert share_interval(false, 2000)[1] <= 0.02  # and not only here
    assert (harm[truth] >= threshold).mean() > 0.4  # of 0.48 at exactly 2%


def test_the_threshold_lies_in_the_middle_of_a_gap():
    harm, truth = scored([0.1] * 300, [0.9] * 300)
    assert choose_threshold(harm, truth, most=0.02) == pytest.approx(0.5)


def test_a_detector_that_would_flag_the_harmless_flags_nothing():
    harm, truth = scored([0.9] * 50, [0.1] * 50)
    assert choose_threshold(harm, truth, most=0.02) > 0.9


def test_an_interval_holds_its_share_and_narrows_with_more():
    few, many = share_interval(5, 100), share_interval(50, 1000)
    assert few[0] < many[0] < 0.05 < many[1] < few[1]


def test_the_area_has_an_interval_around_it():
    harm, truth = scored(np.random.default_rng(1).normal(0, 1, 100), np.random.default_rng(2).normal(2, 1, 100))
    low, high = resampled(Scored(harm, truth, truth, np.arange(200)), seed=0)
    assert low < auroc(harm, truth) < high < 1.0001 and high - low < 0.1


# ------------------------------------------------------------------------------------------------ from data to guard


def test_the_recipe_makes_a_guard_in_miniature(tmp_path, monkeypatch):
    """All its steps, with few exchanges and small models; a second run finds everything done."""
    monkeypatch.chdir(tmp_path)
    short = ["trainer.logging_steps=5", "trainer.per_device_train_batch_size=16", "trainer.num_train_epochs=5"]
    overrides = [
        "data.harmful=150",
        "data.alone=20",
        "data.measured=40",
        *(
            f"fresh.{part}.{key}"
            for part in ("detector", "detoxifier")
            for key in ("vocabulary=600", "width=64", "layers=1")
        ),
        *(f"{step}.{value}" for step in ("detector", "detoxifier", "network", "encoder") for value in short),
        "network.trainer.num_train_epochs=20",
        "encoder.model=build/guard/fresh/detector",  # a BERT that has read nothing
        "encoder.trainer.learning_rate=0.005",
        "encoder.trainer.max_steps=800",
        "guard.attacks=null",
    ]
    run_recipe("guard-picto", overrides)
    guard = tmp_path / "build/guard/assembled/guard"
    described = json.loads((guard / "guard.json").read_text())
    assert {"detector": "detector", "detoxifier": "detoxifier"}.items() <= described.items()
    assert 0 < described["threshold"] < 1 and set(described["refusals"]) == set(described["categories"])
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(guard / "detector")
    assert classifier.config.num_labels == 1 + len(described["categories"])
    assert [classifier.config.id2label[1 + i] for i in range(len(described["categories"]))] == described["categories"]
    questions = Questions.load(guard, described["questions"], torch.device("cpu"))
    assert questions.alone[0] > 0 and len(questions.ngrams.hashes) > 1000
    learned = read_questions(tmp_path / "build/guard/data/train")
    harmful = np.array([harm for harm, _ in learned.values()])
    for part in (questions.network, questions.encoder):
        assert auroc(part.score(list(learned)), harmful) > 0.9
    assert AutoModelForCausalLM.from_pretrained(guard / "detoxifier").config.max_position_embeddings >= 512
    run = json.loads((tmp_path / "build/guard/assembled/run.json").read_text())
    assert run["metrics"]["test_auroc"] > 0.6  # five short epochs: better than chance
    card = (guard / "README.md").read_text()
    assert f"{100 * run['metrics']['test_auroc']:.1f}" in card and (guard / "roc.png").is_file()
    before = (guard / "guard.json").stat().st_mtime_ns
    run_recipe("guard-picto", overrides)
    assert (guard / "guard.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_language_model_becomes_a_harm_detector(tmp_path, some, tune):
    """Any causal model of transformers, in full or by adapters that are merged in the end."""
    write_detoxifier(tmp_path / "llama", some, Size(vocabulary=600, width=32, layers=1))
    write_rows(tmp_path / "data", exchanges("train", 60, 0, set()))
    settings = [f"model={tmp_path / 'llama'}", f"train={tmp_path / 'data'}", f"validation={tmp_path / 'data'}"]
    settings += [f"output={tmp_path / 'run'}", f"tune={tune}", "trainer.max_steps=3"]
    run_recipe("harm-detector", settings)
    names = {file.name for file in (tmp_path / "run/detector").iterdir()}
    assert "model.safetensors" in names and "adapter_config.json" not in names
    assert json.loads((tmp_path / "run/run.json").read_text())["metrics"]["eval_auroc"] > 0


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    from detgpt.errors import ModelError

    with pytest.raises(ModelError, match="no classifier or language model"):
        load_classifier(str(tmp_path), ["theft"])


def test_the_papers_settings_are_those_of_the_recipes():
    detector, detoxifier = (read_recipe(RECIPES / f"{name}.yaml") for name in ("harm-detector", "detoxifier"))
    assert (detector.lora.r, detoxifier.lora.r, detector.max_length) == (32, 128, 512)
    for config in (detector, detoxifier):
        assert (config.trainer["learning_rate"], config.trainer["num_train_epochs"]) == (2e-5, 4)
