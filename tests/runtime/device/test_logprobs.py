"""Log-probabilities are right, the same in any batch, and never need more logits at once than planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama import LLM, LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.device.logprobs import ROWS, token_logprobs
from fastllama.runtime.device.runner import Runner
from tests.runtime.models import VOCAB, ours, prompt_of, running

PROMPTS = [prompt_of(50), prompt_of(1), prompt_of(33, seed=2)]
SCORED = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_they_are_those_of_softmax(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).mul(5).to(dtype)
    targets, tops = [7 * row for row in range(40)], [row % 4 for row in range(40)]
    expected = logits.double().log_softmax(-1)
    for row, report in enumerate(token_logprobs(logits, range(len(targets)), targets, tops)):
        assert report.token_id == targets[row]
        assert report.logprob == pytest.approx(expected[row, targets[row]].item(), abs=1e-5)
        assert report.rank == 1 + (expected[row] > expected[row, targets[row]]).sum()
        ids = [token_id for token_id, _ in report.top]
        assert len(ids) == tops[row]
        assert [value for _, value in report.top] == pytest.approx(expected[row].topk(tops[row]).values, abs=1e-5)
        assert [value for _, value in report.top] == pytest.approx(expected[row, ids], abs=1e-5)


def test_more_of_the_likeliest_than_there_are_tokens_is_all_of_them() -> None:
    (report,) = token_logprobs(torch.tensor([[1.0, 3.0, 2.0]]), [0], [0], [20])
    assert [token_id for token_id, _ in report.top] == [1, 2, 0]


def test_equal_tokens_share_the_better_rank() -> None:
    reports = token_logprobs(torch.tensor([[2.0, 5.0, 2.0, 1.0]]), [0] * 4, [0, 1, 2, 3], [0] * 4)
    assert [report.rank for report in reports] == [2, 1, 2, 4]


def test_a_row_is_bit_identical_alone_and_among_others() -> None:
    logits = torch.randn(35, 5000, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    targets, tops = list(range(35)), [5] * 35
    together = token_logprobs(logits, range(len(targets)), targets, tops)
    assert together == [token_logprobs(logits, [row], [row], [5])[0] for row in range(35)]


def test_broken_logits_are_no_numbers_and_spoil_no_other_row() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    first, broken, last = token_logprobs(logits, range(3), [0, 0, 0], [1, 1, 1])
    assert broken.logprob != broken.logprob
    assert first.logprob == last.logprob == pytest.approx(-1.3862944)


def scored(**options: Any) -> list[RequestOutput]:
    with running(ours(dtype=torch.bfloat16), deterministic=True, **options) as llm:
        return llm.generate(PROMPTS, SCORED)


def in_pieces_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have prompts' logits computed so many rows at a time."""
    init = Runner.__init__

    def small(self: Runner, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._logits_piece = size

    monkeypatch.setattr(Runner, "__init__", small)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_prompts_are_bit_identical_whatever_the_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored()
    assert [len(output.prompt_logprobs or ()) for output in expected] == [50, 1, 33]
    in_pieces_of(size, monkeypatch)
    for options in ({}, {"max_num_batched_tokens": 11, "max_num_seqs": 3}):
        found = scored(**options)
        assert [each.prompt_logprobs for each in found] == [each.prompt_logprobs for each in expected]
        assert [each.outputs for each in found] == [each.outputs for each in expected]


class Largest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that is made inside."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = () if func.is_view else result if isinstance(result, (tuple, list)) else (result,)
        for tensor in made:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCAB:
                self.rows = max(self.rows, tensor.shape[0])
        return result


def test_prompts_never_have_more_logits_at_once_than_half_of_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half is that of the rows that tokens are sampled from."""
    in_pieces_of(4, monkeypatch)
    with running(ours()) as llm, Largest() as largest:
        llm.generate(PROMPTS, SCORED)
    assert largest.rows == 4


def test_nothing_else_of_the_logits_size_is_made_to_reduce_them() -> None:
    """Logits of samples count too: there may be some for each of hundreds of sequences and their drafts."""
    logits = torch.randn(200, VOCAB).bfloat16()
    with Largest() as largest:
        token_logprobs(logits, range(200), [1] * 200, [2] * 200)
    assert 0 < largest.rows <= ROWS


class OwnForward(LlamaForCausalLM):
    """Doubles the logits."""

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        return super().forward(ids, batch, kv) * 2


def doubled(module: torch.nn.Module, args: Any, logits: Tensor) -> Tensor:
    return logits * 2


def of_the_model(model: LlamaForCausalLM) -> None:
    model.register_forward_hook(doubled)


def of_the_head(model: LlamaForCausalLM) -> None:
    model.lm_head.register_forward_hook(doubled)


def of_the_object(model: LlamaForCausalLM) -> None:
    forward = model.forward
    model.forward = lambda *args: forward(*args) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [of_the_model, of_the_head, of_the_object, None])
def test_what_changes_whole_logits_counts_for_prompts_too(
    change: Callable[[LlamaForCausalLM], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces_of(4, monkeypatch)
    model = ours(kind=OwnForward if change is None else LlamaForCausalLM)
    if change is not None:
        change(model)
    plain = ours()
    plain.norm.weight.mul_(2)  # with these weights, logits twice as large
    with running(model) as changed, running(plain) as expected:
        assert values_of(changed) == pytest.approx(values_of(expected), rel=1e-5)


def values_of(llm: LLM) -> list[float]:
    reports = [report for output in llm.generate(PROMPTS, SCORED) for report in output.prompt_logprobs or ()]
    return [value for report in reports if report for value in (report.logprob, *(top for _, top in report.top))]
