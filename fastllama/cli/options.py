"""Options that several subcommands share: which model, on what, and how its tokens are drawn."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllama.layers.quantization import WORDS, quantization_of
from fastllama.runtime.outputs import CompletionOutput
from fastllama.runtime.params import SamplingParams

if TYPE_CHECKING:
    from fastllama.io.tokenizer import Tokenizer
    from fastllama.runtime.llm import LLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --tokenizer, --dtype, --device."""
    group = parser.add_argument_group("model")
    add_model_option(group)
    group.add_argument("--tokenizer", metavar="T", help="tokenizer file or folder (default: the one with the model)")
    add_place_options(group)


def add_model_option(group: argparse._ArgumentGroup) -> None:
    """--model."""
    group.add_argument(
        "--model",
        default="tiny",
        metavar="M",
        help="'tiny' (packaged, the default), a Hugging Face or Meta folder, a llama2.c file, or a Hub id owner/name",
    )


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """--dtype, --device."""
    group.add_argument(
        "--dtype", default="auto", metavar="D", help="float32, bfloat16, float16 (default: the checkpoint's own)"
    )
    group.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there)")


def add_quantize_option(parser: argparse.ArgumentParser) -> None:
    """--quantize."""
    parser.add_argument(
        "--quantize",
        choices=("auto", *WORDS),
        default="auto",
        help="int4, int8: weights rounded to so many bits; w8a8: activations to 8 as well; bf12: bf16 in 12 bits "
        "without loss (default: where that is faster)",
    )


def add_runtime_options(parser: argparse.ArgumentParser, *, speculation: bool = True) -> None:
    """--kv-cache-dtype, --deterministic, and what guesses tokens, unless each step is to give one."""
    add = parser.add_argument_group("runtime").add_argument
    add(
        "--kv-cache-dtype",
        choices=("auto", "int8", "fp8"),
        default="auto",
        help="int8, fp8: keys and values in 8 bits (default: as the model computes)",
    )
    add("--deterministic", action="store_true", help="the same bits, whatever else runs beside a request")
    if speculation:
        add(
            "--speculation",
            metavar="S",
            help="guess tokens, and verify several at once: 'prompt_lookup' guesses from the text, a model (given as "
            "--model is) by itself (default: no guesses)",
        )
        add("--num-draft-tokens", type=int, default=3, metavar="N", help="guesses at once, 1 to 7 (default 3)")


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of add_runtime_options, as LLM takes them."""
    names = ("kv_cache_dtype", "deterministic", "speculation", "num_draft_tokens")
    return {name: getattr(args, name) for name in names if name in args}


def quantization(args: argparse.Namespace) -> str | None:
    """The option of add_quantize_option, as LLM takes it."""
    return quantization_of(args.quantize)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, how many, and where they end; the context length, which bounds them too."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="tokens to generate at most (default 256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default 0: all)")
    add("--top-p", type=float, default=0.95, metavar="P", help="draw from this much probability (default 0.95; 1: all)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="least share of the likeliest's probability (default 0)",
    )
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text (default 0)")
    add("--stop", action="append", default=[], metavar="S", help="end before this text; may be given several times")
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together (default: the model's)")


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """The sampling options, checked: what SamplingParams refuses is refused before a model is loaded."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return SamplingParams(**{name: getattr(args, name) for name in names} | more)


@dataclass(frozen=True)
class Loaded:
    """A model that can answer in text: its runtime, what runs its ops ("8 triton, 3 reference"), seconds it took."""

    name: str
    llm: LLM
    tokenizer: Tokenizer
    backend: str
    seconds: float

    def describe(self) -> str:
        """One line of statistics."""
        model = self.llm.engine.model
        size, dtype = model.num_parameters, str(model.dtype).split(".")[1]
        weights = "" if self.llm.quantization is None else f", weights in {self.llm.quantization}"
        conditions = f"{dtype}{weights} on {model.device} (ops: {self.backend})"
        return f"{self.name}: {size / 1e6:,.1f} M parameters, {conditions}, loaded in {self.seconds:.2f} s"


def load(args: argparse.Namespace) -> Loaded:
    """Load the model that the options name. Raises ValueError where it has no tokenizer, and what LLM raises."""
    from fastllama.kernels import backend_of
    from fastllama.runtime.llm import LLM

    start = time.perf_counter()
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=args.device,
        quantization=quantization(args),
        max_model_len=args.max_model_len,
        seed=args.seed,
        progress=False if args.quiet else None,
        **runtime_options(args),
    )
    if llm.tokenizer is None:
        raise ValueError(f"there is no tokenizer with {args.model}; give one with --tokenizer")
    counts = Counter(implementation.backend for implementation in backend_of(llm.engine.model.device).values())
    backend = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return Loaded(args.model, llm, llm.tokenizer, backend, time.perf_counter() - start)


def no_numbers(sample: CompletionOutput) -> str:
    """What to tell the user when a sample ended in an error."""
    return f"{sample.stop_reason}; if the dtype is float16, try --dtype bfloat16 or float32"
