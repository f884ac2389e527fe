"""Workspaces, sums and offsets of the sampling kernels; their tokens are in tests/kernels/ops/test_sampling.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import tuning
from fastllama.kernels.triton.sampling import draw as sampling
from fastllama.testing.checks import same_in_any_order
from fastllama.testing.monitor import CheckedRun
from fastllama.verify.sampling import Draw, candidates
from tests.kernels.honest import assert_equal
from tests.kernels.ops.test_sampling import rows, survivors

EVERY_KIND = {
    "temperature": [0.0, 1.0, 0.7, 1.5, 3.0, 1.0],
    "top_k": [0, 40, 0, 0, 3000, 1],
    "top_p": [1.0, 0.9, 0.5, 1.0, 0.99, 0.1],
    "min_p": [0.0, 0.02, 0.0, 0.0, 0.0, 1.0],
    "offset": [1, 2, 3, 4, 5, 6],
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch, bind: Callable[..., None]) -> None:
    """The Triton kernels, forced as a user forces them."""
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    bind("sample", OPS["sample"].implementation("cpu").run)


class TestOrder:
    @pytest.fixture(autouse=True)
    def checked(self) -> None:
        """No checks here: `same_in_any_order` has its own, and two would conflict."""

    @pytest.mark.interpreter
    def test_no_order_of_programs_changes_a_bit(self) -> None:
        """Three programs add to each row's sums and candidates."""
        logits, parameters = 3 * torch.randn(6, 9000), rows(6, **EVERY_KIND)
        same_in_any_order(lambda: kernels.sample(logits, *parameters))


@pytest.mark.interpreter
def test_a_workspace_holds_anything_before() -> None:
    """Also the sums of a larger call before."""
    logits, parameters = 3 * torch.randn(6, 5000), rows(6, **EVERY_KIND)
    expected = kernels.sample(logits, *parameters)
    workspace = kernels.sample_workspace(logits)
    assert workspace.numel() * 8 < 6 * 5000 * 5
    for filling in (-1, 0x7FC000007FC00000):
        workspace.fill_(filling)
        for result, value in zip(kernels.sample(logits, *parameters, workspace=workspace), expected, strict=True):
            assert_equal(result, value)
    with pytest.raises(ValueError, match=r"^workspace has \d+ elements; legal for these logits: at least"):
        kernels.sample(logits, *parameters, workspace=workspace[:-1])
    few = kernels.sample(logits[:2], *(parameter[:2] for parameter in parameters), workspace=workspace)
    for result, value in zip(few, expected, strict=True):
        assert_equal(result, value[:2])


@pytest.mark.interpreter
def test_with_a_workspace_and_outputs_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, parameters = torch.randn(2, 50), rows(2)
    tokens, logprobs = torch.empty(2, dtype=torch.int64), torch.empty(2)
    workspace = kernels.sample_workspace(logits)
    monkeypatch.setattr(torch, "empty", None)
    kernels.sample(logits, *parameters, tokens=tokens, logprobs=logprobs, workspace=workspace)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        kernels.sample(logits, *parameters, tokens=tokens, logprobs=logprobs)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (torch.empty(5, dtype=torch.int64), "workspace has 5 elements; legal for these logits: at least"),
        (torch.empty(9000, dtype=torch.int64)[::2], "workspace has strides"),
        (torch.empty(9000, dtype=torch.int64, device="meta"), "workspace is on meta, logits on cpu"),
    ],
)
def test_a_wrong_workspace_is_refused_before_anything_is_written(workspace: Tensor, message: str) -> None:
    tokens, logprobs = torch.full((2,), 7), torch.full((2,), 7.0)
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.sample(torch.randn(2, 50), *rows(2), tokens=tokens, logprobs=logprobs, workspace=workspace)
    with pytest.raises(TypeError, match=r"^workspace has dtype torch.int32"):
        kernels.sample(torch.randn(2, 50), *rows(2), workspace=torch.empty(9000, dtype=torch.int32))
    assert (tokens.tolist(), logprobs.tolist()) == ([7, 7], [7, 7])


@pytest.mark.interpreter
def test_what_the_kernel_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"^logits has dtype torch.float64; legal: torch.bfloat16, torch.float16, "):
        kernels.sample(torch.randn(2, 50, dtype=torch.float64), *rows(2))
    with pytest.raises(ValueError, match=r"^logits has V=524288; legal for the Triton kernel: up to 524287"):
        kernels.sample(torch.empty(1, 1 << 19), *rows(1))


@pytest.mark.interpreter
@pytest.mark.exhaustive  # 200 numbers where others try those at the edges
def test_samples_follow_the_distribution() -> None:
    """Pearson's chi-square of 200 samples, below its quantile of 0.9999 (Wilson and Hilferty, 1931)."""
    count, logits = 200, torch.tensor([2.0, -1.0, 0.5, 0.5, 1.5, 0.0, -3.0, 1.0])
    parameters = rows(count, temperature=1.4, top_k=7, top_p=0.9, offset=list(range(count)))
    tokens, _ = kernels.sample(logits.expand(count, 8), *parameters)
    expected = survivors(logits.tolist(), *(parameter[0].item() for parameter in parameters[:4]))
    counts = torch.bincount(tokens, minlength=8).tolist()
    assert {i for i, seen in enumerate(counts) if seen} == set(expected)
    chi_square = sum((counts[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.interpreter
def test_the_largest_vocabulary_keeps_its_sums() -> None:
    """A flat row of 262144 tokens weighs 2^62 units; the number falls into the share of the sampled token."""
    vocab = 1 << 18
    parameters = rows(2, top_k=[0, vocab - 1], top_p=[1.0, 0.5], offset=[5, 9])
    tokens, logprobs = kernels.sample(torch.zeros(1, vocab).expand(2, vocab), *parameters)
    numbers = torch.tensor([kernels.reference.sampling.philox(*(p[i : i + 1] for p in parameters[4:])) for i in (0, 1)])
    assert_equal(tokens, (numbers.double() * vocab).long())
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(vocab)))


def draw_always(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    """Every row's random number is this one."""
    monkeypatch.setattr(tl, "rand", lambda seed, offset: tl.full([], number, tl.float32))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("vocab", "step"),
    [
        pytest.param(40, 2.0**-24, id="neighbours in fp32"),
        pytest.param(9001, 2.0**-14, id="few octaves"),
        pytest.param(9001, 2.0**-9, id="many octaves"),
        pytest.param(9001, 2.0**-7, id="most below the octaves"),
    ],
)
def test_the_least_likely_token_that_is_kept(monkeypatch: pytest.MonkeyPatch, vocab: int, step: float) -> None:
    """In ascending order the first one kept, which the number 0 samples: every threshold, to the token.

    But not below 2^-44 of the largest, where a token has no mass.
    """
    draw_always(monkeypatch, 0.0)
    filters = [(1, 1.0, 0.0), (7, 1.0, 0.0), (500, 1.0, 0.0), (3500, 1.0, 0.0), (0, 0.11, 0.0), (0, 0.61, 0.0)]
    filters += [(0, 0.999, 0.0), (7, 0.6, 0.0), (500, 0.7, 0.0), (3500, 0.9, 0.0), (3500, 0.9, 0.7), (0, 1.0, 0.3)]
    top_k, top_p, min_p = (list(column) for column in zip(*filters, strict=True))
    logits = (torch.arange(vocab) * step).expand(12, vocab)
    parameters = rows(12, temperature=[1.0, 0.7, 1.3] * 4, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, _ = kernels.sample(logits, *parameters)
    draws = [Draw(*(parameter[row].item() for parameter in parameters)) for row in range(12)]
    probs = [candidates(logits[row].double(), draw) for row, draw in enumerate(draws)]
    assert tokens.tolist() == [int((each >= 2.0**-44 * each.max()).int().argmax()) for each in probs]


@pytest.mark.interpreter
@pytest.mark.parametrize("number", [0.0, 0.25, 0.5 - 2**-25, 0.5, 0.5 + 2**-9, (9 - 2**-24) / 11, 1 - 2**-24])
def test_a_number_at_the_edge_of_a_token_is_the_next_ones(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    """Half of four programs' tokens have no share, and are sampled neither by 0 nor by the largest number.

    (9 - 2^-24) / 11 times 11 is below 9, and 9 when it is rounded to fp32.
    """
    draw_always(monkeypatch, number)
    kept = torch.arange(1 << 14).view(4, 2, 2048)[:, 1].flatten()
    logits = torch.full((2, 1 << 14), -math.inf)
    logits[0] = 0.0
    logits[1, kept] = 0.0
    tokens, _ = kernels.sample(logits, *rows(2))
    assert tokens.tolist() == [int(number * (1 << 14)), int(kept[int(number * (1 << 13))])]
    tokens, _ = kernels.sample(torch.zeros(1, 11), *rows(1))
    assert tokens.item() == int(number * 11)


def reserved(rows: int, stride: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows at a stride, in memory that takes none until it is touched."""
    storage = torch.UntypedStorage(((rows - 1) * stride + columns) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (stride, 1))


@pytest.mark.interpreter
def test_rows_past_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits by their stride, and rows of candidates in the workspace by their size."""
    logits, parameters = torch.randn(5, 9), rows(5, top_k=[0, 3, 3, 3, 3], temperature=[1.0, 1.0, 1.0, 1.0, 0.5])
    expected = kernels.sample(logits, *parameters)
    far = reserved(5, (1 << 29) + 16, 9, torch.float16).copy_(logits)
    for result, value in zip(kernels.sample(far, *parameters), kernels.sample(logits.half(), *parameters), strict=True):
        assert_equal(result, value)
    monkeypatch.setattr(sampling, "_capacity", lambda vocab_size: (1 << 29) + 1024)
    (workspace,) = reserved(1, 0, sampling.workspace_size(logits), torch.int64)
    for result, value in zip(kernels.sample(logits, *parameters, workspace=workspace), expected, strict=True):
        assert_equal(result, value)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("filters", "passes"),
    [({"temperature": 0.0, "top_k": 9, "top_p": 0.5}, 1), ({"min_p": 0.5}, 2), ({"top_k": 9}, 4), ({"top_p": 0.5}, 4)],
)
def test_a_row_pays_for_what_it_asks(checked: CheckedRun, filters: dict[str, float], passes: int) -> None:
    """Passes over the logits, and at the end once more the chunk of the token."""
    chunk, vocab = 4096, 12288
    assert tuning.sample(torch.device("cpu"), vocab_size=vocab, itemsize=4).block == chunk
    kernels.sample(torch.randn(1, vocab), *rows(1, **filters))
    assert len(checked.launches) == 6
    loaded = sum(launch.loaded["logits_ptr"] for launch in checked.launches)
    assert loaded == 4 * (passes * vocab + chunk + 1)
