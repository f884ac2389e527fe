"""Samples depend on their request alone, penalties and biases match explicit formulas, log-probabilities the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.outputs import TokenLogprob
from tests.runtime.models import VOCAB, logits_of, ours, prompt_of, running, theirs

NEW_TOKENS = 12
PROMPTS = [prompt_of(length, seed=1) for length in (1, 5, 16, 30, 31)]
# With heat and few filters many tokens are likely, so that equal samples are no accident.
PARAMS = [
    SamplingParams(temperature=3.0, seed=11, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=0.0, seed=11, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=4.0, top_k=20, seed=2**63 - 1, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=3.0, top_p=0.9, frequency_penalty=1.0, seed=0, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=5.0, min_p=0.01, repetition_penalty=1.2, seed=12, max_tokens=NEW_TOKENS, n=3),
]
LIMITS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 4},
    "few pages": {"kv_cache_tokens": 80, "max_model_len": 80},
    "another seed": {"seed": 99},
}


def tokens_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in output.outputs]


def run(prompt: Sequence[int], **params: Any) -> RequestOutput:
    """One request alone."""
    with running(ours()) as llm:
        return llm.generate(list(prompt), SamplingParams(**({"max_tokens": NEW_TOKENS} | params)))[0]


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[int, ...]]]:
    """The tokens of each of PROMPTS in an LLM of its own."""
    found = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        with running(ours()) as llm:
            found.append(tokens_of(llm.generate(prompt, params)[0]))
    return found


@pytest.mark.parametrize("limits", LIMITS)
def test_a_seeded_request_samples_the_same_alone_and_in_any_batch(
    limits: str, alone: list[list[tuple[int, ...]]]
) -> None:
    with running(ours(), **LIMITS[limits]) as llm:
        llm.generate([prompt_of(7), PROMPTS[0]], SamplingParams(max_tokens=3))
        others = [prompt_of(20, seed=4), prompt_of(2, seed=4)]
        mixed = [PROMPTS[4], others[0], PROMPTS[1], PROMPTS[0], others[1], PROMPTS[3], PROMPTS[2]]
        hot = SamplingParams(temperature=2.0, max_tokens=30)
        found = llm.generate(mixed, [PARAMS[4], hot, PARAMS[1], PARAMS[0], hot, PARAMS[3], PARAMS[2]])
        assert (llm.engine.scheduler.num_preemptions > 0) == (limits == "few pages")
    assert [tokens_of(found[place]) for place in (3, 2, 6, 5, 0)] == alone


def test_samples_of_one_prompt_differ_and_are_those_of_a_smaller_n(alone: list[list[tuple[int, ...]]]) -> None:
    assert len(set(alone[4])) == 3
    options = {"temperature": 5.0, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 12}
    assert tokens_of(run(PROMPTS[4], n=2, **options)) == alone[4][:2]
    assert tokens_of(run(PROMPTS[4], n=1, **options)) == alone[4][:1]
    assert tokens_of(run(PROMPTS[4], n=1, **(options | {"seed": 13}))) != alone[4][:1]


def test_requests_without_a_seed_follow_the_seed_of_the_llm() -> None:
    def three(seed: int, *, refused: bool = False) -> list[list[tuple[int, ...]]]:
        with running(ours(), seed=seed) as llm:
            if refused:
                with pytest.raises(ValueError, match="the prompt has 0 tokens"):
                    llm.generate([], SamplingParams()) or llm.generate([[]], SamplingParams())
            hot = SamplingParams(temperature=3.0, max_tokens=NEW_TOKENS)
            return [tokens_of(llm.generate(PROMPTS[1], hot)[0]) for _ in range(3)]

    found = three(5)
    assert three(5) == found
    assert three(5, refused=True) == found
    assert three(6) != found
    assert len({tokens[0] for tokens in found}) == 3


def test_temperature_0_needs_no_seed() -> None:
    assert len({tokens_of(run(PROMPTS[2], temperature=0, seed=seed))[0] for seed in (None, 0, 7)}) == 1


def greedy_by_hand(prompt: list[int], adjust: Callable[[Tensor, list[int]], Tensor]) -> list[int]:
    """Tokens that are likeliest after `adjust(logits, generated tokens)`."""
    generated: list[int] = []
    for _ in range(NEW_TOKENS):
        generated.append(int(adjust(logits_of(prompt + generated)[-1], generated).argmax()))
    return generated


def counts_of(token_ids: list[int]) -> Tensor:
    return torch.bincount(torch.tensor(token_ids, dtype=torch.int64), minlength=VOCAB).double()


def biases(values: Mapping[int, float]) -> Tensor:
    found = torch.zeros(VOCAB, dtype=torch.float64)
    found[list(values)] = torch.tensor(list(values.values()), dtype=torch.float64)
    return found


FAVOURED = dict.fromkeys((7, 12, 40, 59), 6.0)  # or this model would repeat no token, and so feel no penalty
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, counts of all tokens, counts of generated ones
PENALTIES: dict[str, tuple[dict[str, Any], Formula]] = {
    "presence": ({"presence_penalty": 1.5}, lambda x, seen, made: x - 1.5 * (made > 0)),
    "negative presence": ({"presence_penalty": -2.0}, lambda x, seen, made: x + 2.0 * (made > 0)),
    "frequency": ({"frequency_penalty": 0.7}, lambda x, seen, made: x - 0.7 * made),
    "repetition": ({"repetition_penalty": 1.5}, lambda x, seen, made: torch.where(seen > 0, x / 1.5 ** x.sign(), x)),
    "bias": ({"logit_bias": {7: 8.0, 40: -2.5}}, lambda x, seen, made: x + biases({7: 8.0, 40: -2.5})),
    "all": (
        {"presence_penalty": 0.5, "frequency_penalty": 0.6, "repetition_penalty": 1.4},
        lambda x, seen, made: torch.where(seen > 0, x / 1.4 ** x.sign(), x) - 0.5 * (made > 0) - 0.6 * made,
    ),
}


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_and_biases_by_hand(kind: str) -> None:
    options, formula = PENALTIES[kind]
    plain, prompt = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logit_bias=FAVOURED), PROMPTS[3]
    changed = replace(plain, **({"logit_bias": FAVOURED} | options))
    bias = biases({} if "logit_bias" in options else FAVOURED)
    wanted = greedy_by_hand(prompt, lambda x, made: formula(x + bias, counts_of(prompt + made), counts_of(made)))
    with running(ours()) as llm:  # between rows without the option
        found = [list(output.outputs[0].token_ids) for output in llm.generate([prompt] * 3, [plain, changed, plain])]
    usual = greedy_by_hand(prompt, lambda x, made: x + biases(FAVOURED))
    assert wanted != usual, "the option changes nothing here"
    assert found == [usual, wanted, usual]


class Fixed(LlamaForCausalLM):
    """A model with the same logits for every token, whatever came before."""

    logits: dict[int, float]  # all others are -20

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        row = torch.full((VOCAB,), -20.0)
        row[list(self.logits)] = torch.tensor(list(self.logits.values()))
        return row.expand(batch.logits_rows.shape[0], VOCAB)


def sampled(logits: dict[int, float], **params: Any) -> list[int]:
    """Tokens that a prompt of [3] is continued with."""
    model = ours(kind=Fixed)
    assert isinstance(model, Fixed)
    model.logits = logits
    with running(model) as llm:
        return list(llm.generate([3], SamplingParams(**params))[0].outputs[0].token_ids)


@pytest.mark.parametrize(
    ("options", "logits", "expected"),
    [
        ({"repetition_penalty": 1.5}, {5: 3.0, 6: 2.5}, [5, 6, 5, 5]),  # 3 -> 2, 2.5 -> 1.67
        ({"repetition_penalty": 1.5}, {5: -1.0, 6: -1.4}, [5, 6, 5, 5]),  # -1 -> -1.5, -1.4 -> -2.1
        ({"repetition_penalty": 1.5}, {3: 3.0, 6: 2.5}, [6, 3, 3]),  # 3 is the prompt
        ({"presence_penalty": 1.0}, {5: 3.0, 6: 2.5}, [5, 6, 5, 5]),  # 3 -> 2, 2.5 -> 1.5
        ({"presence_penalty": 1.0}, {3: 3.0, 6: 2.5}, [3, 6, 3]),
        ({"frequency_penalty": 0.4}, {5: 3.0, 6: 2.0}, [5, 5, 5, 6, 5, 6, 5, 6]),  # 2.6, 2.2, 1.8, then 1.6, 1.4...
    ],
)
def test_penalties_of_fixed_logits(options: dict[str, float], logits: dict[int, float], expected: list[int]) -> None:
    assert sampled(logits, temperature=0, max_tokens=len(expected), **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {5: 0.5, 6: 0.3, 7: 0.15, 8: 0.05}),
        ({"top_k": 2}, {5: 0.625, 6: 0.375}),
        ({"top_p": 0.75}, {5: 0.625, 6: 0.375}),
        ({"min_p": 0.25}, {5: 0.526, 6: 0.316, 7: 0.158}),
        ({"temperature": 0.5}, {5: 0.685, 6: 0.247, 7: 0.062, 8: 0.007}),
        ({"logit_bias": {7: 1.2, 5: -30.0}}, {6: 0.354, 7: 0.587, 8: 0.059}),
    ],
)
def test_tokens_are_sampled_as_often_as_they_are_likely(options: dict[str, Any], expected: dict[int, float]) -> None:
    logits = {token_id: math.log(p) for token_id, p in {5: 0.5, 6: 0.3, 7: 0.15, 8: 0.05}.items()}
    found = sampled(logits, seed=1, max_tokens=240, **options)
    assert set(found) == set(expected)
    for token_id, p in expected.items():
        assert abs(found.count(token_id) - 240 * p) < 4 * math.sqrt(240 * p * (1 - p)) + 1


@pytest.mark.parametrize("penalty", [0.8, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for prompt in PROMPTS[2:]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": penalty, "do_sample": False, "pad_token_id": 0}
        reference = theirs().generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert list(run(prompt, temperature=0, repetition_penalty=penalty).outputs[0].token_ids) == reference


def test_a_bias_forces_or_bans_a_token() -> None:
    assert tokens_of(run(PROMPTS[3], temperature=2.0, logit_bias={42: 1000})) == [(42,) * NEW_TOKENS]
    usual = run(PROMPTS[3], temperature=0).outputs[0].token_ids
    banned = run(PROMPTS[3], temperature=0, logit_bias=dict.fromkeys(usual, -1000.0)).outputs[0].token_ids
    assert not set(usual) & set(banned)


@pytest.mark.parametrize(
    ("extreme", "same"),
    [
        ({"temperature": 1e308}, {"temperature": 1e30}),
        ({"temperature": 1e308, "top_k": 5}, {"temperature": 1e30, "top_k": 5}),
        ({"temperature": 1e-300}, {"temperature": 0}),
        ({"temperature": 1e-40}, {"temperature": 0}),
        ({"temperature": 5e-324}, {"temperature": 0}),
        ({"temperature": 3, "top_p": 1e-300}, {"temperature": 0}),
        ({"temperature": 3, "min_p": 1e-300}, {"temperature": 3}),
        ({"temperature": 3, "min_p": 1e-42}, {"temperature": 3}),
        ({"temperature": 3, "logit_bias": {42: 3e38}}, {"temperature": 3, "logit_bias": {42: 1e4}}),
        ({"temperature": 3, "logit_bias": {42: -3e38}}, {"temperature": 3, "logit_bias": {42: -1e4}}),
        ({"temperature": 3, "logit_bias": {42: -math.inf}}, {"temperature": 3, "logit_bias": {42: -1e4}}),
        ({"temperature": 3, "logit_bias": {42: 1e-320}}, {"temperature": 3}),
        ({"temperature": 0, "repetition_penalty": 3e38}, {"temperature": 0, "repetition_penalty": 1e30}),
        ({"temperature": 3, "repetition_penalty": 1.2e-38}, {"temperature": 3, "repetition_penalty": 1e-30}),
    ],
    ids=str,
)
def test_a_legal_number_that_fp32_cannot_hold_acts_as_its_limit(extreme: dict[str, Any], same: dict[str, Any]) -> None:
    """NumPy does not warn of an overflow, which would be an error here."""
    for prompt in PROMPTS[2:4]:
        found, expected = (run(prompt, seed=3, **params).outputs[0] for params in (extreme, same))
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, "length")


def check_logprobs(reports: Sequence[TokenLogprob], logits: Tensor, token_ids: Sequence[int], top: int) -> None:
    """Each report's value for its token is that of log_softmax over its row of transformers' logits."""
    expected = torch.log_softmax(logits, -1)
    assert [report.token_id for report in reports] == list(token_ids)
    chosen = expected[range(len(token_ids)), list(token_ids)]
    torch.testing.assert_close(torch.tensor([r.logprob for r in reports]).double(), chosen, rtol=1e-5, atol=1e-5)
    best = expected.topk(top)
    assert [[token_id for token_id, _ in report.top] for report in reports] == best.indices.tolist()
    values = torch.tensor([[value for _, value in report.top] for report in reports]).double()
    torch.testing.assert_close(values.view(best.values.shape), best.values, rtol=1e-5, atol=1e-5)
    assert all(list(row) == sorted(row, reverse=True) for row in values.tolist())


@pytest.mark.parametrize("top", [0, 1, 4])
def test_logprobs_are_those_of_the_model(top: int) -> None:
    changed = {"presence_penalty": 1.5, "logit_bias": {7: 2.0}, "top_k": 9, "temperature": 3.0, "n": 2, "seed": 1}
    for options in ({"temperature": 0}, changed):
        output = run(PROMPTS[3], logprobs=top, **options)
        for sample in output.outputs:
            assert sample.logprobs is not None
            logits = logits_of([*output.prompt_token_ids, *sample.token_ids])[len(output.prompt_token_ids) - 1 : -1]
            check_logprobs(sample.logprobs, logits, sample.token_ids, top)
    assert run(PROMPTS[3]).outputs[0].logprobs is None


def test_rows_of_a_batch_ask_for_different_logprobs() -> None:
    wanted = [None, 3, 0, 20]
    with running(ours()) as llm:
        params = [SamplingParams(temperature=0, max_tokens=3, logprobs=top) for top in wanted]
        outputs = llm.generate([PROMPTS[3]] * 4, params)
    for top, output in zip(wanted, outputs, strict=True):
        logprobs = output.outputs[0].logprobs
        assert (logprobs is None) == (top is None)
        if logprobs is not None:
            logits = logits_of([*output.prompt_token_ids, *output.outputs[0].token_ids])
            check_logprobs(logprobs, logits[len(PROMPTS[3]) - 1 : -1], output.outputs[0].token_ids, top)


@pytest.mark.parametrize("limits", ["one batch", "chunks", "few pages"])
def test_prompt_logprobs_are_those_of_the_model(limits: str) -> None:
    with running(ours(), **LIMITS[limits]) as llm:
        quiet = SamplingParams(temperature=0, max_tokens=30)
        llm.generate([PROMPTS[4], prompt_of(40)], quiet)  # now their pages are in the prefix cache
        asking = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=2, logprobs=2)
        params = [asking, quiet, asking, SamplingParams(max_tokens=2, prompt_logprobs=0, n=2)]
        outputs = llm.generate([PROMPTS[4], prompt_of(40), prompt_of(40), PROMPTS[0]], params)
        assert (llm.engine.scheduler.num_preemptions > 0) == (limits == "few pages")
    assert outputs[1].prompt_logprobs is None
    for output, top in ((outputs[0], 2), (outputs[2], 2), (outputs[3], 0)):
        assert output.prompt_logprobs is not None
        first, *rest = output.prompt_logprobs
        prompt = output.prompt_token_ids
        assert first is None
        assert output.metrics.num_cached_tokens == 0
        check_logprobs(rest, logits_of(prompt)[:-1], prompt[1:], top)
    assert outputs[0].outputs[0].logprobs is not None
    logits = logits_of([*PROMPTS[4], *outputs[0].outputs[0].token_ids])[len(PROMPTS[4]) - 1 : -1]
    check_logprobs(outputs[0].outputs[0].logprobs, logits, outputs[0].outputs[0].token_ids, 2)


def test_there_are_no_more_likely_tokens_than_tokens() -> None:
    with running(ours("mqa", vocab_size=7)) as llm:
        params = SamplingParams(max_tokens=2, logprobs=20, prompt_logprobs=20)
        output = llm.generate([3, 4, 5], params)[0]
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert [len(report.top) for report in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)] == [7] * 4
