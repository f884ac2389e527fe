"""The catalogue's calls of a Llama: all ops, legal inputs, and bytes and operations counted by hand."""

from __future__ import annotations

import pytest
import torch

from fastllama import kernels
from fastllama.catalogue.arguments import results
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall, llama_calls, toy_calls
from fastllama.catalogue.sizes import LLAMA_2, TOY
from fastllama.kernels.dispatch.op import OPS

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def test_every_op_is_measured() -> None:
    assert {*MEASURED, "matmul_bf12"} == set(
        OPS
    )  # LLM keeps weights in 12 bits on CPUs alone: benchmarks/cpu/matmul.py
    assert {case.op for case in llama_calls(BF16)} == set(MEASURED)
    assert list(dict.fromkeys(case.op for case in toy_calls(BF16))) == list(MEASURED)
    toys, llamas = ({(case.op, case.pages_dtype) for case in calls} for calls in (toy_calls(BF16), llama_calls(BF16)))
    assert toys == llamas


def test_the_most_valuable_comes_first() -> None:
    found = list(llama_calls(BF16))
    assert (found[0].op, found[0].sizes.name, found[0].rows) == ("add_rms_norm", "llama-2-7b", 8192)
    assert len(set(found)) == len(found)
    for op in MEASURED:
        models = [case.sizes.name for case in found if case.op == op]
        assert models[0] == "llama-2-7b"
        assert set(models) == {model.name for model in LLAMA_2}
        assert len(models) % 3 == 0, "a shape is measured for one model and not for another"
    assert [case.op for case in llama_calls(BF16, ("rope",))] == ["rope"] * 12


@pytest.mark.parametrize("op", ["matmul", "matmul_int4", "matmul_int8", "matmul_w8a8"])
def test_matmuls_are_measured_from_one_row_to_a_prompt(op: str) -> None:
    rows = [case.rows for case in llama_calls(BF16, (op,)) if case.sizes.name == "llama-2-7b"]
    assert rows[:4] == [1, 64, 16, 1024]
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024} <= set(rows)


# x, residual, out and the sum of 5 rows, and a weight, of 64 bf16; and so on
BYTES = {
    "add_rms_norm": 4 * 5 * 64 * 2 + 64 * 2,
    "rms_norm": 2 * 5 * 64 * 2 + 64 * 2,
    "rope_and_write_kv": 5 * (2 * (4 + 2 * 2) * 16 * 2 + 16 * 4 + 8 + 8),
    "rope": 5 * (2 * (4 + 2) * 16 * 2 + 16 * 4 + 8),
    "write_kv": 5 * (2 * 2 * 2 * 16 * 2 + 8),  # keys and values, read and written, of two heads, and a slot
    "silu_mul": 5 * 3 * 96 * 2,
    "sample": 5 * (128 * 2 + 3 * 4 + 4 + 2 * 8 + 8 + 4),
    "adjust_logits": 5 * (128 * (2 + 4 + 4 + 4) + 4 * 8 + 3 * 4),
    "merge_state": 5 * 4 * 3 * (16 * 2 + 4),
    "attention_decode": 5 * (2 * 4 * 16 * 2 + 2 * 128 * 2 * 16 * 2 + 2 * 4 + 4),
    "attention_varlen": 5 * (2 * 4 + 2 * 2) * 16 * 2 + 2 * 2 * 4,
    "attention_prefill": 5 * 2 * 4 * 16 * 2 + 2 * 64 * 2 * 16 * 2 + 4 + 4 + 8,
    "matmul": (5 * 64 + 192 * 64 + 5 * 192) * 2,
    "matmul_int4": 5 * 64 * 2 + 192 * 128 // 2 + 192 * 2 + 5 * 192 * 2,  # values are padded to 128 columns
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


@pytest.mark.parametrize("op", MEASURED)
def test_bytes_and_operations(op: str) -> None:
    case = LlamaCall(op, TOY, 5, 128 if op == "attention_decode" else 0, BF16)
    assert case.bytes(case.make(CPU, seed=0)) == BYTES[op]
    assert case.flops == FLOPS.get(op, 0)


def test_quantized_pages_are_half_the_bytes_and_their_scales() -> None:
    case = LlamaCall("attention_decode", TOY, 5, 128, BF16, torch.int8)
    assert case.bytes(case.make(CPU, seed=0)) == 5 * (2 * 4 * 16 * 2 + 2 * 128 * 2 * (16 + 4) + 2 * 4 + 4)
    assert case.label == "toy, 5 rows, 128 tokens of context, int8 pages"


@pytest.mark.parametrize("op", MEASURED)
def test_inputs_are_legal_and_every_output_is_written(op: str) -> None:
    for case in toy_calls(torch.float32, (op,)):
        inputs = case.make(CPU, seed=0)
        for result in results(op, inputs, getattr(kernels, op)(**inputs)):
            assert any(result is value for value in inputs.values()), "an output was not given"
            if result.dtype.is_floating_point:
                assert result.isfinite().all()
            else:
                some = result < torch.iinfo(result.dtype).max
                assert (some.any(-1) if result.dtype == torch.int8 else some).all()  # 127 is a value too


def test_seeds_make_other_inputs_and_the_same_again() -> None:
    (case,) = toy_calls(torch.float32, ("rms_norm",))
    first, again, other = (case.make(CPU, seed)["x"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("pages_dtype", [None, torch.int8])
def test_keys_and_values_are_counted_before_they_are_made(pages_dtype: torch.dtype | None) -> None:
    case = LlamaCall("attention_decode", TOY, 5, 70, BF16, pages_dtype)
    inputs = case.make(CPU, seed=0)
    assert case.kv_bytes == sum(
        value.nbytes for name, value in inputs.items() if name.startswith(("k_", "v_")) and value is not None
    )
    assert LlamaCall("rope", TOY, 5, 0, BF16).kv_bytes == 0
