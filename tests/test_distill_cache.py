"""A teacher's cache, as a user makes it: the built-in reasoner over a few wishes and texts, command to folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from typer.testing import CliRunner

from detgpt.errors import InputError
from finetune.batching import IGNORED, collator
from finetune.cli import app
from finetune.data.records import load_records
from finetune.distill import teacher
from finetune.distill.cache import Cache, digest, narrow, read_header, wide
from finetune.distill.sparse import top
from finetune.encoding import RecordEncoder
from finetune.loading import Checkpoint, load

SPLIT = Path(__file__).parents[1] / "finetune/picto/splits/seen"
WISHES, TEXTS = 18, 4
SETTINGS = {"model": "picto", "batch_size": 4, "shard_size": 6}


@pytest.fixture(scope="module")
def picto():
    return load(Checkpoint(model="picto"), "float32")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Wishes about pictures, and questions without one."""
    folder = tmp_path_factory.mktemp("records")
    lines = [json.loads(line) for line in (SPLIT / "data.jsonl").read_text().splitlines()[: 3 * WISHES : 3]]
    said = [
        {"role": "user", "content": "is a cup drinkable?"},
        {"role": "assistant", "content": "No. A cup holds a drink."},
    ]
    rows = [{**line, "image": str(SPLIT / line["image"]), "reasoning": "I see it."} for line in lines]
    rows[3:3] = [{"messages": said * (1 + i)} for i in range(TEXTS)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def cached(records: Path, output: Path, **settings) -> Path:
    teacher.run(teacher.Config(train=records, output=output, **{**SETTINGS, **settings}))
    return output


@pytest.fixture(scope="module")
def made(records, tmp_path_factory):
    return cached(records, tmp_path_factory.mktemp("cache") / "teacher")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "shards").iterdir())}


def learned_logits(picto, records):
    """(token ids, logits) of each record's learned positions, one record at a time."""
    model, processor = picto
    encoder, batches = RecordEncoder(processor, bare=True), collator(model, processor)
    for record in load_records(records):
        batch = batches([encoder.encode(record)])
        labels = batch.pop("labels")[0, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[0, :-1]
        yield labels[labels != IGNORED], logits[labels != IGNORED]


def test_what_was_kept_comes_back(made, picto, records):
    """The likeliest tokens of every learned position, in half precision, whatever batch and shard it was in."""
    cache = Cache(made)
    assert len(cache) == WISHES + TEXTS
    total = 0
    for number, (labels, logits) in enumerate(learned_logits(picto, records)):
        true, found = top(logits, 5), cache.kept(cache.rows_of(number, labels, "here"))
        assert (found.ids == true.ids).float().mean() > 0.98  # of near ties either may come first
        torch.testing.assert_close(found.logprobs, true.logprobs, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(found.tails, true.tails, rtol=1e-3, atol=5e-3)
        total += len(labels)
    assert cache.header.rows == total
    every = cache.kept(torch.arange(total))
    some = torch.tensor([total - 1, 0, 30, 30])
    assert torch.equal(cache.kept(some).logprobs, every.logprobs[some])  # rows in any order, across shards


def test_a_token_takes_thirty_bytes_at_most(made):
    header = read_header(made)
    size = sum(len(content) for content in files(made).values())
    assert header.k == 5 and header.temperatures == (1.0, 2.0)
    assert header.bytes_of_row == 24
    assert header.model_copy(update={"vocabulary": 152_000}).bytes_of_row == 29
    run = json.loads((made / "run.json").read_text())["metrics"]
    assert run["bytes_per_token"] == pytest.approx(size / header.rows)
    # A file has a header, and says of each record where it begins; the fewer the records, the more that weighs.
    assert size < 30 * header.rows + 4 * 700


@pytest.mark.parametrize("vocabulary", [2600, 1 << 16, 152_064, 1 << 24])
def test_ids_of_any_vocabulary_come_back(vocabulary):
    ids = np.array([[0, 1, 255], [256, 65_535, vocabulary - 1]]) % vocabulary
    kept = narrow(ids, vocabulary)
    assert kept.nbytes == ids.size * (2 if vocabulary <= 1 << 16 else 3)
    assert (wide(kept) == ids).all()


def test_how_concentrated_the_teachers_knowledge_is(made, picto, records):
    found = json.loads((made / "concentration.json").read_text())
    masses = torch.cat([logits.softmax(-1).topk(10).values.cumsum(-1) for _, logits in learned_logits(picto, records)])
    assert found["tokens"] == len(masses)
    assert found["mass"] == pytest.approx(masses.mean(0).tolist(), abs=1e-4)
    assert found["share"] == pytest.approx((masses >= 0.95).float().mean(0).tolist(), abs=0.01)
    assert (made / "concentration.png").stat().st_size > 5000
    assert (made / "concentration.svg").read_text().count("likeliest tokens")


def test_a_run_that_was_killed_goes_on_and_gives_the_same_files(made, records, tmp_path):
    output = tmp_path / "teacher"
    command = ["distill", "cache", "picto", str(records), "-o", str(output), "--batch-size", "4", "--shard-size", "6"]
    start = [sys.executable, "-m", "finetune.cli", *command]
    process = subprocess.Popen(start, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (output / "shards/00000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in (output / "shards").iterdir() if file.suffix == ".safetensors"}
    assert 0 < len(done) < 4
    with pytest.raises(InputError, match="is a cache that is not finished"):
        Cache(output)
    (output / "shards/.123-00003.safetensors").write_bytes(b"half")  # what a kill leaves
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    whole = {name: content for name, content in files(output).items() if not name.startswith(".")}
    assert whole == files(made)
    assert read_header(output) == read_header(made)


@pytest.mark.slow
def test_two_processes_write_what_one_does(records, tmp_path):
    config = str(Path(__file__).parents[1] / "finetune/configs/ddp.yaml")
    two = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
    two += ["--config_file", config]
    # One thread each: a sum of more is rounded otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for name, launcher in (("one", []), ("two", two)):
        command = ["-m", "finetune.cli", "distill", "cache", "picto", str(records), "-o", str(tmp_path / name)]
        run = [sys.executable, *launcher, *command, "--batch-size", "4", "--shard-size", "6"]
        ran = subprocess.run(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        assert ran.returncode == 0, ran.stdout.decode()
        assert ran.stdout.decode().count("tokens of 22 records") == 1  # not each for itself
    one, both = tmp_path / "one", tmp_path / "two"
    assert files(both) == files(one) and read_header(both) == read_header(one)


def test_random_draws_are_the_same_again_and_have_no_tail(records, tmp_path):
    one = cached(records, tmp_path / "one", kept="random", k=8)
    other = cached(records, tmp_path / "other", kept="random", k=8)
    assert files(one) == files(other)
    assert files(one) != files(cached(records, tmp_path / "seed", kept="random", k=8, seed=1))
    kept = Cache(one).kept(torch.arange(40))
    torch.testing.assert_close(kept.logprobs.exp().sum(1), torch.ones(40), atol=2e-3, rtol=0)
    assert kept.tails.shape == (40, 0) and read_header(one).bytes_of_row == 32


def test_another_records_tokenizer_k_or_teacher_is_refused(made, picto, records, tmp_path):
    cache, tokenizer = Cache(made), picto[1].tokenizer
    cache.check(tokenizer, records, k=5, teacher="picto")
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.jsonl").write_text("\n".join((records / "data.jsonl").read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match="is a cache of other records than"):
        cache.check(tokenizer, other)
    with pytest.raises(InputError, match="keeps k=5 tokens, not 6"):
        cache.check(tokenizer, records, k=6)
    with pytest.raises(InputError, match="is a cache of 'picto', not of 'other'"):
        cache.check(tokenizer, records, teacher="other")
    processor = load(Checkpoint(model=str(FAMILIES["LLaVA 1.5"](tmp_path / "llava"))), "float32")[1]
    assert digest(processor.tokenizer) != digest(tokenizer)
    with pytest.raises(InputError, match="whose tokenizer is not the student's"):
        cache.check(processor.tokenizer, records)


def test_another_answer_to_a_record_is_refused_by_its_line(made, picto, records):
    labels, _ = next(learned_logits(picto, records))
    cache = Cache(made)
    with pytest.raises(InputError, match=r"data.jsonl, line 1: the teacher of .* has read another answer"):
        cache.rows_of(0, labels[:-1], "data.jsonl, line 1")
    with pytest.raises(InputError, match="has read another answer"):
        cache.rows_of(0, labels.flip(0), "data.jsonl, line 1")


def test_a_folder_that_is_no_cache_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="is no cache of a teacher: make one with `detgpt-finetune distill cache`"):
        Cache(tmp_path)
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / "cache.json").write_text("{}")
    with pytest.raises(InputError, match=r"cache\.json cannot be read"):
        Cache(broken)
    mixed = shutil.copytree(made, tmp_path / "mixed")
    shutil.copy(mixed / "shards/00000.safetensors", mixed / "shards/00003.safetensors")
    with pytest.raises(InputError, match=r"00003\.safetensors is not what cache\.json says"):
        Cache(mixed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperatures": [2.0]}, "give positive ones, and 1 among them"),
        ({"k": 2601}, "k=2601 of a vocabulary of 2600 tokens: give fewer"),
    ],
)
def test_what_cannot_be_kept_is_said_before_anything_is(settings, said, records, tmp_path):
    with pytest.raises(ValueError, match=said):
        cached(records, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_records_without_an_answer_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "Cups are made of clay."}')
    with pytest.raises(InputError, match="line 1: there is no answer"):
        cached(tmp_path, tmp_path / "out")


def test_a_cache_on_other_records_than_before_is_refused(made, records, tmp_path):
    again = shutil.copytree(made, tmp_path / "again")
    described = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**described, "finished": None, "data": {"train": "other"}}))
    with pytest.raises(InputError, match="holds a run on other data"):
        cached(records, again)
    with pytest.raises(InputError, match="holds a run with another 'k'"):
        cached(records, again, k=4)
