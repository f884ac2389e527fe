"""The cases of every op: catalogue calls at odd and at usual sizes, each with its formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue import rotary, rows, sampling
from fastllama.catalogue.maker import Maker
from fastllama.verify import attention, integers, oracle
from fastllama.verify.case import FormulaCase, Results, given
from fastllama.verify.matmuls import matmuls
from fastllama.verify.sampling import Draw, miss, take

POSITIONS = 200
ROWS = ((1, 4096), (33, 256), (7, 100))


def all_cases(dtype: torch.dtype) -> Iterator[FormulaCase]:
    """The cases of every op, op by op, on the CPU; the same numbers in every run."""
    m = Maker(dtype, generator=torch.Generator().manual_seed(0), draws=torch.float64)
    for cases in (
        _rms_norm,
        _add_rms_norm,
        _embedding,
        matmuls,
        _rope,
        _rope_and_write_kv,
        _write_kv,
        _silu_mul,
        attention.varlen,
        attention.prefill,
        attention.decode,
        _sample,
        _adjust_logits,
        _merge_state,
        integers.quantize_rows,
        integers.matmul_w8a8,
        integers.rms_norm_int8,
        integers.add_rms_norm_int8,
        integers.silu_mul_int8,
    ):
        yield from cases(m)


def _rms_norm(m: Maker) -> Iterator[FormulaCase]:
    for shape in ROWS:
        call = given("rms_norm", rows.rms_norm(m, *shape))
        yield FormulaCase(
            "rms_norm", f"x {list(shape)}", call, lambda x, weight, eps: (oracle.rms_norm(x, weight, eps),)
        )


def _add_rms_norm(m: Maker) -> Iterator[FormulaCase]:
    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Results:
        total = x + residual
        return oracle.rms_norm(total, weight, eps), total

    for shape in ROWS:
        call = given("add_rms_norm", rows.add_rms_norm(m, *shape))
        yield FormulaCase("add_rms_norm", f"x {list(shape)}", call, formula)


def _embedding(m: Maker) -> Iterator[FormulaCase]:
    def formula(ids: Tensor, weight: Tensor) -> Results:
        return (torch.stack([weight[i] for i in ids]),)

    yield FormulaCase("embedding", "weight [300, 64]", given("embedding", rows.embedding(m, 41, 300, 64)), formula)


def _rope(m: Maker) -> Iterator[FormulaCase]:
    def formula(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> Results:
        cos, sin = cos_sin[positions].tensor_split(2, dim=-1)
        return oracle.rotate(q, cos, sin, interleaved), oracle.rotate(k, cos, sin, interleaved)

    for rotated, interleaved in ((64, False), (64, True), (32, False)):
        call = rotary.rope(m, 33, 8, 2, 64, positions=POSITIONS, rotated=rotated, interleaved=interleaved)
        label = f"q [33, 8, 64], {rotated} rotated{', interleaved' if interleaved else ''}"
        yield FormulaCase("rope", label, given("rope", call), formula)


def _rope_and_write_kv(m: Maker) -> Iterator[FormulaCase]:
    def formula(
        qkv: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor, **_: Any
    ) -> Results:
        heads = qkv.unflatten(1, (-1, 64))
        cos, sin = cos_sin[positions].tensor_split(2, dim=-1)
        q, k = (oracle.rotate(x, cos, sin) for x in (heads[:, :8], heads[:, 8:10]))
        return q, *_written(k, heads[:, 10:], slots, k_pages, v_pages)

    for tokens, page in ((1, 16), (21, 16), (100, 64)):
        call = rotary.rope_and_write_kv(m, tokens, 8, 2, 64, page=page, pages=4, positions=POSITIONS, padding=10)
        label = f"qkv [{tokens}, 768], page size {page}"
        asked = given("rope_and_write_kv", call)
        yield FormulaCase("rope_and_write_kv", label, asked, formula, written=("k_pages", "v_pages"))


def _write_kv(m: Maker) -> Iterator[FormulaCase]:
    def formula(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor, **_: Any) -> Results:
        return _written(k, v, slots, k_pages, v_pages)

    for tokens, page in ((1, 16), (21, 16), (100, 64)):
        call = given("write_kv", rotary.write_kv(m, tokens, 2, 64, page=page, pages=4, padding=10))
        label = f"k [{tokens}, 2, 64], page size {page}"
        yield FormulaCase("write_kv", label, call, formula, written=("k_pages", "v_pages"))


def _written(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> Results:
    """The pages after k and v are written to their slots; negative slots are skipped."""
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, place = divmod(slot, k_pages.shape[2])
            k_pages[page, :, place], v_pages[page, :, place] = k[token], v[token]
    return k_pages, v_pages


def _silu_mul(m: Maker) -> Iterator[FormulaCase]:
    for count, size, apart in ((1, 11008, False), (33, 352, False), (7, 5, False), (33, 352, True)):
        call = given("silu_mul", rows.silu_mul(m, count, size, apart=apart))
        label = f"gate, up {[count, size]}" if apart else f"gate_up {[count, 2 * size]}"
        yield FormulaCase("silu_mul", label, call, lambda gate_up, up: (oracle.silu_mul(gate_up, up),))


def _sample(m: Maker) -> Iterator[FormulaCase]:
    """Rows of every filter, alone and together, each with several random numbers; parameters exact in fp32."""
    filters = [(0.0, 0, 1.0, 0.0), (0.75, 0, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.0, 0, 0.875, 0.0)]
    filters += [(1.25, 0, 1.0, 0.0625), (1.5, 50, 0.75, 0.03125)]
    call = given("sample", sampling.sample(m, 36, 1000, filters=filters, integers=torch.int64))
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "offset")
    draws = [Draw(*row) for row in zip(*(call[name].tolist() for name in names), strict=True)]
    logits = call["logits"].tolist()

    def formula(logits: Tensor, **_: Any) -> Results:
        values = oracle.wide(logits)
        taken = [take(row, draw) for row, draw in zip(values, draws, strict=True)]
        tokens = torch.tensor(taken, dtype=torch.int64, device=logits.device)
        return tokens, values.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    def view(results: Results) -> Results:
        """Replaces the tokens by their distance from the right ones, see `sampling.miss`."""
        tokens, logprobs = results
        sampled = zip(tokens.tolist(), torch.tensor(logits, dtype=torch.float64, device="cpu"), draws, strict=True)
        missed = [miss(*row) for row in sampled]
        return torch.tensor(missed, dtype=torch.float32, device=logprobs.device), logprobs

    yield FormulaCase("sample", "logits [36, 1000]", call, formula, view=view)


def _adjust_logits(m: Maker) -> Iterator[FormulaCase]:
    """Rows with two recent tokens each, rows without adjustments, and rows that share tables."""

    def formula(
        logits: Tensor,
        tokens: Tensor,
        starts: Tensor,
        ends: Tensor,
        slots: Tensor,
        bias: Tensor,
        counts: Tensor,
        **penalties: Tensor,
    ) -> Results:
        found = []
        for row, slot in enumerate(slots.tolist()):
            x = oracle.wide(logits[row])
            if slot >= 0:
                repetition, presence, frequency = (each[row] for each in penalties.values())
                recent = tokens[starts[row] : ends[row]]
                generated = counts[slot].div(2, rounding_mode="floor") + recent.bincount(minlength=len(x))
                x = x + bias[slot]
                punished = torch.where(x < 0, x * repetition, x / repetition)
                x = torch.where((counts[slot] % 2 == 1) | (generated > 0), punished, x)
                x = x - presence * (generated > 0) - frequency * generated
            found.append(x)
        return (torch.stack(found),)

    for count, vocab in ((1, 32000), (7, 1000), (33, 65)):
        slots = [-1 if row % 3 == 1 else row // 2 for row in range(count)]
        call = sampling.adjust_logits(m, count, vocab, recent=2, slots=slots)
        yield FormulaCase("adjust_logits", f"logits {[count, vocab]}", given("adjust_logits", call), formula)


def _merge_state(m: Maker) -> Iterator[FormulaCase]:
    """Queries that attended to keys on both sides, on one side, and on none."""

    def formula(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool) -> Results:
        unit = math.log(2) if base2 else 1.0
        sums = torch.stack((a_lse, b_lse)) * unit
        sums = sums.masked_fill(sums == math.inf, -math.inf)
        shares = sums.softmax(0).nan_to_num(0.0).to(a.dtype)[..., None]
        return shares[0] * a + shares[1] * b, sums.logsumexp(0) / unit

    for shape, base2 in (((1, 32, 128), False), ((33, 8, 64), False), ((7, 3, 10), False), ((33, 8, 64), True)):
        call = given("merge_state", rows.merge_state(m, *shape, unseen=True, base2=base2))
        label = f"a {list(shape)}{', base 2' if base2 else ''}"
        judge = partial(formula, base2=base2)
        yield FormulaCase("merge_state", label, call, judge, options={"base2": base2}, view=attention.one_row)
