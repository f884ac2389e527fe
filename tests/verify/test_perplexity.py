"""Perplexity scores each token once, from the context that the protocol prescribes, as a dense model scores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastllama
from fastllama import LLM, SamplingParams
from fastllama.verify import Estimate, perplexity, text_documents
from fastllama.verify.perplexity import Window, batches_of, windows_of
from tests.cli.models import random_model
from tests.runtime.models import logits_of, ours, prompt_of, running

TINY = Path(fastllama.__file__).parent / "assets" / "tiny"
DOCUMENTS = [prompt_of(length, seed=4) for length in (50, 17, 2, 33)]


def loss_of(ids: Sequence[int], begin: int, target: int) -> float:
    """Negative log-likelihood in fp64 of one token given those from `begin` on, by transformers' dense forward."""
    return -float(logits_of(ids[begin:target])[-1].log_softmax(-1)[ids[target]])


def bundled(count: int) -> tuple[LLM, list[list[int]]]:
    llm = LLM("tiny", dtype="float32", quantization=None, progress=False)
    assert llm.tokenizer is not None
    text = (TINY / "heldout_seed.txt").read_text(encoding="utf-8")
    return llm, text_documents(text, llm.tokenizer, per_line=True)[:count]


def test_it_is_that_of_prompt_logprobs() -> None:
    llm, documents = bundled(4)
    with llm:
        found = perplexity(llm, documents, context=1024, stride=512)
        outputs = llm.generate(documents, SamplingParams(max_tokens=1, prompt_logprobs=0))
    losses = [-each.logprob for output in outputs for each in (output.prompt_logprobs or ())[1:] if each is not None]
    assert found.tokens == len(losses)
    assert found.tokens_per_second == found.tokens / found.seconds
    assert found.nll.value == pytest.approx(sum(losses) / len(losses), abs=1e-5)  # the steps differ, and so fp32 rounds


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_each_token_but_the_first_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(windows_of(length, context, stride, 3))
    scored = [target for window in windows for target in range(window.first, window.end)]
    assert scored == list(range(1, length))
    for number, window in enumerate(windows):
        fed = window.end - 1 - window.begin
        assert window.document == 3
        assert 1 <= fed <= context
        assert fed == context or window is windows[-1]
        assert window.begin == number * stride
        assert window.num_scored <= (context if number == 0 else stride)
        if number:
            assert window.first - window.begin == context - stride + 1, "tokens before the first that is scored"


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (7, 1), (60, 30), (1, 1)])
def test_it_is_that_of_a_dense_model_window_by_window(context: int, stride: int) -> None:
    """Each target from the first multiple of the stride from which `context` tokens reach it."""
    losses = []
    for ids in DOCUMENTS:
        for target in range(1, len(ids)):
            begin = max(0, math.ceil((target - context) / stride)) * stride
            losses.append(loss_of(ids, begin, target))
    with running(ours(), max_num_batched_tokens=32, max_num_seqs=4) as llm:
        found = perplexity(llm, DOCUMENTS, context=context, stride=stride)
    assert (found.documents, found.tokens) == (4, len(losses))
    assert found.nll.value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_disjoint_windows_begin_with_the_last_token_of_the_one_before() -> None:
    assert list(windows_of(11, 4, 4)) == [Window(0, 0, 1, 5), Window(0, 4, 5, 9), Window(0, 8, 9, 11)]


def test_what_the_engine_has_cached_changes_no_figure() -> None:
    with running(ours()) as llm:
        first, second = (perplexity(llm, DOCUMENTS, context=40, stride=20) for _ in range(2))
    assert second.nll.value == pytest.approx(first.nll.value, rel=1e-9)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_prompts_are_scored_from_the_quantized_cache(kind: str) -> None:
    """Scores read the cache as decoding does: a prompt's attention reads the pages that its step has just written.

    Otherwise the perplexity of a model with a quantized cache would be that of one without.
    """
    first, length = prompt_of(12, seed=5), 40
    with running(random_model(), kv_cache_dtype=kind) as llm:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)
        (sample,) = llm.generate(first, params)[0].outputs
        assert sample.logprobs is not None
        decoded = torch.tensor([each.logprob for each in sample.logprobs])
        llm.reset_prefix_cache()
        whole = [*first, *sample.token_ids]
        scored = torch.tensor([each.logprob for each in llm.score(whole, len(first))[0].logprobs])
    with running(random_model()) as llm:
        unquantized = torch.tensor([each.logprob for each in llm.score(whole, len(first))[0].logprobs])
    # A key whose sum was rounded otherwise may take the neighbouring value of 8 bits, seldom; most tokens see none.
    assert (scored - decoded).abs().median() < 1e-4
    assert (scored - unquantized).abs().median() > 1e-3, "or the comparison shows nothing"


def test_the_standard_error_is_that_of_a_ratio_of_clusters() -> None:
    generator = np.random.default_rng(7)
    counts = generator.integers(1, 50, 30)
    totals = counts * 1.5 + generator.normal(size=30) * counts
    found = Estimate.ratio(totals.tolist(), counts.tolist())
    mean = totals.sum() / counts.sum()
    residuals = torch.tensor(totals - counts * mean)
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(float(residuals.std() * len(counts) ** 0.5 / counts.sum()))
    # Clusters of one token each: the textbook's standard error of a mean.
    singles = Estimate.ratio(totals.tolist(), [1] * 30)
    assert singles.standard_error == pytest.approx(totals.std(ddof=1) / 30**0.5)
    # And the spread of the estimate over texts sampled with replacement (a bootstrap), within 1 / sqrt(2 m).
    drawn = generator.integers(0, 30, (4000, 30))
    spread = (totals[drawn].sum(1) / counts[drawn].sum(1)).std()
    assert found.standard_error == pytest.approx(spread, rel=0.15)


def test_of_an_exponential_it_is_to_first_order() -> None:
    found = Estimate(1.2, 0.001).exp()
    assert found.value == pytest.approx(math.exp(1.2))
    assert found.standard_error == pytest.approx((math.exp(1.201) - math.exp(1.199)) / 2, rel=1e-5)
    assert Estimate(1e4, 1.0).exp().as_json() == {"value": None, "standard_error": None}


def test_clusters_are_documents_or_the_windows_of_one() -> None:
    with running(ours()) as llm:
        each = [perplexity(llm, [ids], context=8, stride=8) for ids in DOCUMENTS]
        together = perplexity(llm, DOCUMENTS, context=8, stride=8)
        one = perplexity(llm, [DOCUMENTS[0][:9]], context=8, stride=8)
        losses = [perplexity(llm, [DOCUMENTS[0][i : i + 9]], context=8, stride=8) for i in range(0, 49, 8)]
    assert one.nll.standard_error is None
    assert one.perplexity.standard_error is None
    for found, parts in ((together, each), (each[0], losses)):
        expected = Estimate.ratio([part.nll.value * part.tokens for part in parts], [part.tokens for part in parts])
        assert found.nll.value == pytest.approx(expected.value, rel=1e-6)
        assert found.nll.standard_error == pytest.approx(expected.standard_error, rel=1e-5)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_batches_hold_all_windows_in_order_and_no_more_than_they_may(
    lengths: list[int], max_fed: int, max_scored: int
) -> None:
    windows = [each for number, length in enumerate(lengths) for each in windows_of(length, 7, 3, number)]
    batches = list(batches_of(windows, max_fed, max_scored))
    assert [window for batch in batches for window in batch] == windows
    for batch in batches:
        fed = sum(window.end - window.begin - 1 for window in batch)
        assert len(batch) == 1 or (fed <= max_fed and sum(window.num_scored for window in batch) <= max_scored)


@pytest.mark.parametrize(
    ("documents", "context", "stride", "says"),
    [
        ([], 8, 8, "documents is empty; legal: at least one document"),
        ([[1, 2], [1]], 8, 8, "document 1 has 1 token; legal: at least 2"),
        ([[1, 2]], 0, 1, "context is 0; legal: 1 to 256"),
        ([[1, 2]], 257, 1, "context is 257; legal: 1 to 256"),
        ([[1, 2]], 8, 9, "stride is 9; legal: 1 to 8"),
        ([[1, 2]], 8, 0, "stride is 0; legal: 1 to 8"),
        ([[1, 97]], 8, 8, "97"),
    ],
)
def test_what_cannot_be_measured_is_refused(documents: list[list[int]], context: int, stride: int, says: str) -> None:
    with running(ours()) as llm, pytest.raises(ValueError, match=says):
        perplexity(llm, documents, context=context, stride=stride)
