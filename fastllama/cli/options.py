"""Options that several subcommands share: which model, on what, and how its tokens are drawn."""

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
# Of the options that are not given, where the checkpoint says nothing either.
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
    group.add_argument("--tokenizer", metavar="T", help="tokenizer file or folder (default: the one with the model)")


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """--dtype, --device."""
    group.add_argument(
        "--dtype", default="auto", metavar="D", help="float32, bfloat16, float16 (default: the checkpoint's own)"
    )
    group.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there)")


def add_chat_format_option(parser: argparse.ArgumentParser) -> None:
    """--chat-format."""
    parser.add_argument(
        "--chat-format",
        default="auto",
        metavar="C",
        help="auto (the checkpoint's own template), llama2, plain, or a .jinja file",
    )


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
    """The options of add_runtime_options and add_capacity_options, as LLM takes them."""
    names = ("kv_cache_dtype", "deterministic", "speculation", "num_draft_tokens")
    sizes = ("max_model_len", "kv_cache_tokens", "host_cache_tokens", "max_num_seqs", "max_num_batched_tokens")
    return {name: getattr(args, name) for name in (*names, *sizes) if name in args}


def quantization(args: argparse.Namespace) -> str | None:
    """The option of add_quantize_option, as LLM takes it."""
    return quantization_of(args.quantize)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are sampled, how many, and where they end; the context length, which bounds them too."""
    group = parser.add_argument_group(
        "sampling", "Defaults are the checkpoint's own (generation_config.json) where it has some, else these."
    )

    def add(*names: str, kind: Any = float, **settings: Any) -> None:
        group.add_argument(*names, type=kind, **settings)

    add("-n", "--max-tokens", kind=int, metavar="N", help="tokens to generate at most (default 256)")
    add("--temperature", metavar="T", help="0 takes the likeliest token (default 0.8)")
    add("--top-k", kind=int, metavar="K", help="sample from the K likeliest tokens (default 0: all)")
    add("--top-p", metavar="P", help="sample from this much probability (default 0.95; 1: all)")
    add("--min-p", metavar="P", help="least share of the likeliest's probability (default 0)")
    add("--repetition-penalty", metavar="R", help="divides the logits of tokens there are already (default 1: off)")
    add("--presence-penalty", metavar="X", help="subtracted from the logits of generated tokens (default 0)")
    add("--frequency-penalty", metavar="X", help="subtracted once for each time that one was generated (default 0)")
    add_seed_option(group, default=0, help="same seed, same text (default 0)")
    add(
        "--stop",
        kind=argument,
        action="append",
        default=[],
        metavar="S",
        help=r"end before this text, in which \n, \t, \r, \\, \xHH and \uHHHH are escapes; may be given several times",
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
        help="tokens of prompt and answer together (default: the model's)",
    )


def add_capacity_options(parser: argparse.ArgumentParser) -> None:
    """What bounds all requests together: --max-model-len, and the sizes of caches and steps."""
    group = parser.add_argument_group("capacity", "Defaults are chosen by the memory that is free.")
    add_length_option(group)

    def add(name: str, help: str) -> None:
        group.add_argument(name, type=int, metavar="N", help=help)

    add("--kv-cache-tokens", "tokens of all running requests together")
    add("--host-cache-tokens", "tokens that host memory keeps beside (default 0)")
    add("--max-num-seqs", "sequences that run at once")
    add("--max-num-batched-tokens", "tokens of one step; each running answer waits for that step")


def sampling_params(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None, **more: Any) -> SamplingParams:
    """The sampling options, checked: what SamplingParams refuses is refused before a model is loaded.

    defaults: of the options that are not given, LLM.sampling_defaults; without them, and for the others, SAMPLING.
    more: parameters that are no options, or are not as they were given.
    """
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    stop = [unescape(text, "--stop") for text in args.stop]
    return SamplingParams(**{"seed": args.seed, "stop": stop} | SAMPLING | dict(defaults or {}) | given | more)


def describe_defaults(args: argparse.Namespace, defaults: Mapping[str, Any]) -> str:
    """What of the sampling is the checkpoint's: "; temperature 0.6, top-p 0.9: the model's", "" where nothing is."""
    own = {name: value for name, value in defaults.items() if getattr(args, name, None) is None}
    return f"; {', '.join(f'{_spelled(name)} {own[name]}' for name in own)}: the model's" if own else ""


def _spelled(name: str) -> str:
    return re.sub("_([pk])$", r"-\1", name).replace("_", " ")


def check_names(args: argparse.Namespace) -> None:
    """Raise for a dtype, device or model that is nothing on any machine: before torch is imported, which takes seconds.

    A Hub id is not looked up here. Raises what LLM does.
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
    """A model's checkpoint, whose weights stay in the files, and the tokenizer given, or its own where none is.

    argument: what messages call the model. Raises what LLM does.
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
    """The tokenizer. Raises ValueError where a model has none."""
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer with {model}; give one with --tokenizer")
    return tokenizer


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
    """Raises what the one request within failed with, not that it did; ValueError where it has no cause but a text."""
    try:
        yield
    except RequestError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        hint = "if the dtype is float16, try --dtype bfloat16 or float32"
        raise ValueError(f"{str(error).partition(': ')[2]}; {hint}") from None
