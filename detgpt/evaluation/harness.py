"""Benchmarks of others: tasks of EleutherAI's lm-evaluation-harness, put to a language model or a reasoner's.

    Harness(["arc_easy", "piqa"]).measure("Qwen/Qwen3-VL-4B-Instruct")      # {"arc_easy · acc": AbilityResult(…), …}

The library (`lm_eval`, the extra `detgpt[harness]`) brings the tasks, puts them and scores the answers; here its
numbers get the shape of `abilities`. The tasks are about text, and fetch their data from the hub unless a folder of
tasks of your own says otherwise. Those that Lin et al. 2023 (arXiv:2309.06256) watch while a model is aligned:
arc_easy, arc_challenge, race, piqa; squadv2 or squad_completion, drop; wmt14-fr-en.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detgpt.errors import InputError, MissingExtraError, ModelError
from detgpt.evaluation.abilities import AbilityResult, answering

# Of a task's numbers the first of these that it has is shown; the paper's are acc, f1 and bleu.
METRICS = ("acc", "f1", "bleu", "exact_match", "contains", "em", "acc_norm", "chrf")
IN_PERCENT = {"bleu", "chrf"}
OF_SQUAD_2 = "HasAns_f1,none"  # whose task gives all of its numbers in percent
NORMAL_95 = 1.96  # standard errors on either side


class Harness:
    """Tasks by their names in the harness, and in `folder`, which holds task files (YAML) of your own.

    Raises `MissingExtraError` without lm_eval, `InputError` for a task that there is not.
    """

    def __init__(self, tasks: Sequence[str], folder: str | Path | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError(error.name or "lm_eval", "harness") from error
        self._manager = manager(TaskManager, folder)
        self.tasks = known(tasks, self._manager, "the harness", "lm_eval ls tasks")

    def measure(
        self,
        model: str | Path,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str | None = None,
    ) -> dict[str, AbilityResult]:
        """{"task · metric": result} of each task, the first `limit` questions of each.

        model: a checkpoint that writes text, or a pair, of which the reasoner is meant. Questions go to it as the
        harness words them, without a chat template. The interval is the harness's standard error twice (1.96 times);
        None where it gives none. Raises `ModelError` for what does not load, `InputError` for a task without a number
        that is a share.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        language, tokenizer = load(model, device, dtype)
        longest = getattr(language.config.get_text_config(), "max_position_embeddings", None)
        asked = HFLM(language, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=longest)
        found: Any = simple_evaluate(
            asked, tasks=self.tasks, task_manager=self._manager, limit=limit, log_samples=False
        )
        counts = found["n-samples"]  # of the tasks; their groups have none
        return dict(_result(task, found["results"][task], count["effective"]) for task, count in counts.items())


def manager(kind: Any, folder: str | Path | None) -> Any:
    """A library's TaskManager, with the tasks in `folder` too. Raises `InputError` where there is no such folder."""
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}: give one with task files (.yaml)")
    return kind(include_path=None if folder is None else str(folder))


def known(tasks: Sequence[str], manager: Any, library: str, listing: str) -> list[str]:
    """The tasks, each once. Raises `InputError` for one that there is not. listing: the command that lists them all."""
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else f"`{listing}` lists them all."
            raise InputError(f"{library} has no task {task!r}: {hint}")
    return list(dict.fromkeys(tasks))


def load(model: str | Path, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model, vision-language or language, and its tokenizer. Raises `ModelError`, `InputError` for a server's."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import AutoModelForImageTextToText as AutoModelThatSees

    from detgpt.device import choose_device
    from detgpt.reasoners.huggingface import load_model

    name, base_url = answering(model)
    if base_url:
        raise InputError(f"{model} runs at {base_url}, and the harness needs its weights here: give a checkpoint")
    place = choose_device(device)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}\nCheck the name, the files and the network.") from error
    kind = AutoModelThatSees if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM
    usual = "float32" if place.type == "cpu" else "bfloat16"
    loaded = load_model(name, None, {"dtype": dtype or usual, "use_safetensors": True}, kind)
    return loaded.to(place).eval(), tokenizer


def _result(task: str, numbers: Mapping[str, Any], n: int) -> tuple[str, AbilityResult]:
    """The number of a task that is shown, of {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}, and its name."""
    for metric in METRICS:
        for key in numbers:
            name, comma, filter_ = key.partition(",")
            if comma and name == metric:
                scale = 100 if metric in IN_PERCENT or OF_SQUAD_2 in numbers else 1
                error = numbers.get(f"{metric}_stderr,{filter_}")
                return f"{task} · {metric}", scaled(numbers[key], error, scale, n)
    measured = sorted({key.partition(",")[0] for key in numbers if "," in key and "_stderr" not in key})
    raise InputError(f"the task {task!r} measures {', '.join(measured)}, none of {', '.join(METRICS)}: leave it out")


def scaled(value: float, error: Any, scale: int, n: int) -> AbilityResult:
    """A number of a harness, and its standard error if that is one, as shares of `scale`."""
    value = value / scale
    if not isinstance(error, (int, float)):  # "N/A"
        return AbilityResult(value, None, None, n)
    margin = NORMAL_95 * error / scale
    return AbilityResult(value, max(value - margin, 0.0), min(value + margin, 1.0), n)
