"""Scores of given tokens are those of the whole sequence's logits, whatever the start, the batch and the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaForCausalLM, SamplingParams, ScoreOutput
from fastllama.errors import RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.device.sampler import StepLogits
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.engine import Engine
from fastllama.runtime.outputs import RequestMetrics, TokenLogprob
from tests.runtime.device.test_logprobs import in_pieces_of
from tests.runtime.models import VOCAB, Scripted, logits_of, ours, prompt_of, running

CONTEXT = prompt_of(50, seed=9)
CHOICES = [CONTEXT + prompt_of(length, seed=10) for length in (3, 5, 1, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def expected(ids: Sequence[int], shape: str = "gqa tied") -> Tensor:
    """Log-probability [T - 1, V] of each token given those before it, in fp64."""
    return logits_of(ids, shape).double().log_softmax(-1)[:-1]


def check(output: ScoreOutput, ids: list[int], start: int, shape: str = "gqa tied") -> None:
    """Assert that a score is the dense model's."""
    assert (output.prompt_token_ids, output.start) == (tuple(ids), start)
    rows = expected(ids, shape)[start - 1 :]
    assert [each.token_id for each in output.logprobs] == ids[start:]
    wanted = rows.gather(1, torch.tensor(ids[start:])[:, None])
    assert [each.logprob for each in output.logprobs] == pytest.approx(wanted[:, 0].tolist(), abs=1e-5)
    assert [each.rank for each in output.logprobs] == (1 + (rows > wanted).sum(1)).tolist()
    assert output.cumulative_logprob == pytest.approx(wanted.sum().item(), abs=1e-4)
    assert output.perplexity == pytest.approx(math.exp(-wanted.mean().item()), rel=1e-5)
    assert output.is_greedy == bool((rows.argmax(1) == torch.tensor(ids[start:])).all())
    assert output.metrics.num_generated_tokens == 0


def bits(outputs: Sequence[ScoreOutput]) -> list[Any]:
    return [(output.prompt_token_ids, output.start, output.logprobs) for output in outputs]


@pytest.mark.parametrize("shape", ["gqa tied", "biases", "yarn rope"])
@pytest.mark.parametrize("budget", [512, 20], ids=["one step", "chunks"])
@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
def test_scores_are_the_dense_models(shape: str, budget: int, cached: bool) -> None:
    """`start` in the first page, at either end of a page, within one, and at the last token."""
    ids = prompt_of(70, seed=8)
    starts = [1, 2, 15, 16, 17, 18, 33, 48, 50, 69]
    with running(ours(shape), max_num_batched_tokens=budget, max_num_seqs=16) as llm:
        if cached:
            llm.score(ids, 69)
        for start, output in zip(starts, llm.score([ids] * len(starts), starts, top_logprobs=2), strict=True):
            check(output, ids, start, shape)
            best = expected(ids, shape)[start - 1 :].topk(2)
            assert [[i for i, _ in each.top] for each in output.logprobs] == best.indices.tolist()
            if cached:
                assert output.metrics.num_cached_tokens == (start - 1) // 16 * 16


def test_scores_are_those_of_prompt_logprobs() -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    with running(ours(dtype=torch.bfloat16), deterministic=True) as llm:
        (output,) = llm.generate(CHOICES[3], params)
        assert llm.score(CHOICES[3], top_logprobs=3)[0].logprobs == (output.prompt_logprobs or ())[1:]


def test_a_greedy_answer_is_greedy() -> None:
    with running(ours()) as llm:
        answer = llm.generate(CONTEXT, GREEDY)[0].outputs[0].token_ids
        right, wrong = [*CONTEXT, *answer], [*CONTEXT, *answer[:-1], (answer[-1] + 1) % VOCAB]
        found = llm.score([right, wrong], len(CONTEXT))
        assert [output.is_greedy for output in found] == [True, False]


class Around(LlamaForCausalLM):
    """Counts the tokens that are computed."""

    num_tokens = 0

    def hidden_states(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        self.num_tokens += ids.shape[0]
        return super().hidden_states(ids, batch, kv)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 20, "max_num_seqs": 3},
        {"kv_cache_tokens": 96, "max_model_len": 80},
        {"kv_cache_tokens": 96, "max_model_len": 80, "host_cache_tokens": 320},
        {"speculation": "prompt_lookup"},
    ],
    ids=["one batch", "chunks", "few pages", "host cache", "speculation"],
)
@pytest.mark.usefixtures("ahead")
def test_batch_and_cache_change_no_bit(sizes: dict[str, Any], kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With deterministic=True: alone, beside others that generate, and again with all of it cached."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    options = {"deterministic": True, "kv_cache_dtype": kv, **sizes}
    model = ours(dtype=torch.bfloat16)
    alone = []
    for choice in CHOICES:
        with running(model, deterministic=True, kv_cache_dtype=kv) as llm:
            alone += llm.score(choice, len(CONTEXT), top_logprobs=2)
    with running(model, **options) as llm:
        others = [llm.engine.add_request(prompt_of(length), GREEDY) for length in (1, 30)]
        for _ in range(2):
            assert bits(llm.score(CHOICES, len(CONTEXT), top_logprobs=2)) == bits(alone)
        while llm.engine.has_work:
            llm.engine.step()
        together = [other.output().outputs[0].token_ids for other in others]
        assert together == [llm.generate(prompt_of(length), GREEDY)[0].outputs[0].token_ids for length in (1, 30)]


def test_choices_of_one_question_share_its_pages() -> None:
    """All come at once: the first computes the context, the others their own tokens, from their page's start on."""
    model = ours(kind=Around)
    assert isinstance(model, Around)
    with running(model) as llm:
        model.num_tokens = 0
        outputs = llm.score(CHOICES, len(CONTEXT))
        for choice, output in zip(CHOICES, outputs, strict=True):
            check(output, choice, len(CONTEXT))
        fed = [len(choice) - 1 for choice in CHOICES]
        assert sorted(output.metrics.num_cached_tokens for output in outputs) == [0, 48, 48, 48]
        assert model.num_tokens == sum(fed) - 3 * 48


def test_as_many_tokens_as_the_context_holds_and_one() -> None:
    ids = prompt_of(65, seed=3)
    with running(ours(), max_model_len=64) as llm:
        check(llm.score(ids, 64)[0], ids, 64)
        for count, why in ((66, "66 tokens; legal: at most 65 to be scored, one more than max_model_len"),):
            with pytest.raises(ValueError, match=why):
                llm.score(prompt_of(count))


@pytest.mark.parametrize("size", [1, 7])
def test_logits_are_shown_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are those of each prompt's scored tokens alone, in pieces of at most so many rows."""
    in_pieces_of(size, monkeypatch)
    seen: list[dict[int, Tensor]] = [{}, {}]

    def note(number: int, position: int, logits: Tensor) -> None:
        assert 0 < logits.shape[0] <= size
        for place, row in enumerate(logits):
            seen[number][position + place] = row.clone()

    prompts, starts = [prompt_of(30, seed=2), prompt_of(40, seed=4)], [7, 25]
    with running(ours()) as llm:
        llm.score(prompts, starts, on_logits=note)
    for ids, start, rows in zip(prompts, starts, seen, strict=True):
        assert sorted(rows) == list(range(start, len(ids)))
        found = torch.stack([rows[position] for position in sorted(rows)])
        torch.testing.assert_close(found, logits_of(ids)[start - 1 : -1].to(found.dtype), atol=1e-4, rtol=0)


def test_what_raises_while_it_sees_logits_fails_its_request_alone() -> None:
    def refuse(number: int, position: int, logits: Tensor) -> None:
        if number == 1:
            raise ArithmeticError("not these")

    with running(ours()) as llm:
        with pytest.raises(RequestError, match=r"prompt 1 of 3: .*not these") as caught:
            llm.score(CHOICES[:3], on_logits=refuse)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert [len(output.logprobs) for output in caught.value.outputs] == [52, 0, 50]


def test_logits_that_are_no_numbers_fail_the_request_alone() -> None:
    model = ours(kind=Scripted)
    assert isinstance(model, Scripted)
    model.script = [5] * 300
    with running(model) as llm:
        model.script = [5] * 20 + [Scripted.BROKEN] + [5] * 300
        with pytest.raises(RequestError, match=r"prompt 0 of 2: .*not finite numbers") as caught:
            llm.score([[5] * 30, [5] * 20])
        broken, whole = caught.value.outputs
        assert (broken.logprobs, math.isnan(broken.perplexity), len(whole.logprobs)) == ((), True, 19)
        model.script = [5] * 300
        assert llm.score([5] * 30)[0].is_greedy, "no page that the broken logits came with is reused"


def test_an_interrupt_leaves_no_request_or_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ours(), max_num_batched_tokens=20, max_num_seqs=3) as llm:
        steps = iter(range(100))

        def step(self: Engine, step: Any = Engine.step) -> Any:
            if next(steps) == 2:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(Engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.score(CHOICES)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([5], {}, ValueError, "the prompt has 1 token; legal: at least 2, as the first is not scored"),
        ([], {}, ValueError, "the prompt has 0 tokens; legal: at least 2"),
        ([5, 6, 7], {"start": 0}, ValueError, "start is 0; legal: 1 to 2"),
        ([5, 6, 7], {"start": 3}, ValueError, "start is 3; legal: 1 to 2"),
        ([5, 6, 7], {"start": -1}, ValueError, "start is -1; legal: 1 to 2"),
        ([5, 6, 7], {"start": True}, TypeError, "start must be an integer"),
        ([5, 6, 7], {"start": 1.0}, TypeError, "start must be an integer"),
        ([5, 6, 7], {"start": [1, 2]}, ValueError, "start has 2 entries for 1 prompts; legal: one for all, or one for"),
        ([5, 6, 7], {"start": "1"}, TypeError, "start must be an integer"),
        ([5, 6, VOCAB], {}, ValueError, f"prompt token 2 is {VOCAB}; legal: integers from 0 to {VOCAB - 1}"),
        ([5, -1, 6], {}, ValueError, "prompt token 1 is -1"),
        ([5, 6], {"top_logprobs": 21}, ValueError, "top_logprobs is 21; legal: 0 to 20"),
        ([5, 6], {"on_logits": 5}, TypeError, "on_logits is 5; legal: a callable, or None"),
        ([5, 6], {"max_tokens": 3}, TypeError, "LLM.score got an unknown option 'max_tokens'"),
        ("text", {}, ValueError, "tokenizer is None"),
        ([[5, 6, 7]], {}, TypeError, r"prompt is \[\[5, 6, 7\]\]; legal: a text, token ids"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with running(ours()) as llm, pytest.raises(error, match=message):
        llm.score([prompt] if isinstance(prompt, list) else prompt, **options)


def test_what_is_wrong_with_one_of_several_names_it() -> None:
    with running(ours(), max_num_seqs=4) as llm:
        with pytest.raises(ValueError, match=r"^the prompt has 1 token; .*\(prompt 1 of 2\)$"):
            llm.score([[5, 6], [7]])
        with pytest.raises(ValueError, match=r"^start is 3; legal: 1 to 2 \(prompt 1 of 3\)$"):
            llm.score([[5, 6, 7, 8], [5, 6, 7], [5, 6, 7, 8]], 3)
        with pytest.raises(ValueError, match=r"^prompt token 1 is -6; .*\(prompt 0 of 2\)$"):
            llm.score([[5, -6], [5, 6]])
        with pytest.raises(ValueError, match=r"^n is 5; legal: at most 4, .*\(prompt 1 of 2\)$"):
            llm.generate([[5], [5]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, n=5)])


def test_a_failed_score_is_not_the_best() -> None:
    failed = ScoreOutput("0", None, (1, 2), 1, (), RequestMetrics(0.0))
    assert (math.isnan(failed.cumulative_logprob), math.isnan(failed.perplexity), failed.is_greedy) == (
        True,
        True,
        False,
    )
    hopeless = ScoreOutput("0", None, (1, 2), 1, (TokenLogprob(2, -1000.0, rank=9),), RequestMetrics(0.0))
    assert hopeless.perplexity == math.inf


def test_who_sees_logits_may_change_them() -> None:
    with running(ours()) as llm:
        before = llm.score(CHOICES, 40)
        assert bits(llm.score(CHOICES, 40, on_logits=lambda number, position, logits: logits.zero_())) == bits(before)


def test_an_exit_while_logits_are_shown_is_the_requests_own() -> None:
    """Any thread may run the step: an exit would end what that thread does."""

    def leave(number: int, position: int, logits: Tensor) -> None:
        raise SystemExit("mine")

    with running(ours()) as llm, pytest.raises(RequestError, match=r"on_logits raised SystemExit\('mine'\)"):
        llm.score(CONTEXT, on_logits=leave)


def test_a_draft_model_does_not_read_what_is_scored() -> None:
    draft = ours("mqa", kind=Around)
    assert isinstance(draft, Around)
    with running(ours(), speculation=draft) as llm:
        draft.num_tokens = 0
        llm.score(CHOICES, len(CONTEXT))
        assert draft.num_tokens == 0
        answer = llm.engine.add_request(prompt_of(30), GREEDY)
        llm.score(CHOICES, 1)
        assert 30 <= draft.num_tokens < 60, "the prompt that is answered, and its drafts"
        llm.abort(answer)


def test_positions_come_in_any_container() -> None:
    with running(ours()) as llm:
        found = [llm.score(CHOICES[:2], start) for start in (4, np.int64(4), [4, 4], np.array([4, 4]), torch.tensor(4))]
        assert [bits(outputs) for outputs in found] == [bits(found[0])] * 5
        assert llm.score([]) == []


def test_a_text_is_scored_after_its_bos() -> None:
    with LLM("tiny", dtype="float32", kv_cache_tokens=2048, progress=False) as llm:
        (output,) = llm.score("Once upon a time")
        assert output.prompt == "Once upon a time"
        assert [each.text for each in output.logprobs] == [" Once", " upon", " a", " time"]
        assert output.prompt_token_ids == tuple(llm.encode("Once upon a time"))
        with pytest.raises(
            ValueError, match=r"100000 characters, which are \d+ tokens or more; legal: at most 1025 tok"
        ):
            llm.score("x" * 100_000)


def test_scores_take_no_seed() -> None:
    """Later requests generate what they would have, and the reported seed reproduces it."""
    params = SamplingParams(max_tokens=8, temperature=3.0)
    found = []
    for scores in (False, True):
        with running(ours(), seed=7) as llm:
            if scores:
                llm.score(CONTEXT)
            (output,) = llm.generate(CONTEXT, params)
            again = llm.generate(CONTEXT, replace(params, seed=output.seed))[0]
            assert again.outputs[0].token_ids == output.outputs[0].token_ids
            found.append(output.seed)
    assert found[0] == found[1]


def test_a_scored_prompt_is_not_forked() -> None:
    with running(ours()) as llm:
        generation = llm.engine.add(llm.prompts.prepare_scored(CONTEXT))
        with pytest.raises(ValueError, match="whose prompt is scored; legal: one that generates"):
            llm.fork(generation)
        llm.abort(generation)


def test_nothing_is_kept_of_what_was_scored() -> None:
    with running(ours()) as llm:
        (output,) = llm.score(CONTEXT)
        assert isinstance(output.metrics, RequestMetrics)
        assert output.metrics.finish_time is not None
        assert llm.engine.find(output.request_id) is None


def test_no_token_is_sampled_for_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are computed for the reported positions only."""
    rows: list[int] = []

    def note(self: StepLogits, init: Any = StepLogits.__init__, **fields: Any) -> None:
        init(self, **fields)
        rows.append(self.logits.shape[0])

    heads: list[int] = []
    head = LlamaForCausalLM.head

    def noting(self: LlamaForCausalLM, x: Tensor, batch: BatchMeta) -> Tensor:
        heads.append(x.shape[0])
        return head(self, x, batch)

    with running(ours()) as llm:
        monkeypatch.setattr(LlamaForCausalLM, "head", noting)
        llm.score(CONTEXT, 40)
        assert sum(heads) == 10
        assert rows == []
