"""`fastllama serve`: serves a model over HTTP with OpenAI's API."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllama import env
from fastllama.cli.options import (
    add_capacity_options,
    add_chat_format_option,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_seed_option,
    check_names,
    load,
)
from fastllama.cli.parser import add_command as add
from fastllama.errors import ExtraRequiredError, why_unusable

if TYPE_CHECKING:
    from fastllama.runtime.llm import LLM
    from fastllama.serve.options import ServerOptions

PACKAGES = ("starlette", "uvicorn", "msgspec", "prometheus_client", "httptools")
DETAILS = """Serves /v1/chat/completions, /v1/completions and /v1/models for OpenAI clients, /tokenize and /detokenize,
/health, /ready and /metrics, and a chat page at /. By default it accepts local connections only, without a key; with
--host 0.0.0.0 other machines connect with the keys in FASTLLAMA_API_KEY or --api-keys. Standard output gets one line of
JSON per request, standard error everything else. The first Ctrl-C or SIGTERM refuses new requests and lets running ones
finish, the second ends at once; SIGHUP reloads the keys."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "serve",
        "serve a model over HTTP with OpenAI's API",
        run,
        details=DETAILS,
        examples=(
            "",
            "--model meta-llama/Llama-2-13b-chat-hf --quantize int8",
            "--host 0.0.0.0 --api-keys keys.jsonl --ssl-certfile cert.pem --ssl-keyfile key.pem",
            "--new-key alice",
        ),
    )
    _add_http_options(parser.add_argument_group("HTTP"))
    _add_key_options(parser.add_argument_group("keys and certificates"))
    add_model_options(parser)
    add_chat_format_option(parser)
    add_quantize_option(parser)
    add_runtime_options(parser)
    add_capacity_options(parser)
    seeds = parser.add_argument_group("sampling", "Sampling parameters come with each request.")
    add_seed_option(seeds, default=None, help="seed of the seeds of requests that specify none (default: random)")


def _add_http_options(group: argparse._ArgumentGroup) -> None:
    def add(name: str, kind: Any, default: Any, metavar: str, help: str) -> None:
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=help)

    add("--host", str, "127.0.0.1", "H", "address to serve on (default 127.0.0.1)")
    add("--port", int, 8229, "N", "port (default 8229; 0: a free one)")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        metavar="NAME",
        help="model names to accept; others are refused (default: report the model's name, accept any)",
    )
    add("--max-n", int, 16, "N", "maximum number of samples per request (default 16)")
    add(
        "--max-queue-size",
        int,
        1024,
        "N",
        "maximum number of waiting requests; further ones get status 429 (default 1024)",
    )
    add("--request-timeout", float, 600.0, "S", "seconds that a request may take, waiting and running (default 600)")
    add("--drain-timeout", float, 25.0, "S", "seconds for running requests to finish at shutdown (default 25)")
    add("--max-body-bytes", int, 4 << 20, "N", "maximum size of a request's body, in bytes (default 4194304)")
    add("--canary", float, None, "S", "test the model every S seconds; /health is 503 on a wrong answer (default: off)")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="O",
        help="allowed CORS origin, as https://example.org, or '*' for any; may be given several times (default: none)",
    )


def _add_key_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--api-keys", type=Path, metavar="F", help="file of API keys and their limits, as JSON lines")
    group.add_argument(
        "--new-key", metavar="NAME", help="print a new line for that file, its key to standard error, and exit"
    )
    group.add_argument("--ssl-certfile", type=Path, metavar="F", help="certificate chain, PEM")
    group.add_argument("--ssl-keyfile", type=Path, metavar="F", help="its private key, PEM")


def run(args: argparse.Namespace) -> int:
    """Serve, and return the exit status."""
    for package in PACKAGES:
        if why_unusable(package):
            raise ExtraRequiredError("fastllama serve", package, "serve")
    if args.new_key is not None:
        return _new_key(args.new_key)
    options = _options(args)
    check_names(args)
    from fastllama.serve.server import serve

    def load_model() -> LLM:
        return load(args).llm

    return serve(options, load_model, model=args.model, say=_say)


def _options(args: argparse.Namespace) -> ServerOptions:
    from fastllama.serve.keys import Keyring
    from fastllama.serve.options import ServerOptions
    from fastllama.serve.service import ServiceLimits

    return ServerOptions(
        keyring=Keyring.open(env.API_KEY.read() or None, args.api_keys),
        host=args.host,
        port=args.port,
        names=tuple(args.served_model_name),
        limits=ServiceLimits(request_seconds=args.request_timeout, body_bytes=args.max_body_bytes),
        max_queue_size=args.max_queue_size,
        drain_seconds=args.drain_timeout,
        cors_origins=tuple(args.cors_origin),
        canary_seconds=args.canary,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        max_n=args.max_n,
        traits=(str(args.adapter), args.kv_cache_dtype, str(args.deterministic)),
    )


def _new_key(name: str) -> int:
    """Print a line to append to the file of keys. The key itself is shown only here: the file holds its hash."""
    from fastllama.serve.keys import new_key

    key, line = new_key(name)
    print(line)
    print(f"the key of {name}, which is shown this once: {key}", file=sys.stderr)
    return 0


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # standard error was closed; the server continues
        print(f"fastllama: {line}", file=sys.stderr, flush=True)
