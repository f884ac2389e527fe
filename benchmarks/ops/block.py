"""One decode step of a Llama block, compared with the same block in plain torch.

python -m benchmarks.ops.block [--models llama-2-7b llama-2-70b] [--rows 1 8 64] [--context 512 4096]
    [--quantization int4 int8 none] [--output FILE] [--dry]

On a GPU the steps are captured in a CUDA graph that cycles through copies of the layer, whose weights together are more
than four times the L2 cache. Bytes are the weights as stored, and the keys and values read. Torch's weights are always
bf16: the dequantized values if this project's are quantized. --dry runs a toy shape on a CPU with TRITON_INTERPRET=1,
without graphs: its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.bench.ceilings import ceilings, shares
from fastllama.bench.environment import environment, gpu
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import kept_bytes, random_model
from fastllama.bench.ops import comparison, judge
from fastllama.bench.ops.formulas import EAGER
from fastllama.bench.ops.report import OURS
from fastllama.catalogue.rotary import PAGE
from fastllama.catalogue.sizes import TOY, config_of
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch.device import device_info
from fastllama.kernels.launch.kernel_call import KernelCall
from fastllama.layers.batch import BatchMeta, KVCache, LayerKV
from fastllama.layers.block import LlamaBlock
from fastllama.testing.bounds import error

DTYPE = torch.bfloat16
TORCH = "torch"
KINDS = ("int4", "int8", "none")  # the least known first
COLD = 4  # size of all copies' weights, at least, in L2 caches
SMALL = 1 / 64  # scale of the judged residual stream, small so that it does not hide the block's output
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


@dataclass(frozen=True)
class Step:
    """A decode step through one copy of the layer, by this project's ops and by torch.

    hidden: [B, H], which `ours` updates in place. weights: torch's, by name. keys, values: torch's cache, contiguous
    for each sequence as in Hugging Face's StaticCache, [B, kv_heads, context, D]: nothing is gathered.
    """

    block: LlamaBlock
    hidden: Tensor
    batch: BatchMeta
    kv: LayerKV
    cos_sin: Tensor
    weights: dict[str, Tensor]
    keys: Tensor
    values: Tensor
    slots: Tensor  # where torch's cache takes the new token, [B]

    def exact(self, rows: list[int]) -> Step:
        """The step for some of its rows, for `plain` in fp64 with the dequantized weights."""
        batch = replace(self.batch, positions=self.batch.positions[rows])
        cache = {name: getattr(self, name)[rows].double() for name in ("hidden", "keys", "values")}
        slots = self.slots[: len(rows)]
        return replace(self, batch=batch, slots=slots, weights=weights(self.block, torch.float64), **cache)


def ours(step: Step) -> Tensor:
    """The block of fastllama.layers."""
    hidden: Tensor = step.block(step.hidden, step.batch, step.kv, step.cos_sin)
    return hidden


def plain(step: Step) -> Tensor:
    """The block as Hugging Face writes it, but with one matmul for q, k and v, and one for gate and up."""
    w, keys, values = step.weights, step.keys, step.values
    moved = {
        "qkv": F.linear(_norm(step.hidden, w["input_norm"]), w["qkv"]),
        "cos_sin": step.cos_sin,
        "positions": step.batch.positions,
        "slots": step.slots,
        "k_pages": keys,
        "v_pages": values,
    }
    q = EAGER["rope_and_write_kv"](moved)
    attended = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=q.shape[1] != keys.shape[1])
    hidden = step.hidden + F.linear(attended.flatten(1), w["o"])
    gate_up = F.linear(_norm(hidden, w["post_norm"]), w["gate_up"])
    return hidden + F.linear(EAGER["silu_mul"]({"gate_up": gate_up}), w["down"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = EAGER["rms_norm"]({"x": x, "weight": weight})
    return found


CONTENDERS: dict[str, Callable[[Step], Tensor]] = {OURS: ours, TORCH: plain}


def weights(block: LlamaBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of `plain`."""
    found = {
        "input_norm": block.input_layernorm.weight,
        "qkv": block.self_attn.qkv_proj.weight,
        "o": block.self_attn.o_proj.weight,
        "post_norm": block.post_attention_layernorm.weight,
        "gate_up": block.mlp.gate_up_proj.weight,
        "down": block.mlp.down_proj.weight,
    }
    return {name: weight.detach().to(dtype) for name, weight in found.items()}


def copies(config: LlamaConfig, kind: str, device: torch.device, least: int) -> list[LlamaForCausalLM]:
    """One-layer models of random weights, enough to hold `least` bytes in their layers, and at least one."""
    found: list[LlamaForCausalLM] = []
    while not found or sum(kept_bytes(model.layers[0]) for model in found) < least:
        model = random_model(replace(config, num_hidden_layers=1, vocab_size=TOY.vocab), kind, DTYPE, device)
        found.append(model)
    return found


def steps(models: list[LlamaForCausalLM], rows: int, context: int) -> list[Step]:
    """A step through each copy: `rows` sequences, whose new token is the last of `context`."""
    config, device = models[0].config, models[0].device
    pages = -(-context // PAGE)
    table = torch.randperm(rows * pages, device=device).view(rows, pages)
    last = context - 1
    batch = BatchMeta(
        positions=torch.full((rows,), last, device=device),
        slots=table[:, last // PAGE] * PAGE + last % PAGE,
        page_table=table.int(),
        seq_lens=torch.full((rows,), context, dtype=torch.int32, device=device),
        num_decodes=rows,
        cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=device),
        logits_rows=torch.arange(rows, device=device),
        workspace=models[0].workspace(rows),
    )
    hidden = SMALL * torch.randn(rows, config.hidden_size, dtype=DTYPE, device=device)
    slots = torch.arange(rows, device=device) * context + last
    found = []
    for model in models:
        (kv,) = KVCache.allocate(config, rows * pages, PAGE, DTYPE, device).layers
        runs = [held.normal_()[table].transpose(1, 2).flatten(2, 3) for held in (kv.k_pages, kv.v_pages)]
        keys, values = (run[:, :, :context].contiguous() for run in runs)
        block = model.layers[0]
        found.append(Step(block, hidden, batch, kv, model.cos_sin, weights(block, DTYPE), keys, values, slots))
    return found


def judged(step: Step) -> dict[str, tuple[float, float]]:
    """Error and bound of each contender by the rule of docs/design/numerics.md, in the first and the last row."""
    rows = sorted({0, step.hidden.shape[0] - 1})
    exact, by_torch = plain(step.exact(rows)), plain(step)[rows]
    own = ours(replace(step, hidden=step.hidden.clone()))[rows]
    bound = judge.bound(by_torch, exact)
    return {OURS: (error(own, exact), bound), TORCH: (error(by_torch, exact), bound)}


class _Noting(TorchDispatchMode):
    """Records the launches inside: Triton kernels, and torch ops that compute, each one launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []
        self._in_kernel = False  # the interpreter copies a kernel's arguments by torch's ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastllama":
            with self:  # an op's launches count, not the op
                return OPS[func._opname].run_apart(args)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        nothing = isinstance(result, Tensor) and not result.numel()
        if not (self._in_kernel or func.is_view or name in _ALLOCATIONS or nothing):
            self.noted.append(name)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Launch a kernel; returns None, so that its op cannot replay the launch without this hook."""
        self.noted.append(kernel.__name__)
        self._in_kernel = True
        try:
            kernel[grid](**arguments)
        finally:
            self._in_kernel = False


def launches(call: Callable[[Step], Tensor], step: Step) -> list[str]:
    """Names of a step's launches, in order."""
    noting, made = _Noting(), KernelCall.__init__

    def note(self: KernelCall, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        made(self, {grid: partial(noting.launch, kernel, grid)}, grid, **arguments)

    with mock.patch.object(KernelCall, "__init__", note), _bound(step.hidden.device), noting:
        call(step)
    return noting.noted


@contextmanager
def _bound(device: torch.device) -> Iterator[None]:
    """Context in which every op runs the measured implementation and remembers no call."""
    with ExitStack() as stack:
        for name, op in OPS.items():
            stack.enter_context(op.bound_to(device, comparison.implementation(name, device).run))
        yield


def measure(
    models: list[LlamaForCausalLM], rows: int, context: int, reached: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Figures of one layer at one shape, as JSON values. reached: result of `ceilings`."""
    sets = steps(models, rows, context)
    first, config = sets[0], models[0].config
    read = rows * context * 2 * config.kv_size * DTYPE.itemsize
    moved = {OURS: kept_bytes(first.block), TORCH: sum(weight.nbytes for weight in first.weights.values())}
    found: dict[str, dict[str, Any]] = {}
    ready = {}
    with _bound(first.hidden.device):
        for name, (wrong, bound) in judged(first).items():
            found[name] = {"bytes": moved[name] + read, "error": wrong, "bound": bound}
            if wrong <= bound:
                ready[name] = CONTENDERS[name]
                found[name]["launches"] = launches(CONTENDERS[name], first)
            else:
                found[name]["failed"] = f"wrong: error {wrong:.2g}, bound {bound:.2g}"
        for name, ways in comparison.timed(ready, sets, first.hidden.device, rounds, captured=True).items():
            found[name] |= ways
            for figures in ways.values():
                if "median" in figures:
                    figures |= shares(found[name]["bytes"] / figures["median"], reached)
    return {"rows": rows, "context": context, "copies": len(sets), "contenders": found}


def main() -> int:
    """Measure every shape, print a line and write the file after each; returns 1 if this project's block failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "llama-2-70b"], help="presets of LlamaConfig")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64], help="sequences")
    parser.add_argument("--context", nargs="+", type=int, default=[512, 4096], help="tokens, the new one included")
    parser.add_argument("--quantization", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    parser.add_argument("--dry", action="store_true", help="run a toy shape on a CPU; its times mean nothing")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry walks a toy shape without one")
    device = torch.device("cpu") if options.dry else torch.device("cuda", 0)
    if options.dry:
        options.models, options.rows, options.context = ["toy"], [3], [PAGE + 9]
    with torch.no_grad(), comparison.interpreted(options.dry):
        return _run(options, device)


def _run(options: argparse.Namespace, device: torch.device) -> int:
    torch.manual_seed(0)
    reached = ceilings(device, toy=options.dry)
    record: dict[str, Any] = {
        "benchmark": "block",
        "environment": environment(),
        "conditions": {key: value for key, value in vars(options).items() if key != "output"},
        "ceilings": reached,
        "cases": [],
        "skipped": [],
    }
    least = 1 << 17 if options.dry else COLD * device_info(device).l2_cache + 1
    for name, kind in product(options.models, options.quantization):
        models: list[LlamaForCausalLM] = []  # free the earlier copies first
        try:
            models = copies(replace(config_of(name), max_position_embeddings=max(options.context)), kind, device, least)
        except (MemoryError, torch.OutOfMemoryError):
            record["skipped"].append(f"{name}, {kind}: its weights do not fit in memory")
        except Exception as failure:  # fails for one kind; the others may still run
            record["cases"].append(
                {"model": name, "quantization": kind, "label": f"{name}, {kind}", **_failed(failure)}
            )
        if not models:
            _keep(options, record)
            continue
        for context, rows in product(options.context, options.rows):
            label = f"{name}, {kind}, {rows} rows, {context} tokens of context"
            rounds = 1 if options.dry else comparison.ROUNDS
            try:
                figures = measure(models, rows, context, reached, rounds)
            except torch.OutOfMemoryError:
                record["skipped"].append(f"{label}: does not fit in memory")
                _keep(options, record)
                continue
            except Exception as failure:  # fails for one shape; the others may still run
                figures = {"rows": rows, "context": context, **_failed(failure)}
            record["cases"].append({"model": name, "quantization": kind, "label": label, **figures})
            record["environment"]["gpu_after"] = gpu()
            _keep(options, record)
            print(f"{label}: {_line(figures['contenders'])}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the memory of this shape's graphs
    _keep(options, record)  # also after a failed allocation
    return int(any(_failure(case["contenders"][OURS]) for case in record["cases"]))


def _keep(options: argparse.Namespace, record: dict[str, Any]) -> None:
    if options.output:
        write_record(options.output, record)


def _failed(failure: Exception) -> dict[str, Any]:
    """The result of a case in which this project's block raised; prints the traceback at once."""
    traceback.print_exception(failure)
    return {"contenders": {OURS: {"failed": f"{type(failure).__name__}: {failure}"[:500]}}}


def _failure(contender: dict[str, Any]) -> str | None:
    """The error of a failure: the result, or with graphs the capture."""
    return contender.get("failed") or contender.get("graph", {}).get("failed")


def _line(contenders: dict[str, dict[str, Any]]) -> str:
    said = []
    for name, each in contenders.items():
        if failure := _failure(each):
            said.append(f"{name} failed: {failure}")
        else:
            way = each.get("graph") or each["eager"]
            share = f"{100 * way['of_read']:.0f} % of a read"
            said.append(f"{name} {1e6 * way['median']:.1f} us, {share}, {len(each['launches'])} launches")
    return "; ".join(said)


if __name__ == "__main__":
    sys.exit(main())
