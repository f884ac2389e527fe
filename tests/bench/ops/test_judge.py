"""The judge accepts right results only: a contender that computes something wrong is never timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllama import kernels
from fastllama.bench.ops.comparison import measure
from fastllama.bench.ops.formulas import EAGER
from fastllama.bench.ops.judge import judged
from fastllama.bench.ops.peers import torch_peers
from fastllama.catalogue.arguments import results
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall, toy_calls
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.sizes import TOY

CPU = torch.device("cpu")
ROUNDED = ("quantize_rows", "rms_norm_int8", "add_rms_norm_int8", "silu_mul_int8")  # to int8
EXACT = ("matmul_w8a8", "F.linear, unquantized", torch.float32)  # sums of int8 are exact: fp32's are not near enough
PEERS = [
    (op, name, dtype)
    for op in MEASURED
    for name in torch_peers(op, CPU, "eager")
    for dtype in (torch.float32, torch.bfloat16)
]


def verdict(op: str, function: Callable[[Arguments], Any], dtype: torch.dtype = torch.float32) -> bool:
    """The judge's verdict on every toy case of an op, one per kind of pages: all right, or all wrong."""
    with torch.inference_mode():
        verdicts = [judged(case, function, CPU) for case in toy_calls(dtype, (op,))]
    (right,) = {error <= bound for error, bound in verdicts}
    return right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", MEASURED)
def test_ours_is_right(op: str, dtype: torch.dtype) -> None:
    assert verdict(op, lambda inputs: getattr(kernels, op)(**inputs), dtype)


@pytest.mark.parametrize(("op", "name", "dtype"), [peer for peer in PEERS if peer != EXACT], ids=str)
def test_peers_are_right(op: str, name: str, dtype: torch.dtype) -> None:
    assert verdict(op, torch_peers(op, CPU, "eager")[name](), dtype)


@pytest.mark.parametrize("op", [op for op in MEASURED if op != "sample" and op not in ROUNDED])
def test_a_result_that_is_a_percent_off_is_wrong(op: str) -> None:
    def off(inputs: Arguments) -> Any:
        returned = getattr(kernels, op)(**inputs)
        results(op, inputs, returned)[0].mul_(1.01)
        return returned

    assert not verdict(op, off)


@pytest.mark.parametrize("op", ROUNDED)
def test_quantized_values_that_are_one_off_are_wrong(op: str) -> None:
    def off(inputs: Arguments) -> Any:
        codes, scales = getattr(kernels, op)(**inputs)
        return codes.sub_(codes.sign()), scales

    assert not verdict(op, off)


def test_pages_are_judged_too() -> None:
    def forgets(inputs: Arguments) -> Any:
        before = inputs["v_pages"].clone()
        out = kernels.rope_and_write_kv(**inputs)
        inputs["v_pages"].copy_(before)
        return out

    assert not verdict("rope_and_write_kv", forgets)


def test_an_output_left_as_it_was_is_wrong() -> None:
    assert not verdict("rms_norm", lambda inputs: inputs["out"])


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_tokens_outside_the_filters_are_wrong(with_logprobs: bool) -> None:
    def least_likely(inputs: Arguments) -> Any:
        tokens = inputs["logits"].argmin(-1)
        logprobs = inputs["logits"].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs if with_logprobs else None

    assert not verdict("sample", least_likely)


def test_log_probabilities_of_other_tokens_are_wrong() -> None:
    def shifted(inputs: Arguments) -> Any:
        tokens, logprobs = kernels.sample(**inputs)
        return tokens, logprobs + 0.01

    assert not verdict("sample", shifted)


def test_what_is_wrong_or_breaks_is_named_and_not_timed() -> None:
    def breaks(inputs: Arguments) -> Any:
        raise NotImplementedError("no such kernel")

    found = {"wrong": lambda: lambda inputs: inputs["x"], "broken": lambda: breaks, "right": lambda: EAGER["rms_norm"]}
    (case,) = toy_calls(torch.float32, ("rms_norm",))
    contenders = measure(case, CPU, found, rounds=3)["contenders"]
    assert contenders["broken"] == {"failed": "NotImplementedError: no such kernel"}
    assert contenders["wrong"]["failed"].startswith("wrong: error ")
    for name in ("fastllama", "right"):
        assert len(contenders[name]["eager"]["seconds"]) == 3
        assert "failed" not in contenders[name]
    assert "eager" not in contenders["wrong"]


class Roomy:
    """Stands for a GPU: its tensors are on the CPU, and so many bytes are free."""

    type = "cuda"


def judged_rows(monkeypatch: pytest.MonkeyPatch, case: LlamaCall, free: int) -> list[int]:
    """The rows of every set of inputs that judging makes on a GPU with so many free bytes."""
    made: list[int] = []
    right = LlamaCall.make

    def make(self: LlamaCall, device: torch.device, seed: int, rows: int | None = None) -> Arguments:
        made.append(self.rows if rows is None else rows)
        return right(self, CPU, seed, rows)

    monkeypatch.setattr(LlamaCall, "make", make)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    error, bound = judged(case, lambda inputs: getattr(kernels, case.op)(**inputs), Roomy())  # type: ignore[arg-type]
    assert error <= bound
    return made


def test_no_more_keys_are_made_than_can_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 sequences of 32768 tokens are 40 GiB in bf16: a first set of that size would be one too many."""
    case = LlamaCall("attention_decode", TOY, 6, 128, torch.bfloat16)
    assert judged_rows(monkeypatch, case, 3 * 40 * case.kv_bytes // 6)[0] == 3


def test_no_more_rows_are_judged_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LlamaCall("silu_mul", TOY, 512, 0, torch.bfloat16)
    needed = 40 * case.bytes(case.make(CPU, seed=0))
    assert judged_rows(monkeypatch, case, needed // 2) == [512, 256]


@pytest.mark.parametrize("op", [op for op in MEASURED if op != "sample"])
def test_no_rows_can_be_judged(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ops then move no byte, and the memory was divided by that."""
    case = LlamaCall(op, TOY, 0, 70 if op == "attention_decode" else 0, torch.float32)
    judged_rows(monkeypatch, case, 1 << 30)
