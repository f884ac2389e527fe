"""Draft tokens change what is computed together, never what is sampled; where they do not pay, none are proposed."""

from __future__ import annotations

import functools
import random
from collections import Counter, abc
from typing import Any

import pytest
import torch

from fastllama import LLM, LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.errors import RequestError
from fastllama.runtime.drafting.speculation import ENOUGH, PERIOD, Pace
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.planning.step import Step
from tests.runtime.models import VOCAB, Scripted, logits_of, ours, prompt_of, running

NEW_TOKENS = 20
PHRASE = prompt_of(9, seed=4)
PROMPTS = [prompt_of(1), prompt_of(17), PHRASE * 4, prompt_of(30), PHRASE * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    seed=3,
    max_tokens=NEW_TOKENS,
    n=2,
    frequency_penalty=0.5,
    repetition_penalty=1.2,
    logprobs=2,
)
PARAMS = {"greedy": GREEDY, "sampled": SAMPLED}
LIMITS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 2},
    "one batch": {},
    "seven": {"num_draft_tokens": 7},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 20},
    "few pages": {"kv_cache_tokens": 112, "max_model_len": 96},
    "int8": {"kv_cache_dtype": "int8"},
    "to the end": {"max_model_len": 48},
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft tokens are verified wherever there are any."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)


def drafter(kind: str) -> str | LlamaForCausalLM:
    """Drafts of the model itself, of another model, or of the text."""
    return {"text": lambda: "prompt_lookup", "itself": ours, "another": lambda: ours("mqa")}[kind]()


def contents(outputs: abc.Sequence[RequestOutput]) -> list[Any]:
    """All that callers see, log-probabilities as exact as one batch makes them."""
    return [
        [
            (o.token_ids, o.text, o.finish_reason, [(p.token_id, pytest.approx(p.logprob)) for p in o.logprobs or ()])
            for o in output.outputs
        ]
        for output in outputs
    ]


@functools.cache
def without(limits: str, params: str) -> list[Any]:
    """The answers without drafts."""
    options = {name: value for name, value in LIMITS[limits].items() if name != "num_draft_tokens"}
    with running(ours(), **options) as llm:
        return contents(llm.generate(PROMPTS, PARAMS[params]))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("kind", "params", "limits"),
    [
        *(("text", "greedy", limits) for limits in LIMITS),
        *(("itself", params, limits) for params in PARAMS for limits in LIMITS),
        *(("another", "sampled", limits) for limits in ("one batch", "few pages")),
    ],
)
def test_answers_are_those_without_drafts(kind: str, params: str, limits: str) -> None:
    with running(ours(), speculation=drafter(kind), **LIMITS[limits]) as llm:
        found = contents(llm.generate(PROMPTS, PARAMS[params]))
        assert llm.engine.speculation is not None
        drafted, accepted = llm.engine.speculation.num_drafted, llm.engine.speculation.num_accepted
    assert found == without(limits, params)
    assert drafted > 0
    if kind == "itself" and limits != "int8":
        assert accepted > 0.7 * drafted, "a model accepts its own drafts, except at the ends"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["text", "itself"])
def test_to_the_bit_where_that_is_asked_for(kind: str) -> None:
    def run(**options: Any) -> list[RequestOutput]:
        with running(ours(dtype=torch.bfloat16), deterministic=True, **options) as llm:
            return llm.generate(PROMPTS, [GREEDY, SAMPLED, SAMPLED, GREEDY, SAMPLED])

    draft = "prompt_lookup" if kind == "text" else ours(dtype=torch.bfloat16)
    assert [o.outputs for o in run(speculation=draft)] == [o.outputs for o in run()]


@pytest.mark.usefixtures("always")
def test_samples_follow_the_distribution() -> None:
    """Chi-square over second and third tokens: 500 samples, expected by the logits of transformers."""
    prompt, heat, count = PROMPTS[1], 2.5, 500
    params = [SamplingParams(temperature=heat, seed=seed, max_tokens=3) for seed in range(count)]
    with running(ours(), speculation=ours("mqa"), kv_cache_tokens=4096) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate([prompt] * count, params)]
        assert llm.engine.speculation is not None
        assert llm.engine.speculation.num_accepted > count / 10, "nothing was accepted that could be wrong"
    for place in (1, 2):
        seen = Counter(tokens[place] for tokens in outputs)
        # Earlier tokens are as sampled; so the expectation is that of all samples' own distributions.
        prefixes = Counter(tokens[:place] for tokens in outputs)
        expected = torch.zeros(VOCAB, dtype=torch.float64)
        for prefix, count in prefixes.items():
            expected += count * torch.softmax(logits_of([*prompt, *prefix])[-1] / heat, -1)
        likely = (expected >= 5).nonzero().flatten().tolist()
        terms = [(seen[token] - expected[token]) ** 2 / expected[token] for token in likely]
        chi_square = float(sum(terms))
        freedom = len(terms)
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, f"{chi_square:.0f} with {freedom} degrees of freedom"


@pytest.mark.usefixtures("always")
def test_one_step_gives_several_tokens() -> None:
    with running(ours(), speculation=ours(), num_draft_tokens=4) as llm:
        generation, steps = llm.engine.add_request(PROMPTS[1], GREEDY), 0
        while not generation.finished:
            llm.engine.step()
            steps += 1
        metrics = generation.metrics()
    # The prompt's step samples one, each of the others five.
    assert steps == 1 + -(-(NEW_TOKENS - 1) // 5)
    assert (metrics.num_draft_tokens, metrics.num_accepted_tokens) == (16, 15)


@pytest.mark.usefixtures("always")
def test_a_draft_after_the_end_is_discarded() -> None:
    """EOS and stop tokens among accepted drafts end the answer there."""
    with running(ours()) as llm:
        whole = llm.generate([PROMPTS[1]], GREEDY)[0].outputs[0].token_ids
    for place in range(1, 12):
        token = whole[place]
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop_token_ids=[token])
        with running(ours(), speculation=ours(), num_draft_tokens=7) as llm:
            (sample,) = llm.generate([PROMPTS[1]], params)[0].outputs
        assert sample.token_ids == whole[: whole.index(token) + 1]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", token)


def scripted(script: list[int]) -> Scripted:
    model = ours(kind=Scripted)
    assert isinstance(model, Scripted)
    model.script = script
    return model


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("broken", range(18, 28))
def test_a_broken_logit_counts_when_its_turn_has_come(broken: int) -> None:
    """After accepted drafts it ends the request; after a rejected one it is discarded."""
    script = list(range(1, 61))
    spoiled = [*script[:broken], Scripted.BROKEN, *script[broken + 1 :]]
    params = SamplingParams(temperature=0, max_tokens=20)
    with running(scripted(spoiled), speculation=scripted(script)) as llm:
        with pytest.raises(RequestError, match="not finite numbers") as failed:
            llm.generate([script[:10]], params)
        (sample,) = failed.value.outputs[0].outputs
        assert (sample.token_ids, sample.finish_reason) == (tuple(script[10:broken]), "error")
        assert llm.engine.pool.num_available == llm.engine.pool.num_pages
    wrong = [*script[: broken - 1], 90, *script[broken:]]
    with running(scripted(script), speculation=scripted(wrong)) as llm:
        (sample,) = llm.generate([script[:10]], params)[0].outputs
        assert (sample.token_ids, sample.finish_reason) == (tuple(script[10:30]), "length")


class Wild:
    """Proposes random tokens, sometimes none."""

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def follow(self, step: Step) -> None: ...

    def forget(self, sequences: abc.Sequence[Sequence]) -> None: ...

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        return [
            tuple(self.rng.randrange(VOCAB) for _ in range(count)) if self.rng.random() < 0.7 else () for _ in sequences
        ]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("limits", ["one batch", "few pages", "to the end"])
def test_any_draft_is_harmless(limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ours(), speculation="prompt_lookup", **LIMITS[limits]) as llm:
        assert llm.engine.speculation is not None
        monkeypatch.setattr(llm.engine.speculation, "drafter", Wild())
        found = contents(llm.generate(PROMPTS, GREEDY))
        assert llm.engine.speculation.num_drafted > 0
    assert found == without(limits, "greedy")


def failing(*args: Any) -> Any:
    raise MemoryError("no draft")


@pytest.mark.usefixtures("always")
def test_a_fault_in_drafting_fails_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = without("one batch", "greedy")
    with running(ours(), speculation="prompt_lookup") as llm:
        assert llm.engine.speculation is not None
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.speculation, "drafter", Wild())
            patch.setattr(Wild, "propose", failing)
            generations = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
            while llm.engine.has_work:
                llm.engine.step()
        assert contents([generation.output() for generation in generations]) == expected
        assert "a step runs without draft tokens" in caplog.text


@pytest.mark.usefixtures("always")
def test_a_step_with_drafts_that_fails_is_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request fails for tokens that were never sampled."""
    expected = without("one batch", "greedy")
    with running(ours(), speculation="prompt_lookup") as llm:
        assert llm.engine.speculation is not None
        run, failures = llm.engine._runner.run, [0]

        def trying(step: Step, *before: Any) -> Any:
            if any(chunk.drafts for chunk in step.chunks):
                failures[0] += 1
                raise RuntimeError("drafts")
            return run(step, *before)

        monkeypatch.setattr(llm.engine.speculation, "drafter", Wild())
        monkeypatch.setattr(llm.engine._runner, "run", trying)
        generations = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        while llm.engine.has_work:
            llm.engine.step()
        assert failures[0] > len(PROMPTS)
        assert contents([generation.output() for generation in generations]) == expected


def simulate(pace: Pace, steps: int, *, plain: float, drafted: float, accepted: int, num_seqs: int = 4) -> int:
    """The number of extended steps among so many, where each kind takes its seconds."""
    count = 0
    for _ in range(steps):
        if pace.pays(num_seqs, num_seqs):
            pace.note(num_seqs, drafted, num_seqs, accepted * num_seqs)
            count += 1
        else:
            pace.note(num_seqs, plain, 0, 0)
    return count


def test_what_loses_is_switched_off() -> None:
    assert simulate(Pace(4), 1000, plain=1.0, drafted=2.0, accepted=0) <= 1000 / PERIOD + 5 * ENOUGH
    assert simulate(Pace(4), 1000, plain=1.0, drafted=2.0, accepted=2) >= 1000 - 1000 / PERIOD - 2 * ENOUGH
    assert simulate(Pace(4), 1000, plain=1.0, drafted=4.0, accepted=2) <= 1000 / PERIOD + 5 * ENOUGH


def test_what_wins_later_is_found() -> None:
    pace = Pace(4)
    assert simulate(pace, 500, plain=1.0, drafted=2.0, accepted=0) < 50
    assert simulate(pace, 10 * PERIOD + 200, plain=1.0, drafted=1.1, accepted=4) > 150


def test_few_drafts_in_a_batch_do_not_pay_for_all() -> None:
    pace = Pace(4)
    simulate(pace, 100, plain=1.0, drafted=1.5, accepted=2, num_seqs=8)
    assert pace.pays(8, 8)
    assert not pace.pays(8, 1)


def test_an_engine_that_loses_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected drafts cost, by a clock on which each token of a step takes a second."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    with running(ours(), speculation="prompt_lookup") as llm:
        assert llm.engine.speculation is not None
        now, run = [0.0], llm.engine._runner.run

        def timed(step: Step, *before: Any) -> Any:
            now[0] += sum(chunk.length for chunk in step.chunks)
            return run(step, *before)

        monkeypatch.setattr(llm.engine.speculation, "_clock", lambda: now[0])
        monkeypatch.setattr(llm.engine.speculation, "drafter", Wild())
        monkeypatch.setattr(llm.engine._runner, "run", timed)
        llm.generate([PROMPTS[1]], params)
        assert llm.engine.speculation.num_drafted <= 4 * (200 / PERIOD + 5 * ENOUGH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0; legal: 1 to 7"),
        ({"num_draft_tokens": 8}, "num_draft_tokens is 8; legal: 1 to 7"),
        ({"speculation": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_it_must_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LLM(ours(), **options)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the draft model has a vocabulary of 50 on cpu; legal: the model's, 97 on cpu"
    ):
        LLM(ours(), speculation=ours(vocab_size=50))
