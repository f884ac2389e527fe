"""The judge passes what is right and no other: what is wrong is never timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.ops.inputs import Inputs
from benchmarks.ops.micro import measure
from benchmarks.ops.peers import EAGER, LIBRARIES, Library, libraries, peers
from benchmarks.ops.registry import OPS, toy_cases
from fastllama import kernels

CPU = torch.device("cpu")
ROUNDED = ("quantize_rows", "rms_norm_int8", "add_rms_norm_int8", "silu_mul_int8")  # to codes
EXACT = ("matmul_w8a8", "F.linear, unquantized", torch.float32)  # sums of codes are: those of fp32 are not near enough
PEERS = [(op, name, dtype) for op in OPS for name in peers(op, CPU) for dtype in (torch.float32, torch.bfloat16)]


def verdict(op: str, function: Callable[[Inputs], Any], dtype: torch.dtype = torch.float32) -> bool:
    """Of every toy case of an op: one, or one of each kind of pages. All are right, or all are wrong."""
    with torch.inference_mode():
        judged = [case.judge(function, CPU) for case in toy_cases(dtype, (op,))]
    (right,) = {error <= bound for error, bound in judged}
    return right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ours_is_right(op: str, dtype: torch.dtype) -> None:
    assert verdict(op, lambda inputs: getattr(kernels, op)(**inputs), dtype)


@pytest.mark.parametrize(("op", "name", "dtype"), [peer for peer in PEERS if peer != EXACT], ids=str)
def test_peers_are_right(op: str, name: str, dtype: torch.dtype) -> None:
    assert verdict(op, peers(op, CPU)[name](), dtype)


@pytest.mark.parametrize("op", [op for op in OPS if op != "sample" and op not in ROUNDED])
def test_a_result_that_is_a_percent_off_is_wrong(op: str) -> None:
    def off(inputs: Inputs) -> Any:
        results = getattr(kernels, op)(**inputs)
        (results[0] if isinstance(results, tuple) else results).mul_(1.01)
        return results

    assert not verdict(op, off)


@pytest.mark.parametrize("op", ROUNDED)
def test_codes_that_are_one_off_are_wrong(op: str) -> None:
    def off(inputs: Inputs) -> Any:
        codes, scales = getattr(kernels, op)(**inputs)
        return codes.sub_(codes.sign()), scales

    assert not verdict(op, off)


def test_pages_are_judged_too() -> None:
    def forgets(inputs: Inputs) -> Any:
        before = inputs["v_pages"].clone()
        out = kernels.rope_and_write_kv(**inputs)
        inputs["v_pages"].copy_(before)
        return out

    assert not verdict("rope_and_write_kv", forgets)


def test_an_output_left_as_it_was_is_wrong() -> None:
    assert not verdict("rms_norm", lambda inputs: inputs["out"])


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_tokens_outside_the_filters_are_wrong(with_logprobs: bool) -> None:
    def least_likely(inputs: Inputs) -> Any:
        tokens = inputs["logits"].argmin(-1)
        logprobs = inputs["logits"].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs if with_logprobs else None

    assert not verdict("sample", least_likely)


def test_log_probabilities_of_other_tokens_are_wrong() -> None:
    def shifted(inputs: Inputs) -> Any:
        tokens, logprobs = kernels.sample(**inputs)
        return tokens, logprobs + 0.01

    assert not verdict("sample", shifted)


def test_what_is_wrong_or_breaks_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(inputs: Inputs) -> Any:
        raise NotImplementedError("no such kernel")

    found = {"wrong": lambda: lambda inputs: inputs["x"], "broken": lambda: breaks}
    monkeypatch.setattr("benchmarks.ops.micro.peers", lambda op, device: found | {"right": lambda: EAGER[op]})
    (case,) = toy_cases(torch.float32, ("rms_norm",))
    contenders = measure(case, CPU, rounds=3)["contenders"]
    assert contenders["broken"] == {"failed": "NotImplementedError: no such kernel"}
    assert contenders["wrong"]["failed"].startswith("wrong: error ")
    for name in ("fastllama", "right"):
        assert len(contenders[name]["eager"]["seconds"]) == 3
        assert "failed" not in contenders[name]
    assert "eager" not in contenders["wrong"]


def test_the_absence_of_a_library_is_named() -> None:
    assert set(libraries()) == {"liger-kernel", "flashinfer-python", "vllm", "flash-attn", "xformers", "gemlite"}
    assert Library("no-such-distribution", "nothing", {}).version() is None


def test_an_installed_library_is_a_peer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("torch", "torch.nn", {"silu_mul": ("functional", lambda module: module.silu)})
    monkeypatch.setattr("benchmarks.ops.peers.LIBRARIES", (library, *LIBRARIES))
    assert peers("silu_mul", torch.device("cuda"))["torch"]() is torch.nn.functional.silu
    assert "torch" not in peers("rms_norm", torch.device("cuda"))
    assert "torch" not in peers("silu_mul", CPU)
