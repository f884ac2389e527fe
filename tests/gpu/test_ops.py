"""Every op on the device: right at odd and at Llama's shapes, capturable in a CUDA graph, never synchronising."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastllama import kernels
from fastllama.bench.ops.comparison import running
from fastllama.bench.ops.judge import copied, judged, written
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall, llama_calls
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.sizes import LLAMA_2, TOY
from fastllama.kernels.dispatch.op import OPS
from fastllama.verify.ops import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),  # of its first use
]

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TRITON = [op for op in MEASURED if OPS[op].has_triton]
MODEL = LLAMA_2[0]

triton_ops = pytest.mark.parametrize("op", TRITON)


def case(op: str, rows: int = 64, dtype: torch.dtype = torch.bfloat16) -> LlamaCall:
    return LlamaCall(op, MODEL, rows, 1024 if op == "attention_decode" else 0, dtype)  # in two splits


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@triton_ops
def test_the_triton_kernel_is_what_runs(op: str) -> None:
    assert kernels.backend_of(DEVICE)[op].backend == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(dtype: torch.dtype) -> None:
    """The cases of `fastllama verify`."""
    assert [row for row in rows(dtype, DEVICE) if not row.ok] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@triton_ops
def test_llamas_shapes(op: str, dtype: torch.dtype) -> None:
    """The benchmarks' shapes: 1 to 8192 rows of every Llama 2, so every launch that the heuristics choose for them."""
    for each in llama_calls(dtype, (op,)):
        with running(op, DEVICE) as function:
            error, bound = judged(each, function, DEVICE)
        assert error <= bound, each.label


@pytest.mark.parametrize("rows", [0, 1, 3])
@triton_ops
def test_few_rows_of_a_small_model(op: str, rows: int) -> None:
    small = LlamaCall(op, TOY, rows, 70 if op == "attention_decode" else 0, torch.float32)
    with running(op, DEVICE) as function:
        error, bound = judged(small, function, DEVICE)
    assert error <= bound


def run(op: str, inputs: Arguments) -> list[torch.Tensor]:
    with running(op, DEVICE) as function:
        return written(inputs, function(inputs))


@triton_ops
def test_captured_and_replayed_with_new_inputs(op: str) -> None:
    """A replayed graph reads its inputs' current values, and gives what an eager call gives, bit for bit."""
    inputs = case(op).make(DEVICE, seed=0)
    run(op, copied(inputs))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(op, inputs)
    for seed in (1, 2):
        fresh = case(op).make(DEVICE, seed)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value.copy_(fresh[name])
        graph.replay()
        for found, expected in zip(results, run(op, fresh), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@triton_ops
def test_nothing_waits_and_nothing_is_allocated(op: str) -> None:
    """With given outputs an op neither synchronises with the host nor allocates memory."""
    inputs = case(op).make(DEVICE, seed=0)
    with running(op, DEVICE) as function:
        function(inputs)  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == before


# rope_and_write_kv writes its rows into pages, at their own slots; a prompt's rows see those before them.
@pytest.mark.parametrize("op", sorted({*TRITON} - {"rope_and_write_kv", "attention_varlen", "attention_prefill"}))
def test_a_row_alone_is_the_row_in_a_batch(op: str) -> None:
    """Bit for bit, whatever else is in the batch; matmuls up to the most rows that the kernel takes."""
    rows = 61 if op in ("matmul", "matmul_int4", "matmul_int8") else 300
    many = case(op, rows=rows).make(DEVICE, seed=0)
    whole = run(op, copied(many))
    for row in (0, 7, rows - 1):
        one = {
            name: value[row : row + 1] if isinstance(value, torch.Tensor) and value.shape[0] == rows else value
            for name, value in copied(many).items()
        }
        for found, expected in zip(run(op, one), whole, strict=True):
            torch.testing.assert_close(found, expected[row : row + 1], rtol=0, atol=0)


@triton_ops
def test_a_call_like_an_earlier_one_gives_what_it_gives_alone(op: str) -> None:
    """Bit for bit: its launches are those of the earlier call with other addresses."""
    first, second = (case(op).make(DEVICE, seed) for seed in (0, 1))
    expected = run(op, copied(second))
    with running(op, DEVICE) as function:
        function(first)
        for found, value in zip(written(second, function(second)), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)


@triton_ops
def test_a_launch_goes_to_the_current_stream(op: str) -> None:
    """The stream is busy for 10 ms or so before the inputs get their values; another stream would read old ones."""
    values, inputs = (case(op).make(DEVICE, seed) for seed in (0, 1))
    expected = run(op, copied(values))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value.copy_(values[name])
        found = run(op, inputs)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
