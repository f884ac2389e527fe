"""A model beside a reference: each figure by its formula in fp64, whatever the batches, chunks and preemptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, SamplingParams
from fastllama.verify import compare, comparison, perplexity
from fastllama.verify.comparison import divergence_and_agreement
from fastllama.verify.perplexity import Window
from tests.cli.models import random_model, write_model
from tests.runtime.models import ours, prompt_of, running

VOCAB = 300
DOCUMENTS = [prompt_of(length, seed=6, vocab_size=VOCAB) for length in (60, 25, 41)]
FIGURES = ("nll_difference", "kl", "top1")


def logits_of(llm: LLM, documents: Sequence[list[int]]) -> list[Tensor]:
    """fp64 [T - 1, V] of each."""
    found = [torch.empty(len(ids) - 1, VOCAB, dtype=torch.float64) for ids in documents]

    def see(number: int, position: int, logits: Tensor) -> None:
        found[number][position - 1 : position - 1 + len(logits)] = logits

    llm.score(documents, on_logits=see)
    return found


def paired(totals: Sequence[Tensor]) -> tuple[float, float]:
    """Mean of per-token values by document, and its standard error: of the residuals' spread, times sqrt(m) / N."""
    sums, counts = (
        torch.tensor(each, dtype=torch.float64) for each in zip(*((t.sum(), len(t)) for t in totals), strict=True)
    )
    count = counts.sum()
    mean = sums.sum() / count
    return float(mean), float((sums - counts * mean).std() * len(totals) ** 0.5 / count)


def figures(found: Any) -> list[float]:
    return [value for name in FIGURES for value in vars(getattr(found, name)).values()]


def test_each_figure_is_its_formula() -> None:
    with running(random_model()) as reference, running(random_model(), quantization="int4") as llm:
        found = compare(llm, reference, DOCUMENTS, context=64, stride=64)
        alone = [perplexity(each, DOCUMENTS, context=64, stride=64) for each in (llm, reference)]
        theirs, mine = (logits_of(each, DOCUMENTS) for each in (reference, llm))
    p, q = ([each.log_softmax(-1) for each in logits] for logits in (theirs, mine))
    targets = [torch.tensor(ids[1:])[:, None] for ids in DOCUMENTS]
    losses = [[-each.gather(1, at)[:, 0] for each, at in zip(side, targets, strict=True)] for side in (q, p)]
    expected = {
        "nll_difference": [ours - theirs for ours, theirs in zip(*losses, strict=True)],
        "kl": [(a.exp() * (a - b)).sum(1) for a, b in zip(p, q, strict=True)],
        "top1": [(a.argmax(1) == b.argmax(1)).double() for a, b in zip(p, q, strict=True)],
    }
    for name, values in expected.items():
        estimate = getattr(found, name)
        # The second runs round otherwise, and so, in 16-bit fixed point, by more than fp32 does.
        assert (estimate.value, estimate.standard_error) == pytest.approx(paired(values), rel=1e-3), name
    assert 0 < found.top1.value < 1
    assert found.kl.value > 1e-3, "or rounding is all that is compared"
    assert [found.model.nll.value, found.reference.nll.value] == pytest.approx([each.nll.value for each in alone])
    assert found.nll_difference.standard_error < found.model.nll.standard_error
    assert set(found.as_json()) == {"model", "reference", *FIGURES}


def test_the_divergence_is_from_the_reference_to_the_model() -> None:
    logits, reference = (torch.tensor([row]).log() for row in ([0.5, 0.5, 0.0], [0.9, 0.1, 0.0]))
    kl, same = divergence_and_agreement(logits, reference)
    assert kl.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert same.tolist() == [True]
    turned, _ = divergence_and_agreement(reference, logits)
    assert turned.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-6)


def test_a_model_beside_itself_differs_in_nothing() -> None:
    with running(random_model()) as llm, running(random_model()) as other:
        found = compare(llm, other, DOCUMENTS, context=16, stride=8)
    assert figures(found) == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("constant", ["KEPT_BYTES", "CHUNK_BYTES"])
def test_memory_is_bounded_and_its_bounds_change_no_figure(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """KEPT_BYTES of two windows of 16 tokens in fp32, CHUNK_BYTES of three rows."""
    batches: list[list[int]] = []

    def watch(score: Callable[..., Any]) -> Callable[..., Any]:
        def run(llm: LLM, documents: Any, batch: list[Window], see: Any) -> Any:
            batches.append([window.num_scored for window in batch])
            return score(llm, documents, batch, see)

        return run

    monkeypatch.setattr(comparison, "score", watch(comparison.score))
    bound = {"KEPT_BYTES": 2 * 16 * VOCAB * 4, "CHUNK_BYTES": 3 * VOCAB * 4}[constant]
    with running(random_model()) as reference, running(random_model(), kv_cache_dtype="fp8") as llm:
        whole = compare(llm, reference, DOCUMENTS, context=16, stride=16)
        assert len(batches) == 2
        monkeypatch.setattr(comparison, constant, bound)
        found = compare(llm, reference, DOCUMENTS, context=16, stride=16)
        assert figures(found) == pytest.approx(figures(whole), rel=1e-3)
        if constant == "KEPT_BYTES":
            assert max(sum(batch) for batch in batches[2:]) == 32
            monkeypatch.setattr(comparison, constant, 1)  # one window at least
            batches.clear()
            compare(llm, reference, DOCUMENTS, context=16, stride=16)
            assert {len(batch) for batch in batches} == {1}


def test_tokens_that_are_seen_again_count_once() -> None:
    """A step of 8 tokens, and an answer beside that takes the last pages: a score is preempted and begins again."""
    documents = [prompt_of(length, seed=3, vocab_size=VOCAB) for length in (97, 80, 97, 60, 97)]
    sizes = {"max_model_len": 96, "kv_cache_tokens": 112, "max_num_batched_tokens": 8, "max_num_seqs": 8}
    seen: list[int] = []

    with running(random_model()) as reference, running(random_model(), quantization="int8") as calm:
        expected = compare(calm, reference, documents, context=96, stride=96)
        with running(random_model(), quantization="int8", **sizes) as llm, pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparison, "max_fed", lambda _: 1000)
            patch.setattr(comparison.LogitPairs, "compare", counting(comparison.LogitPairs.compare, seen))
            answer = SamplingParams(max_tokens=80, ignore_eos=True)
            beside = llm.engine.add_request(tuple(documents[0][:10]), answer)
            found = compare(llm, reference, documents, context=96, stride=96)
            llm.engine.abort(beside)
            assert llm.engine.scheduler.num_preemptions > 0
    assert sum(seen) > found.model.tokens == sum(map(len, documents)) - len(documents), "nothing was seen twice"
    assert figures(found) == pytest.approx(figures(expected), rel=1e-2)


def counting(method: Callable[..., None], seen: list[int]) -> Callable[..., None]:
    def run(self: Any, number: int, position: int, logits: Tensor) -> None:
        seen.append(len(logits))
        method(self, number, position, logits)

    return run


def test_models_of_other_tokens_are_refused_before_anything_runs(tmp_path: Any) -> None:
    def unused(*_: Any, **__: Any) -> None:
        raise AssertionError("scored")

    folder = write_model(tmp_path / "model")
    text = [[1, 299, 298, 297]]
    with running(random_model()) as llm, running(ours()) as small, LLM(folder, progress=False) as named:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LLM, "score", unused)
            with pytest.raises(ValueError, match=r"reference has a vocabulary of 97 tokens and llm of 300; legal: the"):
                compare(llm, small, [[1, 2, 3]], context=8, stride=8)
            with pytest.raises(ValueError, match="stride is 9"):
                compare(llm, named, text, context=8, stride=9)
            says = "reference reads token 1 as b'<unk>' and llm as b'<s>'; legal: the same tokens"
            with LLM(folder, tokenizer=shifted(folder), progress=False) as other, pytest.raises(ValueError, match=says):
                compare(named, other, text, context=8, stride=8)
        assert compare(llm, named, text, context=8, stride=8).kl.value == pytest.approx(0, abs=1e-6)


def shifted(folder: Any) -> Any:
    """The folder's tokenizer, in which each token means the next one."""
    from fastllama.io.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    plain = tokenizer.token_bytes
    tokenizer.token_bytes = lambda i, **how: plain(max(i - 1, 0), **how)  # type: ignore[method-assign]
    return tokenizer
