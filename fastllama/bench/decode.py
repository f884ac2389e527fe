"""Measures decode steps of the runtime, compared with the bytes that they read and with transformers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from fastllama.arithmetic import ceil_div
from fastllama.bench import models, peers, static_cache, trace
from fastllama.bench.ceilings import bandwidths, shares
from fastllama.bench.decode_report import rate
from fastllama.bench.environment import environment
from fastllama.bench.estimate import Rates, Work, largest_shape
from fastllama.errors import check_choice, check_range
from fastllama.io.load import load_model, open_model, resolve_device, resolve_dtype
from fastllama.layers import packing
from fastllama.layers.batch import KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import NONE, WORDS, quantization_of
from fastllama.runtime.llm import LLM
from fastllama.runtime.options import KV_DTYPES
from fastllama.runtime.params import SamplingParams

OURS = "fastllama"
UNCOUNTED = 4  # warm-up steps: torch.compile records its graphs in the third
TRACED = 3  # traced steps at the end, on a GPU
PAGE = 64
DEFAULTS = {"cpu": ((1, 8), (512,)), "cuda": ((1, 8, 32, 128), (512, 4096))}  # batch sizes and context lengths

Record = dict[str, Any]
Step = Callable[[], object]
Contender = tuple[str, str, Callable[[], Any], Callable[[Any, int, int], Record]]


@dataclass(frozen=True)
class DecodeOptions:
    """Options: every quantization is measured at every batch size and context. Raises ValueError for illegal ones.

    model: one of models.SHAPES, with random weights; with `checkpoint`, a model as for LLM. None is a shape that fits
    the machine: 7b on a GPU if possible, on a CPU the largest that takes some minutes. quantization: of
    quantization.WORDS. kv_cache_dtype, deterministic: as for LLM. batch: sequences. context: tokens of each at the end;
    both default to DEFAULTS. tokens: measured steps. peers: whether to measure transformers, which needs CUDA.
    """

    model: str | None = None
    checkpoint: bool = False
    dtype: str = "auto"
    device: str = "auto"
    quantization: tuple[str, ...] = (NONE,)
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    batch: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    tokens: int = 128
    peers: bool = True

    def __post_init__(self) -> None:
        if not self.checkpoint and self.model is not None:
            check_choice("shape", self.model, models.SHAPES)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        for kind in self.quantization:
            check_choice("quantization", kind, WORDS)
        for rows in self.batch:
            check_range("batch", rows, 1)
        check_range("tokens", self.tokens, 1)
        for length in self.context:
            check_range(f"context beside {self.tokens} tokens", length, self.steps + 2)

    @property
    def steps(self) -> int:
        """Steps of one case, warm-up and traced ones included."""
        return UNCOUNTED + self.tokens + TRACED


@dataclass(frozen=True)
class _Bench:
    """The resolved options, with the device, dtype and configuration."""

    options: DecodeOptions
    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, options: DecodeOptions, say: Callable[[str], None]) -> _Bench:
        """Resolve the options and report the expected cost. ValueError where machine or checkpoint cannot run them."""
        device = resolve_device(options.device)
        batch, context = DEFAULTS[device.type]
        if options.checkpoint:
            assert options.model is not None
            checkpoint, _ = open_model(options.model)
            config, limit = checkpoint.config, checkpoint.config.longest_context
            if (kept := checkpoint.quantization) is not None:  # "none" leaves the weights unchanged
                found = dict.fromkeys(kept if kind == NONE else kind for kind in options.quantization)
                options = replace(options, quantization=tuple(found))
                for kind in found:
                    check_choice(f"quantization of a checkpoint in {kept}", kind, (NONE, kept))
            context = context if limit is None else tuple(dict.fromkeys(min(n, limit) for n in context))
            check_range("context", max(options.context or context), 1, limit)
        else:
            config = models.shape(options.model or "tiny", max(options.context or context))
        dtype = resolve_dtype(options.dtype, config)
        for kind in options.quantization:
            packing.check(quantization_of(kind), dtype, device)
        options = replace(options, batch=options.batch or batch, context=options.context or context)
        bench = cls(options, config, dtype, device)
        rates = Rates.of(dtype) if device.type == "cpu" else None
        if options.model is None:
            name = largest_shape(device, lambda name: bench.at(name).work(), rates)
            bench = bench.at(name)
            say(f"no --shape is given: {name} is the largest for this {'GPU' if rates is None else 'CPU'}")
        say(f"{bench.options.model}: {bench.work().describe(rates)}")
        return bench

    def at(self, shape: str) -> _Bench:
        """The same with random weights of another shape."""
        config = models.shape(shape, max(self.options.context))
        return replace(self, options=replace(self.options, model=shape), config=config)

    def work(self) -> Work:
        """The estimated work of all our cases."""
        said = self.options
        return Work.of(self.config, self.dtype, self.kv_dtype, said.quantization, said.batch, said.context, said.steps)

    def build(self, kind: str) -> LlamaForCausalLM:
        """The model with weights in quantization `kind`. Raises MemoryError where they do not fit."""
        torch.manual_seed(0)
        if not self.options.checkpoint:
            return models.random_model(self.config, kind, self.dtype, self.device)
        assert self.options.model is not None
        takes: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "quantization": quantization_of(kind)}
        return load_model(self.options.model, progress=False, **takes)

    def prompts(self, batch: int, context: int) -> list[list[int]]:
        """Random ids, so that sequences share no pages, of a length at which the last step reaches `context`."""
        length, generator = context - self.options.steps - 1, random.Random(0)
        return [[generator.randrange(3, self.config.vocab_size) for _ in range(length)] for _ in range(batch)]

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of our KV pages."""
        return KV_DTYPES[self.options.kv_cache_dtype] or self.dtype

    def kv_bytes(self, batch: int, context: int, dtype: torch.dtype) -> float:
        """Average bytes of keys and values, in a dtype, that a timed step reads."""
        before = context - self.options.steps - 1 + UNCOUNTED
        keys = before + (self.options.tokens + 1) / 2  # the k-th step reads its own token, too: before + k
        return batch * keys * KVCache.bytes_per_token(self.config, dtype)

    def ours(self, model: LlamaForCausalLM, batch: int, context: int) -> Record:
        """Measure one of our cases: through the engine, with just enough pages for the sequences."""
        kept = batch * ceil_div(context, PAGE) * PAGE
        models.check_memory("keys and values", kept * KVCache.bytes_per_token(self.config, self.kv_dtype), self.device)
        prompts = self.prompts(batch, context)
        with LLM(
            model,
            quantization=None,
            max_model_len=context,
            kv_cache_tokens=kept,
            kv_cache_dtype=self.options.kv_cache_dtype,
            deterministic=self.options.deterministic,
            page_size=PAGE,
            max_num_seqs=batch,
            max_num_batched_tokens=max(2048, batch * PAGE),  # the prompts' partial last pages fit in one step
            progress=False,
        ) as llm:
            # Prompts run first, so that their full pages are cached and all sequences then start in the same step.
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            params = SamplingParams(temperature=0, max_tokens=1 + self.options.steps, ignore_eos=True)
            for prompt in prompts:
                llm.engine.add_request(prompt, params)

            def step() -> None:
                advanced = len(llm.engine.step())
                if advanced != batch:
                    raise RuntimeError(f"a step advanced {advanced} of {batch} sequences")

            step()
            return self.timed(step, models.read_bytes(model), self.kv_bytes(batch, context, self.kv_dtype), batch)

    def build_theirs(self) -> Any:
        """transformers' model of the same shape. Raises MemoryError where it does not fit."""
        models.check_memory("the weights", models.kept_bytes(self.their_weights()), self.device)
        return static_cache.load(self.config, self.device)

    def their_weights(self) -> LlamaForCausalLM:
        """A model of transformers' size on meta, to count bytes."""
        return LlamaForCausalLM(self.config, static_cache.DTYPE, "meta")

    def theirs(self, model: Any, batch: int, context: int) -> Record:
        """Measure one of transformers' cases."""
        forward = static_cache.compiled(model)
        models.release(self.device)  # functions compiled for the last case held its graphs
        kept = batch * context * KVCache.bytes_per_token(self.config, static_cache.DTYPE)
        models.check_memory("keys and values", kept, self.device)
        step = static_cache.decoder(model, forward, self.prompts(batch, context), context)
        kv_bytes = self.kv_bytes(batch, context, static_cache.DTYPE)
        return self.timed(step, models.read_bytes(self.their_weights()), kv_bytes, batch)

    def timed(self, step: Step, weight_bytes: int, kv_bytes: float, batch: int) -> Record:
        """Times of the measured steps, and figures common to all contenders."""
        for _ in range(UNCOUNTED):
            step()
        seconds = []
        for _ in range(self.options.tokens):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        launched = trace.launches(step, TRACED) if self.device.type == "cuda" else []
        return {
            "weight_bytes": weight_bytes,
            "kv_bytes": kv_bytes,
            "seconds": seconds,
            "tokens_per_second": batch * len(seconds) / sum(seconds),
            "bytes_per_second": (weight_bytes + kv_bytes) * len(seconds) / sum(seconds),
            "launches": launched,
        }


def measure(options: DecodeOptions, say: Callable[[str], None], keep: Callable[[Record], None]) -> Record:
    """Run all cases; returns the record for JSON and for `decode_report.report`.

    `say`: called with a progress line. `keep`: called with the partial record after each case. Cases that do not fit in
    memory are listed in "skipped"; a case's exception is in its "failed".
    Raises the errors of LLM, ValueError where a context is longer than the checkpoint's.
    """
    bench = _Bench.of(options, say)
    options, device = bench.options, bench.device
    say("copying and reading")
    resolved = {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": str(device),
        "parameters": bench.their_weights().num_parameters,
        "threads": torch.get_num_threads(),
    }
    record: Record = {
        "benchmark": "decode",
        "environment": environment(device),
        "conditions": asdict(options) | resolved,
        "ceilings": bandwidths(device),
        "cases": [],
        "skipped": [],
        "absent": {},
    }
    models.release(device)
    for name, kind, build, run in _contenders(bench, record):
        label = f"{name}, {kind}"
        say(f"{label}: making the model")
        try:
            model = build()
        except (MemoryError, torch.OutOfMemoryError) as failure:
            record["skipped"].append(f"{label}: {_reason(failure)}")
            keep(record)
            models.release(device)
            continue
        for context, batch in product(options.context, options.batch):
            case = {"name": name, "quantization": kind, "batch": batch, "context": context}
            said = f"{label}, batch {batch}, context {context}"
            try:
                figures = run(model, batch, context)
                figures |= shares(figures["bytes_per_second"], record["ceilings"])
            except (MemoryError, torch.OutOfMemoryError) as failure:
                record["skipped"].append(f"{said}: {_reason(failure)}")
                keep(record)
                continue
            except Exception as failure:  # a failing case must not end the others
                figures = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
            finally:
                models.release(device)
            record["cases"].append(case | figures)
            say(f"{said}: {figures['failed'] if 'failed' in figures else rate(figures)}")
            keep(record)
        del model
        models.release(device)
    keep(record)
    return record


def _contenders(bench: _Bench, record: Record) -> Iterator[Contender]:
    """Yields name, quantization, a function that builds the model, and one that measures a case with it."""
    for kind in bench.options.quantization:
        yield OURS, kind, partial(bench.build, kind), bench.ours
    if bench.options.peers:
        why = peers.missing() or ("measured on CUDA only" if bench.device.type != "cuda" else None)
        if why:
            record["absent"][static_cache.NAME] = why
        else:
            yield static_cache.NAME, NONE, bench.build_theirs, bench.theirs


def _reason(failure: BaseException) -> str:
    return str(failure) if isinstance(failure, MemoryError) else "does not fit in memory"
