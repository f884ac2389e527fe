"""Tasks of lm-eval by name or folder, checked before a model is loaded, and one run of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from fastllama.errors import nearest, summary
from fastllama.integrations.lm_eval.model import FastLlamaLM

# Of lm-eval's results: all but the texts about the machine.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "config")


def load_tasks(folders: Sequence[Path], names: Sequence[str]) -> list[Any]:
    """All tasks of these folders, and those that names or patterns such as "mmlu_*" stand for, with their data.

    Raises ValueError for a folder without tasks, an unknown name, and a task that cannot be loaded.
    """
    wanted: list[str] = []
    for folder in folders:
        held = TaskManager(include_path=str(folder), include_defaults=False).all_subtasks
        if not held:
            raise ValueError(f"--tasks {folder} holds no task; legal: a folder with task files of lm-eval, *.yaml")
        wanted += held
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=bool(names))
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            alike = nearest(name, manager.all_tasks)
            meant = f" (did you mean {alike!r}?)" if alike else ""
            raise ValueError(f"--tasks {name} is no task of lm-eval{meant}; legal: `lm-eval ls tasks` lists them")
        wanted += found
    loaded: list[Any] = []
    for name in dict.fromkeys(wanted):
        try:
            each = manager.load([name])
        except Exception as error:  # whatever a task's file, its code or its data set can raise
            raise ValueError(f"--tasks: lm-eval cannot load {name}: {summary(error)}") from error
        loaded += [each["groups"][name]] if name in each["groups"] else each["tasks"].values()
    return loaded


def evaluate(
    model: FastLlamaLM, tasks: Sequence[Any], *, num_fewshot: int | None, limit: int | None, apply_chat_template: bool
) -> dict[str, Any]:
    """What lm-eval measures of a model on loaded tasks, as its results say it: metrics by task, versions, settings."""
    found = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
    )
    return {name: found[name] for name in _KEPT if name in found}


def table(results: dict[str, Any]) -> str:
    """lm-eval's tables of results, of tasks and of groups: each metric with its standard error."""
    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, column).rstrip() for column in columns)
