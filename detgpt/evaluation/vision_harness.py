"""Benchmarks of others about pictures: tasks of lmms-eval, put to a reasoner.

    VisionHarness(["pope", "textvqa_val"]).measure("Qwen/Qwen3-VL-4B-Instruct")   # {"pope · pope_accuracy": …, …}

The library (`lmms_eval`, the extra `detgpt[vision-harness]`) brings the tasks, puts them and scores the answers; the
reasoner answers as it does here, in its own chat template, and the library's numbers get the shape of `abilities`.
Tasks fetch their data from the hub unless a folder of tasks of your own says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detgpt.errors import InputError, MissingExtraError
from detgpt.evaluation.abilities import AbilityResult, load_answering
from detgpt.evaluation.harness import known, manager, scaled
from detgpt.reasoners import Reasoner, Request

MAX_NEW_TOKENS = 256  # of an answer, where a task does not say


class VisionHarness:
    """Tasks by their names in lmms-eval, and in `folder`, which holds task files (YAML) of your own.

    Raises `MissingExtraError` without lmms_eval, `InputError` for a task that there is not.
    """

    def __init__(self, tasks: Sequence[str], folder: str | Path | None = None) -> None:
        try:
            from lmms_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError(error.name or "lmms_eval", "vision-harness") from error
        self._manager = manager(TaskManager, folder)
        self.tasks = known(tasks, self._manager, "lmms-eval", "lmms-eval tasks list")

    def measure(
        self,
        model: str | Path,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str | None = None,
    ) -> dict[str, AbilityResult]:
        """{"task · metric": result} of every number of a task that is a share, the first `limit` questions of each.

        model: a reasoner's checkpoint, or a pair. The interval is the library's standard error twice (1.96 times);
        None where it gives none. Raises `InputError` for a task without such a number, one that compares likelihoods,
        or one with several pictures in a question.
        """
        from lmms_eval.evaluator import simple_evaluate

        reasoner = load_answering(model, device=device, dtype=dtype)
        found: Any = simple_evaluate(
            _asked(reasoner, batch_size), tasks=self.tasks, task_manager=self._manager, limit=limit, log_samples=False
        )
        counts = found["n-samples"]  # of the tasks; their groups have none
        results: dict[str, AbilityResult] = {}
        for task, count in counts.items():
            results |= _shares(task, found["results"][task], count["effective"])
        return results


def _asked(reasoner: Reasoner, batch_size: int) -> Any:
    """The reasoner as a model of the library."""
    from lmms_eval.api.model import lmms

    class Asked(lmms):
        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            answers: list[str] = []
            for start in range(0, len(requests), batch_size):
                batch = [request.args for request in requests[start : start + batch_size]]
                longest = max(settings.get("max_new_tokens", MAX_NEW_TOKENS) for _, settings, *_ in batch)
                asked = [self._request(*arguments) for arguments in batch]
                answered = reasoner.reason(asked, max_new_tokens=longest)
                answers += [
                    _until(answer.text, settings.get("until"))
                    for answer, (_, settings, *_) in zip(answered, batch, strict=True)
                ]
            return answers

        def _request(self, text: str, settings: Any, pictures: Any, index: int, task: str, split: str) -> Request:
            images = pictures(self.task_dict[task][split][index]) or []
            if len(images) > 1:
                raise InputError(
                    f"the task {task!r} shows {len(images)} pictures at once, a reasoner sees one: leave it out"
                )
            return Request(images[0] if images else None, text, verbatim=True)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise InputError(
                f"the task {requests[0].task_name!r} compares likelihoods, a reasoner writes: leave it out"
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise InputError(f"the task {requests[0].task_name!r} goes in rounds: leave it out")

    return Asked()


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text before the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.partition(end)[0] if end else text
    return text


def _shares(task: str, numbers: Mapping[str, Any], n: int) -> dict[str, AbilityResult]:
    """Of {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …} the numbers in [0, 1]."""
    shares = {}
    measured = [key for key in numbers if "," in key and "_stderr" not in key]
    for key in measured:
        metric, _, filter_ = key.partition(",")
        value = numbers[key]
        if isinstance(value, (int, float)) and 0 <= value <= 1:
            error = numbers.get(f"{metric}_stderr,{filter_}")
            shares[f"{task} · {metric}"] = scaled(value, error, 1, n)
    if not shares:
        names = ", ".join(key.partition(",")[0] for key in measured)
        raise InputError(f"the task {task!r} measures {names or 'nothing'}, of which none is a share: leave it out")
    return shares
