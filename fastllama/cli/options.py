"""Options that several subcommands share: the model, its device and dtype, the runtime, and sampling."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllama.cli.text import argument, unescape
from fastllama.errors import RequestError, check_choice
from fastllama.layers.config import DTYPES
from fastllama.layers.quantization import WORDS, quantization_of
from fastllama.runtime.params import SamplingParams

if TYPE_CHECKING:
    from fastllama.io.formats.base import Checkpoint
    from fastllama.io.tokenizer import Tokenizer
    from fastllama.runtime.llm import LLM


MODELS = "a Hugging Face or Meta folder, a llama2.c file, or a Hub id, owner/name or owner/name@revision"
# Values of options that neither the command line nor the checkpoint specifies.
SAMPLING = {
    "max_tokens": 256,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def add_model_options(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """--model, --tokenizer, --adapter, --dtype, --device."""
    group = parser.add_argument_group("model")
    add_model_option(group)
    add_tokenizer_option(group)
    if adapter:
        group.add_argument("--adapter", metavar="DIR", help="a PEFT LoRA folder, merged into the weights as they load")
    add_place_options(group)


def add_model_option(group: argparse._ArgumentGroup) -> None:
    """--model."""
    group.add_argument(
        "-m",
        "--model",
        default="tiny",
        metavar="M",
        help=f"'tiny' (packaged, the default), {MODELS}",
    )


def add_tokenizer_option(group: argparse._ArgumentGroup) -> None:
    """--tokenizer."""
    group.add_argument("--tokenizer", metavar="T", help="tokenizer file or folder (default: the model's)")


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """--dtype, --device."""
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="D",
        help="compute dtype: float32, bfloat16, float16 (default: the checkpoint's)",
    )
    group.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if available)"
    )


def add_chat_format_option(parser: argparse.ArgumentParser) -> None:
    """--chat-format."""
    parser.add_argument(
        "--chat-format",
        default="auto",
        metavar="C",
        help="auto (the checkpoint's template), llama2, plain, or a .jinja file (default auto)",
    )


def add_quantize_option(parser: argparse.ArgumentParser) -> None:
    """--quantize."""
    parser.add_argument(
        "--quantize",
        choices=("auto", *WORDS),
        default="auto",
        help="int4, int8: weights rounded to 4 or 8 bits; w8a8: weights and activations in 8 bits; bf12: bf16 weights "
        "packed losslessly into 12 bits (default: bf12 where it is faster)",
    )


def add_runtime_options(parser: argparse.ArgumentParser, *, speculation: bool = True) -> None:
    """--kv-cache-dtype, --deterministic and, with `speculation`, the options of speculative decoding."""
    add = parser.add_argument_group("runtime").add_argument
    add(
        "--kv-cache-dtype",
        choices=("auto", "int8", "fp8"),
        default="auto",
        help="dtype of the KV cache: int8, fp8 (default: the compute dtype)",
    )
    add("--deterministic", action="store_true", help="batch-invariant: other requests never change a result's bits")
    if speculation:
        add(
            "--speculation",
            metavar="S",
            help="speculative decoding: 'prompt_lookup' takes draft tokens from the text so far; a draft model (given "
            "as for --model) generates them (default: off)",
        )
        add("--num-draft-tokens", type=int, default=3, metavar="N", help="draft tokens per step, 1 to 7 (default 3)")


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of add_runtime_options and add_capacity_options, as keyword arguments of LLM."""
    names = ("kv_cache_dtype", "deterministic", "speculation", "num_draft_tokens")
    sizes = ("max_model_len", "kv_cache_tokens", "host_cache_tokens", "max_num_seqs", "max_num_batched_tokens")
    return {name: getattr(args, name) for name in (*names, *sizes) if name in args}


def quantization(args: argparse.Namespace) -> str | None:
    """The value of add_quantize_option, as LLM's `quantization`."""
    return quantization_of(args.quantize)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Sampling parameters, the number of tokens, stop texts, and the context length, which also bounds them."""
    group = parser.add_argument_group(
        "sampling", "Defaults are the checkpoint's (generation_config.json) where it has any, else these."
    )

    def add(*names: str, kind: Any = float, **settings: Any) -> None:
        group.add_argument(*names, type=kind, **settings)

    add("-n", "--max-tokens", kind=int, metavar="N", help="maximum number of tokens to generate (default 256)")
    add("--temperature", metavar="T", help="divides the logits; 0: greedy (default 0.8)")
    add("--top-k", kind=int, metavar="K", help="sample from the K likeliest tokens (default 0: all)")
    add(
        "--top-p",
        metavar="P",
        help="sample from the likeliest tokens up to this total probability (default 0.95; 1: all)",
    )
    add(
        "--min-p",
        metavar="P",
        help="drop tokens below this share of the likeliest token's probability (default 0: off)",
    )
    add(
        "--repetition-penalty",
        metavar="R",
        help="divides positive logits of tokens in the prompt or answer (default 1: off)",
    )
    add("--presence-penalty", metavar="X", help="subtracted from the logit of each generated token (default 0)")
    add("--frequency-penalty", metavar="X", help="subtracted once per occurrence of a generated token (default 0)")
    add_seed_option(group, default=0, help="random seed; the same seed gives the same text (default 0)")
    add(
        "--stop",
        kind=argument,
        action="append",
        default=[],
        metavar="S",
        help=r"stop before this text; escapes: \n, \t, \r, \\, \xHH, \uHHHH; may be repeated (default: none)",
    )
    add_length_option(group)


def add_seed_option(group: argparse._ArgumentGroup, *, default: int | None, help: str) -> None:
    """--seed."""
    group.add_argument("-s", "--seed", type=int, default=default, metavar="S", help=help)


def add_length_option(group: argparse._ArgumentGroup) -> None:
    """--max-model-len."""
    group.add_argument(
        "-c",
        "--max-model-len",
        type=int,
        metavar="N",
        help="context length: tokens of prompt and answer together (default: the model's)",
    )


def add_capacity_options(parser: argparse.ArgumentParser) -> None:
    """Limits over all requests: --max-model-len, and the sizes of caches, batches and steps."""
    group = parser.add_argument_group("capacity", "Defaults depend on the free memory.")
    add_length_option(group)

    def add(name: str, help: str) -> None:
        group.add_argument(name, type=int, metavar="N", help=help)

    add("--kv-cache-tokens", "size of the KV cache, in tokens of all requests together")
    add("--host-cache-tokens", "size of the second-level prefix cache in host memory, in tokens (default 0: off)")
    add("--max-num-seqs", "maximum number of sequences in a batch")
    add("--max-num-batched-tokens", "maximum number of tokens per step; a larger one delays running answers longer")


def sampling_params(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None, **more: Any) -> SamplingParams:
    """The sampling options as SamplingParams, which raises ValueError for a bad value before a model is loaded.

    defaults: LLM.sampling_defaults, for options not given; SAMPLING supplies those it lacks.
    more: parameters without an option, or that replace an option's value.
    """
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    stop = [unescape(text, "--stop") for text in args.stop]
    return SamplingParams(**{"seed": args.seed, "stop": stop} | SAMPLING | dict(defaults or {}) | given | more)


def describe_defaults(args: argparse.Namespace, defaults: Mapping[str, Any]) -> str:
    """The checkpoint's own sampling defaults: "; temperature 0.6, top-p 0.9: the model's"; "" where it has none."""
    own = {name: value for name, value in defaults.items() if getattr(args, name, None) is None}
    return f"; {', '.join(f'{_spelled(name)} {own[name]}' for name in own)}: the model's" if own else ""


def _spelled(name: str) -> str:
    return re.sub("_([pk])$", r"-\1", name).replace("_", " ")


def check_names(args: argparse.Namespace) -> None:
    """Raise for a dtype, device or model name that no machine accepts, before importing torch takes seconds.

    A Hub id is not looked up here. Raises the errors of LLM.
    """
    check_choice("dtype", args.dtype, ("auto", *DTYPES))
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", args.device):
        raise ValueError(f"device is {args.device!r}; legal: 'auto', 'cpu', 'cuda', 'cuda:0' ...")
    from fastllama.io.hub import resolve_model

    for name in ("--model", "--speculation", "SRC"):
        model = getattr(args, name.lstrip("-"), None)
        if model not in (None, "prompt_lookup") and ("/" not in model or model.startswith((".", "/", "~"))):
            resolve_model(model, argument=name)


def open_parts(
    model: str, tokenizer: str | None, dtype: str, *, argument: str = "--model"
) -> tuple[Checkpoint, Tokenizer | None]:
    """A model's checkpoint, its weights not yet read, and the given tokenizer or else the model's.

    argument: the option that error messages name. Raises the errors of LLM.
    """
    from fastllama.io.adapter import locate
    from fastllama.io.companions import find_tokenizer
    from fastllama.io.hub import resolve_model
    from fastllama.io.load import open_model
    from fastllama.io.tokenizer import load_tokenizer

    path, adapter = locate(resolve_model(model, argument=argument), None)
    checkpoint, _ = open_model(path, adapter=adapter, dtype=dtype)
    if tokenizer is not None:
        return checkpoint, load_tokenizer(tokenizer)
    return checkpoint, find_tokenizer(*filter(None, (adapter, path)))


def needed_tokenizer(tokenizer: Tokenizer | None, model: str) -> Tokenizer:
    """The tokenizer. Raises ValueError where it is None."""
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer with {model}; give one with --tokenizer")
    return tokenizer


@dataclass(frozen=True)
class Loaded:
    """A loaded model with a tokenizer; `backend` counts its ops' backends ("8 triton, 3 reference")."""

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
    """Load the model that the options name. Raises ValueError where it has no tokenizer, and the errors of LLM."""
    check_names(args)
    from fastllama.kernels import backend_of
    from fastllama.runtime.llm import LLM

    start = time.perf_counter()
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=args.device,
        quantization=quantization(args),
        adapter=args.adapter,
        chat_format=getattr(args, "chat_format", "auto"),
        seed=args.seed,
        progress=False if args.quiet else None,
        **runtime_options(args),
    )
    tokenizer = needed_tokenizer(llm.tokenizer, args.model)
    counts = Counter(implementation.backend for implementation in backend_of(llm.engine.model.device).values())
    backend = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return Loaded(args.model, llm, tokenizer, backend, time.perf_counter() - start)


@contextmanager
def failure_in_words() -> Iterator[None]:
    """Turn the failure of the one request within into its cause, or into a ValueError where it has only a message."""
    try:
        yield
    except RequestError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        hint = "if the dtype is float16, try --dtype bfloat16 or float32"
        raise ValueError(f"{str(error).partition(': ')[2]}; {hint}") from None
