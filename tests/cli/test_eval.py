"""fastllama eval: refusals before lm-eval or a model is loaded, and its output where lm-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fastllama.cli import eval as eval_command
from fastllama.cli.main import main
from tests.cli.conftest import Command

NEEDS_LM_EVAL = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; make test-eval installs it"
)
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{opening}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


GROUP = """group: {name}
task: [{members}]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: true}}]
"""
QUICK = ("--model", "tiny", "--dtype", "float32", "--limit", "1")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks, of two questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    rows = [
        {"opening": "Once upon", "right": "a time", "wrong": "the time"},
        {"opening": "Tom was sad. He", "right": "wanted to go home.", "wrong": "the the the the."},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("first_end", "second_end"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: --tasks"),
        (["--tasks", " ,"], "--tasks is ' ,'; legal: folders, task names or patterns, separated by commas"),
        (["--tasks", "hellaswag,./nowhere"], "--tasks ./nowhere: there is no such folder"),
        (["--tasks", "nowhere/tasks"], "--tasks nowhere/tasks: there is no such folder"),
        (["--tasks", "hellaswag", "--limit", "0"], "--limit is 0; legal: at least 1"),
        (["--tasks", "hellaswag", "--num-fewshot", "-1"], "--num-fewshot is -1; legal: at least 0"),
        (["--tasks", "x", "--output", "nowhere/a.json"], "--output: there is no folder 'nowhere' to write 'a.json'"),
        (["--tasks", "x", "--output", "/"], "--output: '/' cannot be written: Is a directory"),
        (["--tasks", "hellaswag", "--dtype", "float8"], "dtype is 'float8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_argument_is_one_line(command: Command, args: list[str], said: str) -> None:
    done = command("eval", *args)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_folder_without_tasks_is_one_line(command: Command, tmp_path: Path) -> None:
    done = command("eval", "--tasks", tmp_path)
    assert (done.status, done.out) == (2, "")
    assert f"--tasks {tmp_path} holds no task; legal: a folder with task files of lm-eval, *.yaml" in done.err


def test_lm_eval_that_is_missing_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = command("eval", "--tasks", "hellaswag")
    assert (done.status, done.out) == (2, "")
    expected = "fastllama eval needs 'lm_eval', which is not installed: pip install 'fastllama[eval]'"
    assert done.err == f"fastllama: error: {expected}\n"


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_a_folder_as_a_table_and_as_json(command: Command, tasks: Path, tmp_path: Path) -> None:
    options = ("--model", "tiny", "--dtype", "float32")
    done = command("eval", "--tasks", tasks, *options)
    assert done.status == 0, done.err
    assert "|first_end " in done.out
    assert "|second_end" in done.out
    assert "|acc   |↑  |    1|±  |     0|" in done.out
    assert "tiny: 4.5 M parameters, float32 on cpu" in done.err
    assert "prompt tokens, 0 of them from the prefix cache" in done.err
    file = tmp_path / "results.json"
    done = command("eval", "--tasks", tasks, *options, "--json", "--limit", 1, "--output", file, "--quantize", "int8")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert json.loads(file.read_text()) == found
    assert found["results"]["first_end"]["acc,none"] == 1.0
    assert found["n-samples"]["second_end"] == {"original": 2, "effective": 1}
    assert (found["model"], found["config"]["quantization"]) == ("tiny", "int8")


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_cannot_be_loaded_is_one_line_before_the_model(command: Command, tasks: Path) -> None:
    no_model = ("--model", str(tasks / "no-model"))
    (tasks / "data.jsonl").unlink()
    done = command("eval", "--tasks", tasks)
    assert (done.status, done.out) == (2, "")
    assert "fastllama: error: --tasks: lm-eval cannot load first_end: " in done.err
    (tasks / "first_end.yaml").write_text("output_type: multiple_choice\n")
    (tasks / "second_end.yaml").unlink()
    assert f"--tasks {tasks} holds no task" in command("eval", "--tasks", tasks).err
    assert "no-model" in command("eval", "--tasks", "x", *no_model).err, "a model's name is checked first of all"
    assert (
        "--tasks helaswag is not a task of lm-eval (did you mean 'hellaswag'?)"
        in command("eval", "--tasks", "helaswag").err
    )


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_results_are_printed_where_they_cannot_be_written(
    command: Command, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(eval_command, "write_record", full)
    done = command("eval", "--tasks", tasks, *QUICK, "--output", tmp_path / "results.json")
    assert done.status != 0
    assert "No space left on device" in done.err
    assert "|first_end " in done.out, "minutes of measurement are not lost"


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_quiet_shows_no_bars_and_git_never_complains(
    tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    shown = {}
    for options in ((), ("--quiet",)):
        assert main(["eval", "--tasks", str(tasks), *QUICK, *options]) == 0
        shown[options] = capfd.readouterr().err
        assert "fatal" not in shown[options], "git's line about a missing repository reads like a failure"
    assert "it/s" in shown[()], "bars are shown, so that this test can fail"
    assert "it/s" not in shown[("--quiet",)]


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_a_folder_stands_for_its_groups_too(command: Command, tasks: Path) -> None:
    (tasks / "ends.yaml").write_text(GROUP.format(name="ends", members="first_end, second_end"))
    done = command("eval", "--tasks", tasks, *QUICK, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert set(found["results"]) == {"ends", "first_end", "second_end"}
    assert found["groups"]["ends"]["acc,none"] == 1.0, "the aggregate of its members"


@NEEDS_LM_EVAL
@pytest.mark.filterwarnings("ignore")
def test_members_of_groups_are_loaded_once_and_names_pick_from_a_folder(tasks: Path) -> None:
    from fastllama.integrations.lm_eval.tasks import load_tasks

    def names(*picked: str) -> list[str]:
        found = load_tasks([tasks], picked)
        return [getattr(each, "name", None) or each.task_name for each in found]

    assert names() == ["first_end", "second_end"]
    (tasks / "a.yaml").write_text(GROUP.format(name="part", members="first_end"))
    assert names() == ["part", "second_end"]
    for whole in ("before", "whole"):  # both orders in the alphabet, in which lm-eval lists groups
        (tasks / "b.yaml").write_text(GROUP.format(name=whole, members="part"))
        assert names() == [whole, "second_end"], "a group inside another one comes with that"
    assert names("first_end") == ["first_end"]
    assert names("part", "first_end") == ["part"]
    assert names("*_end") == ["first_end", "second_end"]
    (tasks / "c.yaml").write_text(GROUP.format(name="z_other", members="first_end, second_end"))
    with pytest.raises(ValueError, match="first_end is in the groups whole and z_other; legal: one of them"):
        names()
    assert names("z_other") == ["z_other"]
