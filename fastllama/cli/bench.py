"""`fastllama bench`: measures throughput, latency, decode steps and single ops on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from fastllama.bench.files import output_file, write_record
from fastllama.cli.options import (
    add_model_option,
    add_place_options,
    add_quantize_option,
    add_runtime_options,
    check_names,
    quantization,
    runtime_options,
)
from fastllama.cli.parser import add_command as add
from fastllama.layers.quantization import NONE, WORDS

FAILED = 1
SHAPES = ("tiny", "1.1b", "7b", "13b", "70b")
OP_SHAPES = ("toy", *SHAPES[1:])
RUNTIME = """Throughput: prompts of 8 to 400 random tokens, all submitted at the start, each answered greedily with
--tokens tokens, by this runtime and, where it is installed, by transformers on the same device: `generate` on one
padded batch, and `generate_batch`, its continuous batching. They take turns, after one uncounted warm-up round.
Latency: requests that arrive at random (a Poisson process) at shares of that throughput: time to the first token, and
between tokens of a request. A percentile is printed where at least one sample lies above it (p99 needs 100), else `-`.
Tables go to standard output, progress to standard error."""


DECODE = """Every quantization at every batch size and context length, through the engine, greedily. Each sequence has
its own prompt of random ids; the last step reaches the context length. Tokens per second count all sequences and all
measured steps. `of a copy` is the share of the roofline: bytes of the stored weights and of the keys and values read,
per second, over the bandwidth of a copy measured in the same run. On CUDA a trace lists the kernels of a step, and
transformers' StaticCache with torch.compile, where it is installed, is measured at the same shape in bf16. Random
weights are bf16 too unless --dtype is given. Cases that do not fit in memory are listed. The exit status is 1 if one of
our cases fails."""


OPS = """Each op is first compared with an fp64 reference on separate inputs: a wrong one is listed and not timed, and
the exit status is 1. Then it is timed in turns with plain torch as Hugging Face writes the formula, eager and through
torch.compile, and with torch's own fused op where there is one. On CUDA calls are captured in a graph that cycles
through more inputs than the L2 cache holds. `of a ceiling` is the roofline time over our time: the bytes that must move
and the operations, at the rates of a copy or read and of a matmul, measured in the same run. Inputs are bf16 unless
--dtype is given."""


def add_command(commands: Any) -> None:
    """Define the subcommand and its own subcommands."""
    parser = add(
        commands,
        "bench",
        "measure speed on this machine",
        None,
        examples=("runtime", "decode --shape 1.1b", "ops --most 1"),
    )
    measured = parser.add_subparsers(metavar="WHAT", dest="what", title="what is measured", required=True)
    _add_runtime(measured)
    _add_decode(measured)
    _add_ops(measured)


def _add_runtime(commands: Any) -> None:
    parser = add(
        commands,
        "bench runtime",
        "throughput and latency of the runtime, compared with transformers",
        run_runtime,
        details=RUNTIME,
        examples=(
            "",
            "--model meta-llama/Llama-2-7b-hf --dtype bfloat16 --requests 128 --tokens 128",
            "--peers generate --loads 0.5 --output runtime.json --plot runtime.png",
        ),
    )
    group = parser.add_argument_group("model")
    add_model_option(group)
    add_place_options(group)
    add_quantize_option(parser)
    add_runtime_options(parser)
    number = parser.add_argument
    number("--requests", type=int, default=32, metavar="N", help="prompts submitted at the start (default 32)")
    number("--tokens", type=int, default=32, metavar="N", help="tokens generated per prompt (default 32)")
    number("--rounds", type=int, default=3, metavar="N", help="measured rounds of throughput (default 3)")
    number(
        "--peers",
        nargs="*",
        choices=("generate", "generate_batch"),
        default=["generate", "generate_batch"],
        help="functions of transformers to measure (default: both; --peers without a name: none)",
    )
    number(
        "--loads",
        nargs="*",
        type=float,
        default=[0.25, 0.5, 0.75],
        metavar="L",
        help="arrival rates, as shares of the measured throughput (default 0.25 0.5 0.75)",
    )
    number("--arrivals", type=int, default=500, metavar="N", help="requests at each load (default 500)")
    _add_outputs(parser)
    number(
        "--plot",
        type=output_file,
        metavar="F",
        help="plot the latencies to this .png or .svg file; needs the extra [bench]",
    )


def run_runtime(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the requested files, and return the exit status."""
    check_names(args)
    from fastllama.bench.plot import check_plot, plot
    from fastllama.bench.runtime import RuntimeOptions, measure, report

    options = RuntimeOptions(
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        quantization=quantization(args),
        requests=args.requests,
        tokens=args.tokens,
        rounds=args.rounds,
        peers=tuple(args.peers),
        loads=tuple(args.loads),
        arrivals=args.arrivals,
        **runtime_options(args),
    )
    if args.plot is not None:
        check_plot(args.plot)
        if not options.loads:
            raise ValueError("loads is empty while --plot is given; legal: at least one load")
    record = measure(options, _progress(args))
    print(report(record))
    if args.output is not None:
        write_record(args.output, record)
    if args.plot is not None:
        plot(args.plot, record)
    return 0


def _add_decode(commands: Any) -> None:
    parser = add(
        commands,
        "bench decode",
        "decode steps by batch size and context length, compared with the roofline and transformers",
        run_decode,
        details=DECODE,
        examples=(
            "--shape 1.1b --batch 1 --context 512 --quantize none int4",
            "--shape 70b --quantize int4 --batch 1 32 --output decode.json",
            "--model path/to/model --context 1024",
        ),
    )
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--shape",
        choices=SHAPES,
        help="random weights of this shape (default: 7b where a GPU holds it; on a CPU the largest that fits and takes "
        "some minutes)",
    )
    which.add_argument("-m", "--model", metavar="M", help="a checkpoint: a path, a Hub id, or 'tiny', the packaged one")
    add_place_options(group)
    number = parser.add_argument
    number(
        "--quantize",
        nargs="+",
        choices=WORDS,
        default=[NONE],
        help="quantizations of the weights, as for LLM (default none)",
    )
    several: dict[str, Any] = {"nargs": "+", "type": int, "default": [], "metavar": "N"}
    number("--batch", help="batch sizes, in sequences (default 1 8 32 128; on a CPU 1 8)", **several)
    number("--context", help="context lengths, in tokens (default 512 4096; on a CPU 512)", **several)
    number("--tokens", type=int, default=128, metavar="N", help="measured steps per case (default 128)")
    number("--no-peers", action="store_true", help="do not measure transformers")
    add_runtime_options(parser, speculation=False)
    _add_outputs(parser)


def run_decode(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the file after each case, and return the exit status."""
    check_names(args)
    from fastllama.bench.decode import OURS, DecodeOptions, measure
    from fastllama.bench.decode_report import report

    options = DecodeOptions(
        model=args.model or args.shape,
        checkpoint=args.model is not None,
        dtype=args.dtype,
        device=args.device,
        quantization=tuple(args.quantize),
        batch=tuple(args.batch),
        context=tuple(args.context),
        tokens=args.tokens,
        peers=not args.no_peers,
        **runtime_options(args),
    )
    record = _measured(args, partial(measure, options), report)
    return FAILED if any("failed" in case for case in record["cases"] if case["name"] == OURS) else 0


def _add_ops(commands: Any) -> None:
    parser = add(
        commands,
        "bench ops",
        "every op at the shapes of a Llama, checked, and timed against torch",
        run_ops,
        details=OPS,
        examples=(
            "--most 1 --minutes 3",
            "--ops rms_norm matmul_int4 --shape 7b --dtype float16",
            "--shape toy --no-peers --output ops.json",
        ),
    )
    option = parser.add_argument
    option("--ops", nargs="+", default=[], metavar="OP", help="ops to measure (default: all that the device has)")
    option("--shape", choices=OP_SHAPES, help="model whose shapes are measured (default: 7b on a GPU, 1.1b on a CPU)")
    add_place_options(parser.add_argument_group("place"))
    option("--most", type=int, metavar="N", help="shapes per op, by importance (default: all; 2 on a CPU)")
    option("--minutes", type=float, default=10.0, metavar="M", help="start no shape after M minutes (default 10)")
    option("--no-peers", action="store_true", help="do not measure torch")
    _add_outputs(parser)


def run_ops(args: argparse.Namespace) -> int:
    """Measure, print the table, write the file after each shape, and return the exit status."""
    check_names(args)
    from fastllama.bench.ops.report import report
    from fastllama.bench.ops.suite import OpsOptions, failed, measure

    options = OpsOptions(
        ops=tuple(args.ops),
        shape=args.shape,
        dtype=args.dtype,
        device=args.device,
        most=args.most,
        minutes=args.minutes,
        peers=not args.no_peers,
    )
    record = _measured(args, partial(measure, options), report)
    return FAILED if failed(record) else 0


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=output_file, metavar="F", help="write conditions and all samples to this file, as JSON"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _measured(
    args: argparse.Namespace, measure: Callable[..., dict[str, Any]], report: Callable[[Any], str]
) -> dict[str, Any]:
    """Measure, write the file after each case, and print the tables. measure: takes callbacks `say` and `keep`."""

    def keep(record: dict[str, Any]) -> None:
        if args.output is not None:
            write_record(args.output, record)

    record = measure(_progress(args), keep)
    print(report(record))
    return record


def _progress(args: argparse.Namespace) -> Any:
    return (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
