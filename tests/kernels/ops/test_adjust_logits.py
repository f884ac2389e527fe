"""adjust_logits against plain Python, and at the extremes of what a request may specify."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.dispatch.recording import record
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, on_cpu, public

everywhere = pytest.mark.parametrize("backend", backends("adjust_logits"))
LIMIT = torch.finfo(torch.float32).max / 4
WORD = 1 << 32


def call(logits: Tensor, *, num_slots: int | None = None, **given: Any) -> dict[str, Any]:
    """Rows with the given options alone; each has its own row of the tables, and no recent tokens."""
    rows, vocab = logits.shape
    num_slots = rows if num_slots is None else num_slots
    column = {name: torch.full((rows,), off) for name, off in zip(PENALTIES, (1.0, 0.0, 0.0), strict=True)}
    return {
        "logits": logits,
        "tokens": torch.empty(0, dtype=torch.int64),
        "starts": torch.zeros(rows, dtype=torch.int64),
        "ends": torch.zeros(rows, dtype=torch.int64),
        "slots": torch.arange(rows),
        "bias": torch.zeros(num_slots, vocab),
        "counts": torch.zeros(num_slots, vocab, dtype=torch.int32),
        **column,
        **given,
    }


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def recents(*rows: list[int]) -> dict[str, Tensor]:
    """Tokens of each row that no table counts."""
    lengths = torch.tensor([0, *map(len, rows)]).cumsum(0)
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return {"tokens": tokens, "starts": lengths[:-1].clone(), "ends": lengths[1:].clone()}


def mixed(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """A mixed batch: every third row has no options, others share tables, and have up to three recent tokens."""
    slots = torch.arange(rows) // 2
    slots[2::3] = -1
    counts = torch.randint(0, 8, (rows, vocab), dtype=torch.int32) * (torch.rand(rows, vocab) < 0.4).int()
    return call(
        (3 * torch.randn(rows, vocab)).to(dtype),
        slots=slots,
        bias=torch.randn(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.1, -math.inf),
        counts=counts,
        repetition_penalty=torch.rand(rows) + 0.6,
        presence_penalty=torch.randn(rows),
        frequency_penalty=torch.randn(rows),
        **recents(*([row % vocab, vocab - 1, row % vocab][: row % 4] for row in range(rows))),
    )


def explicit(given: dict[str, Any]) -> Tensor:
    """One token after another, in Python's floats."""
    plain = {name: value.tolist() for name, value in given.items()}
    rows = []
    for row, logits in enumerate(plain["logits"]):
        slot, out = plain["slots"][row], list(logits)
        recent = plain["tokens"][plain["starts"][row] : plain["ends"][row]]
        repetition, presence, frequency = (plain[name][row] for name in PENALTIES)
        for token in range(len(out) if slot >= 0 else 0):
            prompt, generated = plain["counts"][slot][token] % 2, plain["counts"][slot][token] // 2
            generated += recent.count(token)
            out[token] += plain["bias"][slot][token]
            if prompt or generated:
                out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
            if generated:
                out[token] -= presence + generated * frequency
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64).reshape(given["logits"].shape)


SHAPES = [(1, 1), (3, 9), (13, 100), (4, 5000), (0, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, int]) -> None:
    given = mixed(*shape, torch.float64)
    given = dict(zip(given, double(*given.values()), strict=True))
    torch.testing.assert_close(reference.adjust_logits(**given), explicit(given), rtol=1e-13, atol=1e-13)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adjust_logits(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    given = mixed(*shape, dtype)
    found = public("adjust_logits", backend)(**given)
    exact = reference.adjust_logits(*double(*given.values()))
    assert found.dtype == torch.float32
    assert_honest(found, reference.adjust_logits(**given), exact)
    unasked = given["slots"] < 0
    assert_equal(found[unasked], given["logits"][unasked].float())


@everywhere
def test_the_order_is_bias_then_repetition_then_presence_and_frequency(backend: str) -> None:
    """(1 + 1) / 2 - 0.25 - 3 * 0.125, and 2 * (-3 + 1) - 0.25 - 3 * 0.125, (-0.5 + 1) / 2; other orders give others."""
    given = call(
        torch.tensor([[1.0, -3.0, 1.0, 1.0, -0.5]]),
        bias=torch.ones(1, 5),
        counts=torch.tensor([[6, 7, 1, 0, 1]], dtype=torch.int32),
        repetition_penalty=torch.tensor([2.0]),
        presence_penalty=torch.tensor([0.25]),
        frequency_penalty=torch.tensor([0.125]),
    )
    found = public("adjust_logits", backend)(**given)
    assert found.tolist() == [[1 - 0.25 - 0.375, -4 - 0.25 - 0.375, 1.0, 2.0, 0.25]]


@everywhere
def test_what_is_off_changes_no_bit(backend: str) -> None:
    """Not even a penalty of 1 on tokens that were seen: a quotient is rounded, not approximated."""
    logits = torch.randn(3, 700)
    found = public("adjust_logits", backend)(**call(logits, counts=torch.full((3, 700), 3, dtype=torch.int32)))
    assert_equal(found, logits)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_logit_whether_it_is_recent_or_counted(backend: str, dtype: torch.dtype) -> None:
    """At the ends of tiles, twice, before and among others: overlapped steps sample what sequential steps do."""
    vocab = 9000
    given = mixed(4, vocab, dtype) | {"slots": torch.arange(4)}
    rows = [[0, 4095, 4096, 8191], [8999], [], [511, 512, 511, 8192, 511, 4095, 5, 7]]
    run = public("adjust_logits", backend)
    found = run(**given | recents(*rows))
    for row, tokens in enumerate(rows):
        for token in tokens:
            given["counts"][row, token] += 2
    assert_equal(found, run(**given | recents([], [], [], [])))


@everywhere
def test_recent_ids_outside_of_the_vocabulary_are_left_out(backend: str) -> None:
    given = call(torch.randn(2, 600), presence_penalty=torch.ones(2), slots=torch.tensor([1, 0]))
    wrong = [-1, 600, 1 << 40, WORD + 3, -(1 << 63), 1023, -WORD + 3]
    buffer = torch.full((2, 1100), 7.0)
    found = public("adjust_logits", backend)(**given | recents([*wrong, 7], wrong), out=buffer[:, 30:630])
    expected = given["logits"].clone()
    expected[0, 7] -= 1
    assert_equal(found, expected)
    buffer[:, 30:630] = 7.0
    assert (buffer == 7.0).all()


@everywhere
def test_a_row_that_asks_for_nothing_passes_bit_for_bit(backend: str) -> None:
    """Whatever its logits, penalties and tokens are."""
    logits = torch.tensor([[math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45]])
    given = call(logits, slots=torch.tensor([-5]), num_slots=0) | recents([1, 2])
    given |= {name: torch.tensor([math.nan]) for name in PENALTIES}
    assert_equal(public("adjust_logits", backend)(**given), logits)


@everywhere
def test_a_ban_stays_a_ban(backend: str) -> None:
    given = call(
        torch.tensor([[5.0, -5.0, -math.inf, 3e38]] * 3),
        bias=torch.full((3, 4), -math.inf),
        counts=torch.full((3, 4), 3, dtype=torch.int32),
        repetition_penalty=torch.tensor([1e-45, 3e38, 1.5]),
        presence_penalty=torch.tensor([-3e38, 3e38, 1.0]),
        frequency_penalty=torch.tensor([-3e38, 3e38, 1.0]),
    )
    assert_equal(public("adjust_logits", backend)(**given), torch.full((3, 4), -math.inf))


# A logit, its bias, repetition, presence and frequency penalty, as often generated, and what comes out.
EXTREMES = [
    ((3e38, 3e38, 1.0, 0.0, 0.0, 0), LIMIT),
    ((-3e38, -3e38, 1.0, 0.0, 0.0, 0), -LIMIT),
    ((3e38, 0.0, 1.0, 0.0, 0.0, 0), LIMIT),
    ((1.0, 0.0, 1e-45, 0.0, 0.0, 1), LIMIT),
    ((-1e38, 0.0, 3e38, 0.0, 0.0, 1), -LIMIT),
    ((1.0, 0.0, 3e38, 0.0, 0.0, 1), 1.0 / torch.tensor(3e38).item()),
    ((0.0, 0.0, 3e38, 0.0, 0.0, 1), 0.0),
    ((0.0, 0.0, 1e-45, 0.0, 0.0, 1), 0.0),
    ((1.0, 0.0, 1.0, 3e38, 3e38, 9), -LIMIT),
    ((1.0, 0.0, 1.0, -3e38, -3e38, 9), LIMIT),
    ((1.0, 0.0, 1.0, 3e38, -3e38, 9), LIMIT),
    ((1.0, 0.0, 1.0, -3e38, 3e38, 9), -LIMIT),
    ((-8.5e37, 0.0, 1.0, 3.4e38, -3e38, 9), LIMIT),  # one after the other: -inf + inf
    ((8.5e37, 0.0, 1.0, -1.0, 0.0, 1), 8.5e37),
    ((1.0, 0.0, 1.0, 0.0, 1.0, (1 << 30) - 1), 1.0 - (1 << 30)),
    ((math.inf, -1.0, 3e38, 3e38, 3e38, 9), math.inf),
    ((-math.inf, 1.0, 1e-45, -3e38, -3e38, 9), -math.inf),
    ((math.nan, 1.0, 2.0, 1.0, 1.0, 9), math.nan),
    ((1.0, math.inf, 3e38, 3e38, 3e38, 9), math.inf),
]


@everywhere
def test_what_would_overflow_stays_a_number(backend: str) -> None:
    """Presence and frequency that overflow to opposite sides included; infinities and NaN pass."""
    logits, bias, *penalties, generated = zip(*(given for given, _ in EXTREMES), strict=True)
    given = call(
        torch.tensor(logits)[:, None],
        bias=torch.tensor(bias)[:, None],
        counts=2 * torch.tensor(generated, dtype=torch.int32)[:, None],
        **{name: torch.tensor(column) for name, column in zip(PENALTIES, penalties, strict=True)},
    )
    expected = torch.tensor([value for _, value in EXTREMES])
    assert_equal(public("adjust_logits", backend)(**given)[:, 0], expected)


@everywhere
def test_a_slot_past_the_tables_makes_its_row_nan(backend: str) -> None:
    given = mixed(4, 600, torch.float32)
    right = public("adjust_logits", backend)(**given | {"slots": torch.tensor([0, 1, 3, -1])})
    for wrong in (4, 1 << 40, (1 << 63) - 1):
        found = public("adjust_logits", backend)(**given | {"slots": torch.tensor([0, wrong, 3, -1])})
        assert found[1].isnan().all()
        assert_equal(found[[0, 2, 3]], right[[0, 2, 3]])


@everywhere
def test_recent_tokens_past_the_end_are_not_read(backend: str) -> None:
    """Ids before and after them in memory are other rows'."""
    given = call(torch.zeros(3, 10), presence_penalty=torch.ones(3))
    around = torch.full((9,), 5)
    given |= {"tokens": around[3:6], "starts": torch.tensor([-3, 2, 1]), "ends": torch.tensor([0, 9, 1 << 40])}
    around[3:6] = torch.tensor([1, 2, 3])
    expected = torch.zeros(3, 10)
    expected[1, 3] = expected[2, 2] = expected[2, 3] = -1
    assert_equal(public("adjust_logits", backend)(**given), expected)


@everywhere
def test_strided_rows_and_output(backend: str) -> None:
    given = mixed(5, 70, torch.bfloat16)
    expected = public("adjust_logits", backend)(**given)
    for name in ("logits", "bias", "counts"):
        wide = torch.full((5, 90), 3, dtype=given[name].dtype)
        wide[:, 7:77] = given[name]
        given[name] = wide[:, 7:77]
    buffer = torch.full((5, 80), 7.0)
    out = buffer[:, 5:75]
    assert public("adjust_logits", backend)(**given, out=out) is out
    assert_equal(out, expected)
    buffer[:, 5:75] = 7.0
    assert (buffer == 7.0).all()


def test_fp64_gives_fp64_and_the_result_needs_memory_of_its_own() -> None:
    given = mixed(3, 9, torch.float64)
    assert kernels.adjust_logits(**given).dtype == torch.float64
    given["logits"] = given["logits"].float()
    with pytest.raises(ValueError, match=r"^out shares memory with logits; legal: memory of its own$"):
        kernels.adjust_logits(**given, out=given["logits"])
    with pytest.raises(TypeError, match=r"^out has dtype torch.float16; legal: torch.float32$"):
        kernels.adjust_logits(**given, out=given["logits"].half())


@pytest.mark.parametrize("backend", on_cpu("adjust_logits"))
def test_a_recording_reads_what_the_tensors_hold_then(backend: str) -> None:
    """Tokens that were sampled a moment ago, new counts, a slot that is no longer used."""
    given = mixed(4, 300, torch.bfloat16) | recents([1], [2], [3], [4])
    run = public("adjust_logits", backend)
    found, recording = record(lambda: run(**given), torch.device("cpu"), [])
    assert recording.replayable
    given["tokens"] += 5
    given["counts"][0] += 2
    given["slots"][3] = -1
    given["presence_penalty"] += 1
    recording.replay()
    assert_equal(found, run(**given))
