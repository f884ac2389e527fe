"""Loads tasks of lm-eval by name or folder, before a model is loaded, and runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tqdm import tqdm

from fastllama.errors import nearest, summary
from fastllama.integrations.lm_eval.model import FastLlamaLM

# The parts of lm-eval's results that are kept: all but descriptions of the machine.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "config")


def load_tasks(folders: Sequence[Path], names: Sequence[str]) -> list[Any]:
    """Load tasks and groups, with their data, from folders and by names or patterns such as "mmlu_*".

    A name or pattern defined in a folder selects among the folder's tasks; any other is lm-eval's own. A task or group
    that is a member of a loaded group is loaded with that group only.
    Raises ValueError for a folder without tasks, an unknown name, a task that cannot be loaded, and groups that share
    a task, which lm-eval cannot run together.
    """
    own = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    picked = {name: own.match_tasks([name]) for name in names}
    wanted = [each for found in picked.values() for each in found]
    for folder in folders:
        held = TaskManager(include_path=str(folder), include_defaults=False)
        defined = [*held.all_groups, *held.all_subtasks]
        if not defined:
            raise ValueError(f"--tasks {folder} holds no task; legal: a folder with task files of lm-eval, *.yaml")
        wanted += [] if any(name in held.all_tasks for found in picked.values() for name in found) else defined
    others = [name for name in names if not picked[name]]
    manager = TaskManager(include_path=own.include_path, include_defaults=True) if others else own
    for name in others:
        found = manager.match_tasks([name])
        if not found:
            alike = nearest(name, manager.all_tasks)
            meant = f" (did you mean {alike!r}?)" if alike else ""
            raise ValueError(f"--tasks {name} is not a task of lm-eval{meant}; legal: `lm-eval ls tasks` lists them")
        wanted += found
    return _load(manager, list(dict.fromkeys(wanted)))


def _load(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """Groups and tasks by name, without members of another loaded group."""
    loaded: dict[str, Any] = {}
    holder: dict[str, str] = {}  # member -> its group
    groups = [name for name in names if name in manager.all_groups]
    for name in [*groups, *(name for name in names if name not in groups)]:
        if name in holder:
            continue
        try:
            each = manager.load([name])
        except Exception as error:  # a task's file, code or data set can raise anything
            raise ValueError(f"--tasks: lm-eval cannot load {name}: {summary(error)}") from error
        if name not in each["groups"]:
            loaded |= {task: value for task, value in each["tasks"].items() if task not in holder}
            continue
        for member in (*each["tasks"], *(group for group in each["groups"] if group != name)):
            loaded.pop(member, None)  # a nested group that was loaded earlier
            if holder.get(member, name) not in (name, *each["groups"]):
                raise ValueError(
                    f"--tasks: {member} is in the groups {holder[member]} and {name}; legal: one of them, by name"
                )
            holder[member] = name
        loaded[name] = each["groups"][name]
    return list(loaded.values())


def evaluate(
    model: FastLlamaLM, tasks: Sequence[Any], *, num_fewshot: int | None, limit: int | None, apply_chat_template: bool
) -> dict[str, Any]:
    """Run lm-eval on loaded tasks; returns its results: metrics by task, versions, settings."""
    with _replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None):  # git complains outside a repository
        found = lm_eval.evaluator.simple_evaluate(
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
    """lm-eval's result tables of tasks and of groups: each metric with its standard error."""
    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, column).rstrip() for column in columns)


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide progress bars of lm-eval and of data sets, some of which have no option for it."""
    show = tqdm.__init__

    def hide(bar: Any, *args: Any, **options: Any) -> None:
        show(bar, *args, **{**options, "disable": True})

    with _replaced(tqdm, "__init__", hide):
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name, None)  # missing in some versions of lm-eval
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
