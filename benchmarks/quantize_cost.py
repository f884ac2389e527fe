"""Time and memory of quantizing a model: estimated, measured on a few blocks, projected for all blocks.

python -m benchmarks.quantize_cost [--shape 1.1b] [--blocks 2] [--samples 32] [--context 512] [--method gptq]
    [--output FILE]

A model of random bf16 weights on the CPU, with `--blocks` blocks of the shape, on documents of random token ids. The
estimate is operations at the rate of a large matmul on this machine, in bf16 for the forward pass and in fp32 for the
rest; it leaves out attention, copies and packing. Python's profiler splits the measured time by function. Peak memory
is measured in a separate process, since watching it slows the timing: the allocation beyond a model of one block.
Linux only: /proc/self/status.
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.weights_memory import MB, Peak
from fastllama import LlamaConfig, LlamaForCausalLM, quantize
from fastllama.bench.ceilings import SHORT, ceilings
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import SHAPES, random_model, shape
from fastllama.layers.block import LlamaBlock
from fastllama.layers.calibration import Calibration
from fastllama.layers.quantization import METHODS, WITHOUT_TEXT
from fastllama.layers.rescaling import LINEARS
from fastllama.quant.activations import SAMPLED, Activations
from fastllama.quant.gptq import feedback_of, gptq
from fastllama.quant.hqq import hqq
from fastllama.quant.rounding import clipped
from fastllama.quant.scaling import STEPS, awq_scales, smoothquant_scales

CPU = torch.device("cpu")
FORWARD, SUMS, CHOLESKY, COLUMNS, SCALES = "forward", "Hessians, magnitudes", "Cholesky", "columns", "scales"
CLIPPING, FITTING, REST = "clipping", "fitting", "rounding, packing, copies"
Documents = list[list[int]]


def main() -> None:
    """Print the estimate, then the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--blocks", type=int, default=2, help="that are quantized (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="documents (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    options = parser.parse_args()
    config = shape(options.shape, options.context)
    torch.manual_seed(0)
    documents = torch.randint(config.vocab_size, (options.samples, options.context)).tolist()

    rates = {SHORT[each]: _rate(each) for each in (torch.bfloat16, torch.float32)}
    operations = operations_of(config, options.samples * options.context, options.method)
    expected = {name: count / rates["bf16" if name == FORWARD else "fp32"] for name, count in operations.items()}
    print(f"Estimated for a block, at {rates['bf16'] / 1e9:.0f} GFLOP/s in bf16 and {rates['fp32'] / 1e9:.0f} in fp32:")
    for name, count in operations.items():
        print(f"  {name:28}{expected[name]:9.2f} s {count / 1e9:12.1f} GFLOP")
    print(f"  {'sum':28}{sum(expected.values()):9.2f} s")
    hessians = hessian_bytes(config) if options.method.endswith("gptq") else {}
    if hessians:
        print(f"  Hessians: {sum(hessians.values()) / MB:.1f} MB, the widest {max(hessians.values()) / MB:.1f}")

    anonymous = alone(peak, config, documents, options.method)
    seconds = measured(config, options.blocks, documents, options.method)
    block, layers = sum(seconds.values()), config.num_hidden_layers
    print(f"Measured, for a block, the mean of {options.blocks}:")
    for name, each in seconds.items():
        print(f"  {name:28}{each:9.2f} s")
    print(f"  {'sum':28}{block:9.2f} s")
    print(f"Estimated from that for all {layers} blocks: {layers * block:.0f} s")
    print(f"Peak memory beyond the model: {anonymous / MB:.0f} MB")
    if options.output:
        conditions = {key: value for key, value in vars(options).items() if key != "output"} | {"dtype": "bfloat16"}
        figures = {
            "operations_of_a_block": operations,
            "operations_per_second": rates,
            "estimated_seconds_of_a_block": expected,
            "hessian_bytes": hessians,
            "seconds_of_a_block": seconds,
            "estimated_seconds_of_all_blocks": layers * block,
            "peak_bytes": anonymous,
        }
        record = {"benchmark": "quantize_cost", "environment": environment(), "conditions": conditions}
        write_record(options.output, record | figures)


def _rate(dtype: torch.dtype) -> float:
    return float(ceilings(CPU, dtype=dtype)[f"{SHORT[dtype]}_flops_per_second"])


def _sizes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of a block's weights."""
    block = LlamaBlock(config, torch.bfloat16, torch.device("meta"))
    shapes = {name: block.get_parameter(f"{name}.weight").shape for name in LINEARS}
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}


def operations_of(config: LlamaConfig, tokens: int, method: str) -> dict[str, float]:
    """Returns the multiplications and additions of a block's matmuls over that many tokens, by part."""
    sizes = _sizes(config).values()
    weights = sum(rows * columns for rows, columns in sizes)
    found: dict[str, float] = {}
    if method not in WITHOUT_TEXT:
        found[FORWARD] = 2 * tokens * weights
    if method.startswith(("awq", "smoothquant")):
        found[SCALES] = STEPS * 2 * min(tokens, SAMPLED) * weights
    if method.endswith("gptq"):
        found[SUMS] = sum(2 * tokens * columns**2 for _, columns in sizes)
        found[CHOLESKY] = sum(columns**3 / 3 for _, columns in sizes)
        found[COLUMNS] = sum(rows * columns**2 for rows, columns in sizes)
    return found


def hessian_bytes(config: LlamaConfig) -> dict[str, int]:
    """Returns the bytes of the Hessian of each layer of a block, in fp32."""
    return {name: 4 * columns**2 for name, (_, columns) in _sizes(config).items()}


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """Calls a function in a new process and returns its result."""
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        return processes.submit(function, *given).result()


def peak(config: LlamaConfig, documents: Documents, method: str) -> int:
    """Returns the peak of allocated bytes beyond a model of one block."""
    model = _model(config, 1, method)
    watch = Peak()
    try:
        _quantize(model, documents, method)
    finally:
        anonymous, _ = watch.end()
    return anonymous


def measured(config: LlamaConfig, blocks: int, documents: Documents, method: str) -> dict[str, float]:
    """Returns the seconds of a block by part, the mean over `blocks`."""
    model = _model(config, blocks, method)
    profile = cProfile.Profile()
    begin = time.perf_counter()
    with profile:
        _quantize(model, documents, method)
    seconds = time.perf_counter() - begin
    within = {entry.code: entry.totaltime for entry in profile.getstats()}

    def spent(function: Callable[..., Any]) -> float:
        return within.get(inspect.unwrap(function).__code__, 0.0)

    found = {
        FORWARD: spent(Calibration.run) - spent(Activations.add),
        SUMS: spent(Activations.add),
        SCALES: spent(awq_scales) + spent(smoothquant_scales),
        CLIPPING: spent(clipped),
        CHOLESKY: spent(feedback_of),
        COLUMNS: spent(gptq) - spent(feedback_of),
        FITTING: spent(hqq),
    }
    found[REST] = seconds - sum(found.values())
    return {name: each / blocks for name, each in found.items() if each}


def _model(config: LlamaConfig, blocks: int, method: str) -> LlamaForCausalLM:
    """A model of random weights, after everything that quantizing compiles or loads at first use."""
    small = random_model(replace(shape("tiny", 8), num_hidden_layers=1), "none", torch.bfloat16, CPU)
    _quantize(small, [[1] * 8], method)
    return random_model(replace(config, num_hidden_layers=blocks), "none", torch.bfloat16, CPU)


def _quantize(model: LlamaForCausalLM, documents: Documents, method: str) -> None:
    quantize(model, METHODS[method][0], method, documents=documents, progress=False)


if __name__ == "__main__":
    main()
