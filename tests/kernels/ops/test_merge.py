"""merge_state against the formula, and against attention over all the keys at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.testing.monitor import CheckedRun
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, implementation, public
from tests.kernels.ops.test_attention import Packed, bounds, packed

INF = math.inf
# Heads that fill a program of the kernel's and leave a rest, heads of odd sizes, one head larger than a program.
SHAPES = [(1, 1, 1), (3, 32, 128), (2, 5, 80), (4, 7, 64), (2, 3, 1000), (5, 8, 16), (1, 64, 12)]
SPECIAL = [-INF, -3e38, -1e4, -100.0, -1.0, 0.0, 30.0, 88.0, 1e4, 3e38, INF]
EMPTY = [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)]

BASES = pytest.mark.parametrize("base2", [False, True])
everywhere = pytest.mark.parametrize("backend", backends("merge_state"))
State = tuple[Tensor, Tensor, Tensor, Tensor]  # a, a_lse, b, b_lse


def sides(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> State:
    """Random results, the larger share on either side."""
    a, b = (torch.randn(shape).to(dtype) for _ in "ab")
    a_lse, b_lse = (3 * torch.randn(shape[:2]) for _ in "ab")
    return a, a_lse, b, b_lse


def special(dtype: torch.dtype = torch.float32) -> State:
    """Every pair of special log-sum-exps; the values of a side without keys are noise, which must not be read."""
    a_lse, b_lse = torch.tensor([*product(SPECIAL, SPECIAL)]).view(len(SPECIAL), -1, 2).unbind(-1)
    a, _, b, _ = sides((*a_lse.shape, 24), dtype)
    a[a_lse.isinf()], b[b_lse.isinf()] = math.nan, INF
    return a, a_lse.contiguous(), b, b_lse.contiguous()


def seen(lse: Tensor) -> Tensor:
    """Log-sum-exps with +inf, which counts as no keys, replaced by -inf."""
    return lse.masked_fill(lse == INF, -INF)


def loops(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool = False) -> tuple[Tensor, Tensor]:
    """The definition, one head after another, in Python's floats."""
    out, lse = torch.zeros_like(a), torch.full_like(a_lse, -INF)
    for t, h in product(range(a.shape[0]), range(a.shape[1])):
        one, other = (-INF if math.isinf(lse[t, h]) else float(lse[t, h]) for lse in (a_lse, b_lse))
        peak = max(one, other)
        if peak > -INF:
            weights = [2 ** (lse - peak) if base2 else math.exp(lse - peak) for lse in (one, other)]
            for weight, side in zip(weights, (a, b), strict=True):
                if weight:
                    out[t, h] += weight / sum(weights) * side[t, h]
            lse[t, h] = peak + (math.log2 if base2 else math.log)(sum(weights))
    return out, lse


def plain(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool = False) -> tuple[Tensor, Tensor]:
    """Plain torch in a's dtype."""
    unit = math.log(2) if base2 else 1.0
    lses = seen(torch.stack((a_lse, b_lse))) * unit
    shares = lses.softmax(0).nan_to_num(0.0).to(a.dtype)[..., None]
    return shares[0] * a + shares[1] * b, lses.logsumexp(0) / unit


def assert_bits(found: Tensor, expected: Tensor) -> None:
    """As assert_equal, but 0 and -0 differ."""
    assert_equal(found, expected)
    assert_equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


@BASES
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_the_reference_is_the_definition(shape: tuple[int, ...], base2: bool) -> None:
    state = double(*sides(shape))
    for found, expected in zip(reference.merge_state(*state, base2), loops(*state, base2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@BASES
def test_the_reference_is_the_definition_at_the_extremes(base2: bool) -> None:
    state = double(*special())
    for found, expected in zip(reference.merge_state(*state, base2), loops(*state, base2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere
def test_merge_state(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = sides(shape, dtype)
    found = public("merge_state", backend)(*state)
    for ours, theirs, exact in zip(found, plain(*state), reference.merge_state(*double(*state)), strict=True):
        assert_honest(ours, theirs, exact)


@everywhere
def test_log_sum_exps_to_base_2_are_the_same_in_another_unit(backend: str) -> None:
    """Merged as natural ones they would be up to 0.07 off."""
    run, (a, a_lse, b, b_lse) = public("merge_state", backend), sides((6, 5, 24))
    out, lse = run(a, a_lse / math.log(2), b, b_lse / math.log(2), base2=True)
    expected, expected_lse = run(a, a_lse, b, b_lse)
    # log-sum-exps up to 16 in base 2, and sums of values that weigh up to 1 each
    torch.testing.assert_close(lse * math.log(2), expected_lse, rtol=0, atol=2**-19)
    torch.testing.assert_close(out, expected, rtol=0, atol=2**-18)
    assert not torch.allclose(run(a, a_lse / math.log(2), b, b_lse / math.log(2))[0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@everywhere
def test_the_sum_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Half a unit in the last place and fp32's own errors, some of them of sides that cancel."""
    state = sides((20, 8, 64), dtype)
    out, _ = public("merge_state", backend)(*state)
    exact, _ = reference.merge_state(*double(*state))
    unit = torch.finfo(dtype).eps * 2 ** exact.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    noise = 2**-21 * torch.maximum(state[0].abs(), state[2].abs())
    assert ((out - exact).abs() <= unit / 2 + noise).all()


@pytest.mark.in_turn("base2")
@BASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere
def test_far_apart_far_from_zero_and_without_keys(backend: str, dtype: torch.dtype, base2: bool) -> None:
    state = special(dtype)
    out, lse = public("merge_state", backend)(*state, base2=base2)
    exact, exact_lse = reference.merge_state(*double(*state), base2)
    finite = [side.nan_to_num(0.0, 0.0) for side in state[::2]]  # plain torch cannot take others without keys
    assert_honest(out, plain(finite[0], state[1], finite[1], state[3], base2)[0], exact)
    # the roundings of a total of 1 to 2, of its logarithm and of the sum
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2**-23, atol=2**-22)


@pytest.mark.in_turn("base2", "mark")
@BASES
@pytest.mark.parametrize("mark", [-INF, INF], ids=["ours", "flash-attn's"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere
def test_a_side_without_keys_leaves_the_other_bit_for_bit(
    backend: str, dtype: torch.dtype, mark: float, base2: bool
) -> None:
    """NaN, infinities and the sign of 0 included; and nothing at all is 0 and -inf."""
    a, a_lse, b, b_lse = sides((6, 5, 24), dtype)
    for side in (a, b):
        side[..., :4] = torch.tensor([-0.0, INF, -INF, math.nan])
    a_lse[::3], b_lse[1::3] = mark, mark
    a_lse[2], b_lse[2] = mark, -INF
    out, lse = public("merge_state", backend)(a, a_lse, b, b_lse, base2=base2)
    assert_bits(out[::3], b[::3])
    assert_bits(out[1::3], a[1::3])
    assert_bits(out[2], torch.zeros_like(out[2]))
    assert_equal(lse[::3], b_lse[::3])
    assert_equal(lse[1::3], a_lse[1::3])
    assert (lse[2] == -INF).all()


@everywhere
def test_nan_is_not_hidden(backend: str) -> None:
    """Neither a value's nor a log-sum-exp's, and they reach their own head alone."""
    state = sides((4, 5, 24))
    for row, tensor in enumerate(state):
        tensor[row, 1] = math.nan
    _, a_lse, _, b_lse = state
    a_lse[1, 0], b_lse[1, 0], a_lse[2, 0], b_lse[2, 0] = math.nan, INF, -INF, math.nan  # beside a side without keys
    out, lse = public("merge_state", backend)(*state)
    assert out[:, 1].isnan().all()
    assert lse[:, 1].isnan().tolist() == [False, True, False, True]
    assert lse[:, 0].isnan().tolist() == [False, True, True, False]
    assert out[:, [0, 2, 3, 4]].isfinite().all()
    assert lse[:, 2:].isfinite().all()


@pytest.mark.in_turn("heads", "causal")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", ["MHA", "GQA 4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere
def test_attention_over_two_parts_is_attention_over_all(
    backend: str, dtype: torch.dtype, heads: str, causal: bool
) -> None:
    """Prefixes of any length, and what follows, causal within itself; a part without keys on either side, on both."""
    queries, prefix = [3, 1, 9, 2, 4], [40, 33, 5, 0, 0]
    rest = [3, 17, 9, 20, 4] if causal else [3, 17, 0, 20, 0]
    lengths = [sum(pair) for pair in zip(prefix, rest, strict=True)]
    whole = packed(queries, lengths, heads, dtype)
    early = torch.cat([torch.arange(length) < n for length, n in zip(lengths, prefix, strict=True)])
    attend = public("attention_varlen", backend)
    state, theirs = [], []
    for keys, counts, masked in ((early, prefix, False), (~early, rest, causal)):
        part = Packed(whole.q, whole.k[keys], whole.v[keys], queries, counts)
        cu = (bounds(queries), bounds(counts))
        state += attend(part.q, part.k, part.v, *cu, causal=masked, return_lse=True)
        theirs += part.plain(masked)
    found = public("merge_state", backend)(*state)
    for ours, others, exact in zip(found, plain(*theirs), whole.exact(causal), strict=True):
        assert_honest(ours, others, exact)
    if not causal:
        assert (found[0][-4:] == 0).all()
        assert (found[1][-4:] == -INF).all()


@pytest.mark.parametrize("over", ["a", "b"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere
def test_in_place(backend: str, dtype: torch.dtype, over: str) -> None:
    run = public("merge_state", backend)
    names = ("a", "a_lse", "b", "b_lse")
    given = dict(zip(names, sides((5, 7, 64), dtype), strict=True))
    expected = run(**given)
    before = {name: tensor.clone() for name, tensor in given.items()}
    out, lse = run(**given, out=given[over], lse_out=given[f"{over}_lse"])
    assert out is given[over]
    assert lse is given[f"{over}_lse"]
    assert_equal(out, expected[0])
    assert_equal(lse, expected[1])
    other = "b" if over == "a" else "a"
    assert_equal(given[other], before[other])
    assert_equal(given[f"{other}_lse"], before[f"{other}_lse"])


@everywhere
def test_any_strides(backend: str) -> None:
    """Tokens and heads anywhere, heads before tokens as well; outputs in wider buffers, which are left alone."""
    run = public("merge_state", backend)
    a, a_lse, b, b_lse = sides((6, 5, 24), torch.bfloat16)
    wide = torch.full((6, 9, 40), math.nan, dtype=torch.bfloat16)
    wide[:, 2:7, 8:32] = a
    sums = torch.full((6, 20), math.nan)
    sums[:, 3:8] = a_lse
    turned = b.transpose(0, 1).contiguous().transpose(0, 1)
    buffer, row = torch.full((6, 7, 30), 7.0, dtype=torch.bfloat16), torch.full((6, 11), 7.0)
    out, lse_out = buffer[:, 1:6, 3:27], row[:, 2:7]
    found = run(wide[:, 2:7, 8:32], sums[:, 3:8], turned, b_lse, out=out, lse_out=lse_out)
    assert found[0] is out
    assert found[1] is lse_out
    for ours, expected in zip(found, run(a, a_lse, b, b_lse), strict=True):
        assert_equal(ours, expected)
    out[:], lse_out[:] = 7.0, 7.0
    assert (buffer == 7.0).all()
    assert (row == 7.0).all()


@everywhere
def test_log_sum_exps_of_heads_by_tokens(backend: str) -> None:
    """As flash-attn returns them, each with its own strides; in place too, but not over the rows of another."""
    run = public("merge_state", backend)
    a, a_lse, b, b_lse = sides((6, 5, 24))
    expected = run(a, a_lse, b, b_lse)
    turned, spread = a_lse.T.contiguous().T, torch.stack((b_lse, b_lse), -1).flatten(1)[:, ::2]
    buffer = torch.full((5, 9), 7.0)
    for lse_out in (buffer[:, 2:8].T, turned, spread):
        out, lse = run(a, turned, b, spread, lse_out=lse_out)
        assert lse is lse_out
        assert_equal(out, expected[0])
        assert_equal(lse, expected[1])
        turned.copy_(a_lse)
        spread.copy_(b_lse)
    buffer[:, 2:8] = 7.0
    assert (buffer == 7.0).all()
    with pytest.raises(ValueError, match=r"^lse_out shares memory with a_lse"):
        run(a, turned, b, b_lse, lse_out=turned.T.view(6, 5))


@everywhere
def test_a_token_does_not_depend_on_the_others(backend: str) -> None:
    run, state = public("merge_state", backend), sides((9, 5, 24), torch.bfloat16)
    together = run(*state)
    for t in range(9):
        for ours, expected in zip(run(*(each[t : t + 1] for each in state)), together, strict=True):
            assert_equal(ours, expected[t : t + 1])


@everywhere
def test_the_order_of_the_sides_does_not_matter(backend: str) -> None:
    run, (a, a_lse, b, b_lse) = public("merge_state", backend), special()
    for ours, expected in zip(run(b, b_lse, a, a_lse), run(a, a_lse, b, b_lse), strict=True):
        assert_equal(ours, expected)


@pytest.mark.interpreter
def test_each_side_is_read_once_and_the_result_written_once(checked: CheckedRun) -> None:
    public("merge_state", "triton")(*sides((3, 40, 80), torch.bfloat16))
    (launch,) = checked.launches
    side, sums = 3 * 40 * 80 * 2, 3 * 40 * 4
    assert launch.loaded == {"a_ptr": side, "a_lse_ptr": sums, "b_ptr": side, "b_lse_ptr": sums}
    assert launch.stored == {"out_ptr": side, "lse_out_ptr": sums}


def merged_in_place(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.merge_state(a + 1, a_lse, b, b_lse, out=b, lse_out=b_lse)


@everywhere
def test_it_stays_right_in_place_when_compiled(backend: str, bind: Callable[..., None]) -> None:
    bind("merge_state", implementation("merge_state", backend))
    state = sides((3, 5, 24))
    ours, theirs = ([each.clone() for each in state] for _ in "ab")
    torch.compiler.reset()
    found = torch.compile(merged_in_place, fullgraph=True, backend="aot_eager")(*ours)
    for one, other in zip((*found, *ours), (*merged_in_place(*theirs), *theirs), strict=True):
        assert_equal(one, other)


def test_log_sum_exps_are_of_the_width_of_the_values() -> None:
    """fp32, and fp64 beside fp64 alone."""
    a, a_lse, b, b_lse = sides((2, 3, 8))
    with pytest.raises(TypeError, match=r"^b_lse has dtype torch\.float64; legal: torch\.float32$"):
        kernels.merge_state(a, a_lse, b, b_lse.double())
    with pytest.raises(TypeError, match=r"^a_lse has dtype torch\.float32; legal: torch\.float64$"):
        kernels.merge_state(a.double(), a_lse, b.double(), b_lse)
    assert kernels.merge_state(*double(a, a_lse, b, b_lse))[1].dtype == torch.float64
