"""The registry: all ops, legal inputs, and bytes and operations counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ops import inputs as inputs_module
from benchmarks.ops.inputs import Inputs, Maker
from benchmarks.ops.registry import LLAMA_2, OPS, TOY, Case, cases, toy_cases
from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS as BOUND

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def test_every_op_is_measured() -> None:
    assert {*OPS, "matmul_bf12"} == set(BOUND)  # LLM keeps weights in 12 bits on CPUs alone: benchmarks/cpu/matmul.py
    assert {case.op for case in cases(BF16)} == set(OPS)
    assert list(dict.fromkeys(case.op for case in toy_cases(BF16))) == list(OPS)
    assert {(case.op, case.codes) for case in toy_cases(BF16)} == {(case.op, case.codes) for case in cases(BF16)}


def test_the_most_valuable_comes_first() -> None:
    found = list(cases(BF16))
    assert (found[0].op, found[0].model.name, found[0].rows) == ("add_rms_norm", "llama-2-7b", 8192)
    assert len(set(found)) == len(found)
    for op in OPS:
        models = [case.model.name for case in found if case.op == op]
        assert models[0] == "llama-2-7b"
        assert set(models) == {model.name for model in LLAMA_2}
        assert len(models) % 3 == 0, "a shape is measured for one model and not for another"
    assert [case.op for case in cases(BF16, ("rope",))] == ["rope"] * 12


@pytest.mark.parametrize("op", ["matmul", "matmul_int4", "matmul_int8", "matmul_w8a8"])
def test_products_are_measured_from_one_row_to_a_prompt(op: str) -> None:
    rows = [case.rows for case in cases(BF16, (op,)) if case.model.name == "llama-2-7b"]
    assert rows[:4] == [1, 64, 16, 1024]
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024} <= set(rows)


# x, residual, out and the sum of 5 rows, and a weight, of 64 bf16; and so on
BYTES = {
    "add_rms_norm": 4 * 5 * 64 * 2 + 64 * 2,
    "rms_norm": 2 * 5 * 64 * 2 + 64 * 2,
    "rope_and_write_kv": 5 * (2 * (4 + 2 * 2) * 16 * 2 + 16 * 4 + 8 + 8),
    "rope": 5 * (2 * (4 + 2) * 16 * 2 + 16 * 4 + 8),
    "silu_mul": 5 * 3 * 96 * 2,
    "sample": 5 * (128 * 2 + 3 * 4 + 4 + 2 * 8 + 8 + 4),
    "merge_state": 5 * 4 * 3 * (16 * 2 + 4),
    "attention_decode": 5 * (2 * 4 * 16 * 2 + 2 * 128 * 2 * 16 * 2 + 2 * 4 + 4),
    "attention_varlen": 5 * (2 * 4 + 2 * 2) * 16 * 2 + 2 * 2 * 4,
    "attention_prefill": 5 * 2 * 4 * 16 * 2 + 2 * 64 * 2 * 16 * 2 + 4 + 4 + 8,
    "matmul": (5 * 64 + 192 * 64 + 5 * 192) * 2,
    "matmul_int4": 5 * 64 * 2 + 192 * 128 // 2 + 192 * 2 + 5 * 192 * 2,  # codes are padded to 128 columns
    "matmul_int8": 5 * 64 * 2 + 192 * 128 + 192 * 2 + 5 * 192 * 2,
    "quantize_rows": 5 * (64 * 2 + 64 + 4),
    "rms_norm_int8": 5 * (64 * 2 + 64 + 4) + 64 * 2,
    "add_rms_norm_int8": 5 * (2 * 64 * 2 + 64 + 4) + 64 * 2,
    "silu_mul_int8": 5 * (2 * 96 * 2 + 96 + 4),
    "matmul_w8a8": 5 * (64 + 4) + 192 * 128 + 192 * 2 + 5 * 192 * 2,
    "embedding": 5 * (8 + 2 * 64 * 2),
}
FLOPS = {
    "matmul": 2 * 5 * 64 * 192,
    "matmul_int4": 2 * 5 * 64 * 192,
    "matmul_int8": 2 * 5 * 64 * 192,
    "matmul_w8a8": 2 * 5 * 64 * 192,
    "attention_decode": 4 * 4 * 16 * 5 * 128,
    "attention_varlen": 4 * 4 * 16 * (1 + 2 + 3 + 4 + 5),
    "attention_prefill": 4 * 4 * 16 * (1 + 2 + 3 + 4 + 5),
}


@pytest.mark.parametrize("op", OPS)
def test_bytes_and_operations(op: str) -> None:
    case = Case(op, TOY, 5, 128 if op == "attention_decode" else 0, BF16)
    assert case.bytes(case.make(CPU, seed=0)) == BYTES[op]
    assert case.flops == FLOPS.get(op, 0)


def test_quantized_pages_are_half_the_bytes_and_their_scales() -> None:
    case = Case("attention_decode", TOY, 5, 128, BF16, torch.int8)
    assert case.bytes(case.make(CPU, seed=0)) == 5 * (2 * 4 * 16 * 2 + 2 * 128 * 2 * (16 + 4) + 2 * 4 + 4)
    assert case.label == "toy, 5 rows, 128 tokens of context, int8 pages"


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_legal_and_every_output_is_written(op: str) -> None:
    for case in toy_cases(torch.float32, (op,)):
        inputs = case.make(CPU, seed=0)
        results = getattr(kernels, op)(**inputs)
        for result in results if isinstance(results, tuple) else (results,):
            assert any(result is value for value in inputs.values()), "an output was not given"
            if result.dtype.is_floating_point:
                assert result.isfinite().all()
            else:
                some = result < torch.iinfo(result.dtype).max
                assert (some.any(-1) if result.dtype == torch.int8 else some).all()  # the largest is a code too


def test_seeds_make_other_inputs_and_the_same_again() -> None:
    (case,) = toy_cases(torch.float32, ("rms_norm",))
    first, again, other = (case.make(CPU, seed)["x"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("codes", [None, torch.int8])
def test_keys_and_values_are_counted_before_they_are_made(codes: torch.dtype | None) -> None:
    case = Case("attention_decode", TOY, 5, 70, BF16, codes)
    inputs = case.make(CPU, seed=0)
    assert case.kv_bytes == sum(inputs[name].nbytes for name in inputs if name.startswith(("k_", "v_")))
    assert Case("rope", TOY, 5, 0, BF16).kv_bytes == 0


class Roomy:
    """A stand-in for a GPU: tensors lie on the CPU, and so many bytes are free."""

    type = "cuda"


def judged_rows(monkeypatch: pytest.MonkeyPatch, case: Case, free: int) -> list[int]:
    """Of every set of inputs that judging makes on a GPU of so many free bytes, the rows."""
    made: list[int] = []
    right = Case.make

    def make(self: Case, device: torch.device, seed: int, rows: int | None = None) -> Inputs:
        made.append(self.rows if rows is None else rows)
        return right(self, CPU, seed, rows)

    monkeypatch.setattr(Case, "make", make)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    error, bound = case.judge(lambda inputs: getattr(kernels, case.op)(**inputs), Roomy())  # type: ignore[arg-type]
    assert error <= bound
    return made


def test_no_more_keys_are_made_than_can_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 sequences of 32768 tokens are 40 GiB in bf16: a first set of that size would be one too many."""
    case = Case("attention_decode", TOY, 6, 128, BF16)
    assert judged_rows(monkeypatch, case, 3 * 40 * case.kv_bytes // 6)[0] == 3


@pytest.mark.parametrize("op", [op for op in OPS if op != "sample"])
def test_no_rows_can_be_judged(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ops move no byte then, by which memory was divided."""
    case = Case(op, TOY, 0, 70 if op == "attention_decode" else 0, torch.float32)
    judged_rows(monkeypatch, case, 1 << 30)


def test_numbers_are_drawn_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than it may be, and all are other numbers."""
    monkeypatch.setattr(inputs_module, "DRAWN", 40)
    drawn: list[int] = []
    right = torch.randn

    def randn(shape: torch.Size, **options: Any) -> torch.Tensor:
        drawn.append(shape.numel())
        return right(shape, **options)

    monkeypatch.setattr(torch, "randn", randn)
    maker = Maker(TOY, 7, 0, None, torch.float32, CPU, torch.Generator().manual_seed(0))
    numbers = maker.normal(7, 16)
    assert drawn == [32, 32, 32, 16]
    assert len(numbers.unique()) == 7 * 16
    assert maker.normal(0, 16).shape == (0, 16)
