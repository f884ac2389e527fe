"""lm-eval measures with this runtime what it measures with its own `hf` model: `make test-eval`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-eval installs it")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fastllama import LLM
from fastllama.integrations.lm_eval import FastLlamaLM
from fastllama.io.chat.template import ChatTemplate

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and of what it stands on

TINY = Path(__file__).parents[2] / "fastllama" / "assets" / "tiny"
STORIES = (TINY / "heldout_seed.txt").read_text(encoding="utf-8").splitlines()
LONG = " ".join(STORIES[:12])  # 2600 tokens; the model's context has 1024

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "story_end": """
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "story_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{begin}}{{ends[0]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "story_sentence": """
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{ends[0]}}"
generation_kwargs: {until: ["."], do_sample: false, temperature: 0.0, max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks about six of the held-out stories: whose fourth sentence follows the first three, and which it is."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "stories.jsonl"
    sentences = [story.split(". ") for story in STORIES[:8]]
    rows = [
        {"begin": ". ".join(each[:3]) + ".", "ends": [f" {other[3]}." for other in (each, *sentences[:3])]}
        for each in sentences[3:]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON.format(data=data)}{text.lstrip()}")
    return folder


@pytest.fixture(scope="session")
def ours() -> FastLlamaLM:
    return FastLlamaLM("tiny", dtype="float32", device="cpu")


def hugging_face(**options: Any) -> HFLM:
    """lm-eval's own model. Without its cache of logits, which scores other tokens than asked where two requests are the
    same tokens, divided into context and continuation at two places (0.4.13)."""
    return HFLM(pretrained=str(TINY), dtype="float32", device="cpu", logits_cache=False, **options)


@pytest.fixture(scope="session")
def theirs() -> HFLM:
    return hugging_face()


@pytest.fixture(scope="session")
def theirs_without_bos() -> HFLM:
    """The reference for rolling texts: where the tokenizer adds BOS, hf puts a second one after the prefix."""
    return hugging_face(add_bos_token=False)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def same(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Equal as sums of log-probabilities in fp32, of which theirs rounds at each addition."""
    return list(found) == pytest.approx(list(expected), rel=1e-6, abs=1e-4)


def run(model: Any, tasks: Path, *names: str, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def check_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that metrics agree, and each single answer."""
    for task, metrics in expected["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers, "a task without metrics compares nothing"
        assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-6)
        for ours, theirs in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert ours["arguments"] == theirs["arguments"]
            one, other = list(leaves(ours["resps"])), list(leaves(theirs["resps"]))
            # texts, log-likelihoods, and whether greedy decoding gives a continuation
            assert [each for each in one if not isinstance(each, float)] == [
                each for each in other if not isinstance(each, float)
            ]
            assert same(*([each for each in every if isinstance(each, float)] for every in (one, other)))


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.parametrize("template", [False, True], ids=["plain", "chat template"])
def test_choices_and_answers_are_those_of_hf(tasks: Path, ours: FastLlamaLM, theirs: HFLM, template: bool) -> None:
    names = ("story_end", "story_sentence")
    options = {"apply_chat_template": template}
    check_alike(run(ours, tasks, *names, **options), run(theirs, tasks, *names, **options))


def test_perplexities_are_those_of_hf(tasks: Path, ours: FastLlamaLM, theirs_without_bos: HFLM) -> None:
    check_alike(run(ours, tasks, "story_text"), run(theirs_without_bos, tasks, "story_text"))


PAIRS = [
    ("Once upon", " a time"),
    ("", "Once upon a time"),
    ("", "<s>Once"),
    ("Once upon a  ", "time"),  # blanks of a context go to the continuation
    ("The café 😀", "  was ünïcøde 漢字."),
    ("Hi <s> there", "</s> x"),
    ("<s>Tom was", " tired."),
    (LONG, " The end."),
    ("Once", f" {STORIES[0]}"),
]


@pytest.mark.parametrize("max_length", [None, 300], ids=["whole context", "300 tokens"])
def test_log_likelihoods_are_those_of_hf(ours: FastLlamaLM, theirs: HFLM, max_length: int | None) -> None:
    """Empty contexts, special tokens in a text, other scripts, and contexts that both cut."""
    if max_length is not None:
        ours, theirs = FastLlamaLM(ours.llm, max_length=max_length), hugging_face(max_length=max_length)
    found, expected = (model.loglikelihood(asked("loglikelihood", *PAIRS)) for model in (ours, theirs))
    assert same([each[0] for each in found], [each[0] for each in expected])
    assert [each[1] for each in found] == [each[1] for each in expected]


@pytest.mark.parametrize("max_length", [None, 50], ids=["whole context", "50 tokens"])
def test_rolling_log_likelihoods_are_those_of_hf(
    ours: FastLlamaLM, theirs_without_bos: HFLM, max_length: int | None
) -> None:
    theirs = theirs_without_bos
    if max_length is not None:
        ours, theirs = FastLlamaLM(ours.llm, max_length=max_length), hugging_face(max_length=50, add_bos_token=False)
    texts = [(STORIES[0],), (LONG,), ("",), ("é 😀",), ("a",)]
    found, expected = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in (ours, theirs))
    assert same(found, expected)
    assert ours.loglikelihood_rolling(asked("loglikelihood_rolling", (f"<s>{STORIES[0]}",))) == pytest.approx(found[:1])


def test_bos_is_left_out_of_contexts_by_add_bos_token(theirs_without_bos: HFLM, ours: FastLlamaLM) -> None:
    without = FastLlamaLM(ours.llm, add_bos_token=False)
    found, expected = (
        model.loglikelihood(asked("loglikelihood", ("Tom was", " tired."), ("", "He")))
        for model in (without, theirs_without_bos)
    )
    assert same([each[0] for each in found], [each[0] for each in expected])
    with_bos = ours.loglikelihood(asked("loglikelihood", ("Tom was", " tired.")))
    assert not same([with_bos[0][0]], [found[0][0]]), "BOS changes the likelihood, so that this test can fail"


def test_answers_are_those_of_hf_at_their_ends(ours: FastLlamaLM, theirs: HFLM) -> None:
    """Stop strings across tokens, in the first token, with its space; EOS by name; a context that is cut."""
    questions = [
        (STORIES[0][:60], {"until": ["."], "max_gen_toks": 20}),
        (STORIES[1][:80], {"until": ["e w", "\n"], "max_gen_toks": 20}),
        ("Once upon", {"until": " a", "max_gen_toks": 8}),
        (LONG, {"until": ["</s>"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
        ("Tom was sad. He", {"max_gen_toks": 12}),
        ("", {"until": ["."], "max_gen_toks": 12}),
        ("The café 😀", {"until": ["."], "max_gen_toks": 12}),
    ]
    found, expected = (model.generate_until(asked("generate_until", *questions)) for model in (ours, theirs))
    assert found == expected


def test_the_choices_of_a_question_share_its_context(tasks: Path) -> None:
    """Of four choices, at most one computes the full pages of the context; the rest are a page and an end each."""
    page = 16
    model = FastLlamaLM("tiny", dtype="float32", device="cpu", page_size=page)
    found = run(model, tasks, "story_end")["samples"]["story_end"]
    shared = 0
    for sample in found:
        (context, _), *_ = sample["arguments"]
        shared += 3 * (len(model.tok_encode(context)) // page * page)
    assert len(found) == 5
    assert model.num_cached_tokens >= shared - 3 * page * len(found), "the page of the last context token is its own"
    assert model.num_cached_tokens > model.num_prompt_tokens / 3


def test_a_quantized_model_is_measured_by_its_name(tasks: Path) -> None:
    arguments = "pretrained=tiny,dtype=float32,quantization=int8,kv_cache_dtype=int8,max_model_len=512,device=cpu"
    found = run("fastllama", tasks, "story_text", model_args=arguments, batch_size=4)
    assert (found["config"]["quantization"], found["config"]["max_length"]) == ("int8", 512)
    llm = LLM("tiny", dtype="float32", quantization="int8", kv_cache_dtype="int8", max_model_len=512, device="cpu")
    for sample in found["samples"]["story_text"]:
        (score,) = llm.score(sample["arguments"][0][0])
        assert sample["filtered_resps"] == pytest.approx([score.cumulative_logprob], rel=1e-5)


def test_the_other_models_of_lm_eval_stay_registered() -> None:
    """In a process that imports ours first: lm-eval fills its registry at its first use only if it is empty."""
    code = "import fastllama.integrations.lm_eval as ours, lm_eval.api.registry as all; "
    code += "print(all.get_model('fastllama') is ours.FastLlamaLM, 'hf' in all.model_registry)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=TINY.parents[2]
    )
    assert done.stdout == "True True\n", done.stderr


def test_answers_are_kept_in_lm_evals_cache(tmp_path: Path, tasks: Path, ours: FastLlamaLM) -> None:
    cache = str(tmp_path / "answers")
    first = run(ours, tasks, *TASKS, use_cache=cache)
    before = ours.num_prompt_tokens
    assert run(ours, tasks, *TASKS, use_cache=cache)["results"] == first["results"]
    assert ours.num_prompt_tokens == before, "the second run asks the model nothing"


def test_each_answer_is_handed_to_the_cache_as_it_comes(ours: FastLlamaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(ours.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    (pair,) = ours.loglikelihood(asked("loglikelihood", ("Once", " upon")))
    (total,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", ("Once",)))
    options = {"max_gen_toks": 2}
    (text,) = ours.generate_until(asked("generate_until", ("Once", options)))
    assert kept == [
        ("loglikelihood", ("Once", " upon"), pair),
        ("loglikelihood_rolling", ("Once",), total),
        ("generate_until", ("Once", options), text),
    ]


def test_a_message_to_be_continued_is_written_as_by_hf(ours: FastLlamaLM, theirs: HFLM) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    found, expected = (model.apply_chat_template(history, add_generation_prompt=False) for model in (ours, theirs))
    assert found == expected
    assert found.endswith("So"), "no end of the turn"


def test_a_system_message_that_the_template_refuses_is_left_out_as_by_hf(
    ours: FastLlamaLM, theirs: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    monkeypatch.setitem(ours.__dict__, "_template", ChatTemplate(ours.tokenizer, source, "a.jinja"))
    monkeypatch.setattr(theirs.tokenizer, "chat_template", source)
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history) == "user: Hi\n"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("Once", LONG), "a continuation has 2[0-9]* tokens; legal: 1 to 1024"),
        ("loglikelihood", ("", ""), "a continuation has 0 tokens; legal: 1 to 1024"),
        ("generate_until", ("Once", {"max_gen_toks": 1024}), "max_gen_toks is 1024; legal: less than max_length, 1024"),
    ],
    ids=["long", "empty", "answer"],
)
def test_a_refused_question_is_named(ours: FastLlamaLM, kind: Any, arguments: tuple[Any, ...], message: str) -> None:
    question = Instance(kind, {}, arguments, 0, metadata=("story_end", 7, 1))
    with pytest.raises(ValueError, match=f"^task story_end, document 7: {message}"):
        getattr(ours, kind)([*asked(kind, ("Once", " upon" if kind == "loglikelihood" else {})), question])
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(ours, kind)(asked(kind, arguments))


def test_where_one_answer_fails_the_others_are_ended(ours: FastLlamaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(generation: Any) -> Any:
        raise ValueError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(ours.llm, "follow", follow)
        with pytest.raises(ValueError, match="no answer"):
            ours.generate_until(asked("generate_until", ("Once", {}), ("Tom", {})))
    assert not ours.llm.engine.has_work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "pretrained is None and model None; legal: one of the two names"),
        ({"pretrained": "tiny", "model": "tiny"}, ValueError, "legal: one of the two names"),
        ({"pretrained": "tiny", "chat_format": "llama2"}, ValueError, "chat_format is 'llama2'; legal: none"),
        ({"pretrained": "tiny", "quantisation": "int8"}, TypeError, "did you mean 'quantization'"),
    ],
    ids=["none", "both", "chat format", "unknown"],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastLlamaLM(**options)


def test_options_beside_an_llm_are_refused(ours: FastLlamaLM) -> None:
    with pytest.raises(ValueError, match=r"dtype given with an LLM; legal: LLM\(dtype=...\)"):
        FastLlamaLM(ours.llm, dtype="float32")
    with pytest.raises(ValueError, match="max_length is 2000; legal: 2 to max_model_len, 1024"):
        FastLlamaLM(ours.llm, max_length=2000)
