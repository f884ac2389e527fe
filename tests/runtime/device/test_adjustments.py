"""Bans, least lengths and logits processors, by their effect on answers, and the tables that hold adjustments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, SamplingParams
from fastllama.errors import RequestError
from fastllama.runtime.bad_words import BadWords
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.planning.inputs import SamplingRow
from fastllama.runtime.planning.sequence import UNKNOWN, Request
from fastllama.runtime.planning.sequence import Sequence as Tokens
from tests.runtime.device.test_sampler import Fixed, check_logprobs, sampled
from tests.runtime.models import VOCAB, logits_of, ours, prompt_of, running, theirs

EOS = 11
PROMPT = prompt_of(20, seed=6)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
HOT = SamplingParams(temperature=4.0, seed=5, max_tokens=20)


def ids_of(params: SamplingParams, prompt: Sequence[int] = PROMPT, **options: Any) -> tuple[int, ...]:
    with running(ours(eos=(EOS,)), **options) as llm:
        return llm.generate([list(prompt)], params)[0].outputs[0].token_ids


def test_biases_come_before_the_repetition_penalty_as_in_transformers() -> None:
    favoured = {7: 6.0, 12: 6.0, 40: 6.0, 59: 6.0}
    ids = torch.tensor([PROMPT])
    found = theirs().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=1.7,
        sequence_bias={(token_id,): bias for token_id, bias in favoured.items()},
    )[0, len(PROMPT) :]
    params = replace(GREEDY, repetition_penalty=1.7, logit_bias=favoured)
    assert list(ids_of(params)) == found.tolist()
    assert set(found.tolist()) & set(favoured), "the biases change nothing here"


@pytest.mark.parametrize("options", [{}, {"stop_token_ids": [7]}])
def test_no_sample_ends_before_its_least_length(options: dict[str, Any]) -> None:
    def ends(**more: Any) -> list[int]:
        model = ours(kind=Fixed, eos=(EOS,))
        assert isinstance(model, Fixed)
        model.logits = {EOS: 9.0, 7: 8.0, 5: 3.0, 6: 2.0}
        with running(model) as llm:
            params = SamplingParams(temperature=0, max_tokens=9, **options, **more)
            return list(llm.generate([3], params)[0].outputs[0].token_ids)

    until = [5] * 4 if options else [7] * 4
    assert ends() == [EOS]
    assert ends(min_tokens=4) == [*until, EOS]
    assert ends(min_tokens=4, ignore_eos=True)[:4] == [EOS] * 4, "then EOS is a token like others"


def test_the_least_length_is_the_same_after_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step holds rows before and past the least length."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    loop = dict.fromkeys((7, 12), 30.0) | {EOS: 28.0}
    for min_tokens in range(3, 12):
        params = replace(HOT, temperature=2.0, min_tokens=min_tokens, logit_bias=loop, repetition_penalty=1.1)
        alone = ids_of(params, deterministic=True)
        with running(ours(eos=(EOS,)), deterministic=True, speculation="prompt_lookup", num_draft_tokens=4) as llm:
            (output,) = llm.generate([PROMPT], params)
            assert output.outputs[0].token_ids == alone
            assert output.metrics.num_draft_tokens > 0
        assert len(alone) > min_tokens or len(alone) == 20


def test_only_allowed_tokens_are_sampled() -> None:
    allowed = [9, 30, 31, 80]
    assert set(ids_of(replace(HOT, allowed_token_ids=allowed, ignore_eos=True))) <= set(allowed)
    biased = replace(HOT, allowed_token_ids=allowed, logit_bias={9: 1000.0, 5: 2000.0})
    assert set(ids_of(biased)) == {9}, "a bias bans no token and allows none"


def test_a_word_is_not_completed() -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    with LLM("tiny", progress=False) as llm:
        usual, one, two = (
            llm.generate("Once upon a time", replace(params, bad_words=words))[0].outputs[0]
            for words in ((), "brave", "honey cakes")
        )
        honey_cakes = tuple(llm.encode(" honey cakes"))[-2:]
    assert "a brave boy" in usual.text
    assert honey_cakes in pairwise(usual.token_ids)
    assert "brave" not in one.text
    assert two.text.startswith("".join(usual.text.partition(" honey")[:2])), "the word's first token is not banned"
    assert honey_cakes not in pairwise(two.token_ids)


def test_processors_see_what_was_generated_and_decide() -> None:
    seen: list[list[int]] = []

    def odd(token_ids: list[int], logits: Tensor) -> Tensor:
        assert logits.shape == (VOCAB,)
        seen.append(token_ids)
        return logits.masked_fill(torch.arange(VOCAB) % 2 == 0, -torch.inf)

    def small(token_ids: list[int], logits: Tensor) -> Tensor:
        assert torch.isinf(logits[::2]).all(), "one after another"
        logits[50:] = -torch.inf
        return logits

    found = ids_of(replace(HOT, logits_processors=[odd, small], ignore_eos=True))
    assert all(token_id % 2 and token_id < 50 for token_id in found)
    assert seen == [list(found[:count]) for count in range(20)]


def test_a_processor_is_called_once_for_each_token_and_others_keep_their_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that counts its calls would else write another text where drafts are verified."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    loop = dict.fromkeys((7, 12), 30.0)
    seen: list[list[int]] = []

    def counting(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(token_ids)
        logits[7 if len(seen) % 3 else 12] += 9.0
        return logits

    params = [replace(HOT, temperature=2.0, logit_bias=loop), replace(HOT, logits_processors=[counting])]
    params[1] = replace(params[1], logit_bias=loop, temperature=2.0)
    with running(ours(eos=(EOS,)), deterministic=True) as llm:
        alone = [llm.generate([PROMPT], each)[0].outputs[0].token_ids for each in params]
    seen.clear()
    with running(ours(eos=(EOS,)), deterministic=True, speculation="prompt_lookup") as llm:
        drafted, processed = llm.generate([PROMPT] * 2, params)
    assert [each.outputs[0].token_ids for each in (drafted, processed)] == alone
    assert drafted.metrics.num_accepted_tokens > 0
    assert processed.metrics.num_draft_tokens == 0
    assert seen == [list(alone[1][:count]) for count in range(len(alone[1]))]


def test_what_ends_a_process_ends_one_request() -> None:
    def leaving(token_ids: list[int], logits: Tensor) -> Tensor:
        raise SystemExit(3)

    with running(ours(eos=(EOS,))) as llm:
        other = llm.engine.add_request(PROMPT, HOT)
        with pytest.raises(RequestError, match=r"a logits processor raised SystemExit\(3\)"):
            llm.generate([PROMPT], replace(HOT, logits_processors=[leaving]))
        while not other.finished:
            llm.engine.step()
        assert other.output().outputs[0].token_ids == ids_of(HOT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": dict.fromkeys(range(VOCAB), float("-inf"))}, "not finite numbers, or every token is banned"),
        ({"logits_processors": [lambda ids, logits: logits * float("nan")]}, "the logits processors' results"),
        ({}, "the model's logits are not finite numbers$"),
    ],
)
def test_what_leaves_nothing_to_sample_is_named(options: dict[str, Any], message: str) -> None:
    model = ours()
    if not options:
        forward = model.forward
        model.forward = lambda *given: forward(*given) * torch.nan  # type: ignore[method-assign]
    with running(model) as llm, pytest.raises(RequestError, match=message):
        llm.generate([PROMPT], replace(HOT, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_token_ids": [5], "logit_bias": {5: float("-inf")}},
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [7, 9], "logit_bias": {7: float("-inf")}, "min_tokens": 1, "stop_token_ids": [9]},
    ],
)
def test_what_allows_nothing_is_refused(options: dict[str, Any]) -> None:
    with running(ours(eos=(EOS,))) as llm, pytest.raises(ValueError, match=r"^allowed_token_ids has only tokens that"):
        llm.generate([PROMPT], replace(HOT, **options))


def test_log_probabilities_are_the_models_whatever_a_processor_writes() -> None:
    def banning(token_ids: list[int], logits: Tensor) -> Tensor:
        return logits.fill_(-torch.inf).index_fill_(0, torch.tensor([9]), 0.0)

    with running(ours(eos=(EOS,), dtype=torch.float32)) as llm:
        params = replace(GREEDY, logits_processors=[banning], logprobs=2, max_tokens=3)
        (sample,) = llm.generate([PROMPT], params)[0].outputs
    assert sample.token_ids == (9, 9, 9)
    assert sample.logprobs is not None
    check_logprobs(sample.logprobs, logits_of([*PROMPT, 9, 9, 9])[len(PROMPT) - 1 : -1], sample.token_ids, 2)


def test_a_processor_costs_others_no_token() -> None:
    usual = ids_of(HOT)
    with running(ours(eos=(EOS,))) as llm:
        processed = replace(HOT, logits_processors=[lambda token_ids, logits: logits * 1])
        outputs = llm.generate([PROMPT] * 4, [HOT, processed, replace(HOT, repetition_penalty=1.5), HOT])
    assert [outputs[k].outputs[0].token_ids for k in (0, 1, 3)] == [usual] * 3


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda token_ids, logits: logits[:3], r"returned tensor\(.*; legal: a floating tensor of 97"),
        (lambda token_ids, logits: None, "returned None; legal: a floating tensor of 97"),
        (lambda token_ids, logits: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_processor_fails_its_request_alone(processor: Any, message: str) -> None:
    with running(ours(eos=(EOS,))) as llm:
        other = llm.engine.add_request(PROMPT, HOT)
        with pytest.raises(RequestError, match=f"(?s){message}"):
            llm.generate([PROMPT], replace(HOT, logits_processors=[processor]))
        while not other.finished:
            llm.engine.step()
        assert other.output().outputs[0].token_ids == ids_of(HOT)


def sequence(prompt: Sequence[int], generated: Sequence[int], params: SamplingParams) -> Tokens:
    request = Request("", tuple(prompt), params, 0.0)
    return Tokens(0, request, 0, [*prompt, *generated], 99, 1)


def adjusted(tables: Adjustments, logits: Tensor, *sequences: Tokens) -> Tensor:
    samples = [SamplingRow(seq, row) for row, seq in enumerate(sequences)]
    assert tables.follow(samples)
    return tables.adjusted(logits, samples, None, {})


@pytest.mark.parametrize(
    ("generated", "ahead", "banned"),
    [([1, 7, 8], (), {9}), ([8], (), set()), ([1, 7], (8,), {9}), ([7, 8, 1], (), set())],
)
def test_a_word_is_sought_at_the_end_of_the_answer(
    generated: list[int], ahead: tuple[int, ...], banned: set[int]
) -> None:
    """Over drafts too, and not over the prompt, which ends with the word's first token."""
    seq = sequence([5, 7], generated, SamplingParams(bad_words="spelled here"))
    seq.request.bad_words = BadWords([(7, 8, 9)])
    tables = Adjustments(1, VOCAB, (EOS,), torch.device("cpu"))
    sample = SamplingRow(seq, 0, ahead)
    assert tables.follow([sample])
    assert tables.banned(sample) == banned


def test_rows_that_gave_way_are_counted_anew() -> None:
    """Three sequences take turns in two rows, and gain a token each time."""
    tables, generator = Adjustments(2, VOCAB, (EOS,), torch.device("cpu")), torch.Generator().manual_seed(1)
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 1.0}, min_tokens=4)
    sequences = [sequence([5 + k, 6], [], params) for k in range(3)]
    for turn in range(12):
        seq = sequences[turn % 3]
        logits = torch.randn(1, VOCAB, generator=generator)
        fresh = Adjustments(1, VOCAB, (EOS,), torch.device("cpu"))
        assert torch.equal(adjusted(tables, logits, seq), adjusted(fresh, logits, seq))
        seq.token_ids.append(20 + turn)
    assert len(tables._slots) == 2
    tables.forget(sequences)
    assert (len(tables._slots), sorted(tables._free)) == (0, [0, 1])


@pytest.mark.parametrize("method", ["_begin", "_catch_up", "_on_device"])
def test_rows_that_an_interrupt_left_half_written_are_begun_anew(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, min_tokens=9)
    seq, logits = sequence([5, 6], [8, 9], params), torch.randn(1, VOCAB)
    tables, fresh = (Adjustments(2, VOCAB, (EOS,), torch.device("cpu")) for _ in range(2))
    original, calls = getattr(Adjustments, method), 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        found = original(*given)
        if calls == (2 if method == "_on_device" else 1):
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Adjustments, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tables.follow([SamplingRow(seq, 0)])
    assert torch.equal(adjusted(tables, logits, seq), adjusted(fresh, logits, seq))


def test_a_token_that_the_host_does_not_know_counts_too() -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5)
    known, unknown = (sequence([5, 6], [8, last], params) for last in (9, UNKNOWN))
    tables, logits = Adjustments(2, VOCAB, (EOS,), torch.device("cpu")), torch.randn(1, VOCAB)
    expected = adjusted(tables, logits, known)
    samples = [SamplingRow(unknown, 0)]
    tables.follow(samples)
    ids = torch.tensor([70, 9])
    assert torch.equal(tables.adjusted(logits, samples, ids, {unknown: 1}), expected)
    unknown.token_ids[-1] = 9
    assert torch.equal(adjusted(tables, logits, unknown), expected)


def test_tables_cost_nothing_until_a_request_needs_them() -> None:
    tables = Adjustments(2, VOCAB, (EOS,), torch.device("cpu"))
    assert not tables.follow([SamplingRow(sequence([5], [], SamplingParams()), 0)])
    assert tables._tables is None


def test_a_fixed_bias_bans() -> None:
    assert set(sampled({5: 9.0, 6: 1.0}, temperature=0, max_tokens=3, logit_bias={5: float("-inf")})) == {6}
