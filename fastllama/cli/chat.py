"""`fastllama chat`: a conversation, whose history is kept and whose keys and values are computed once."""

from __future__ import annotations

import argparse
import importlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastllama.cli.options import (
    Loaded,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_sampling_options,
    load,
    no_numbers,
    sampling_params,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import argument, decode
from fastllama.cli.timings import Timings
from fastllama.errors import nearest
from fastllama.runtime.params import SamplingParams

if TYPE_CHECKING:
    from fastllama.io.chat import Message

COMMANDS = {"/help": "show this", "/reset": "forget the conversation", "/exit": "leave, as Ctrl-D does"}
DETAILS = """One line is one message. /reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops an answer:
what was written of it stays in the conversation. When the conversation outgrows the model's context, its oldest
turns are dropped. The tags of Llama 2's chat format ([INST], <<SYS>>...) are escaped wherever they occur in a text."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "chat",
        "talk with a chat model",
        run,
        details=DETAILS,
        examples=(
            "",
            '--model meta-llama/Llama-2-7b-chat-hf --system "Answer in one sentence."',
            "--temperature 0 --quiet < questions.txt",
        ),
    )
    parser.add_argument(
        "--system", type=argument, default="", metavar="TEXT", help="what the model is told before everything else"
    )
    parser.add_argument("--quiet", action="store_true", help="print the answers alone")
    add_model_options(parser)
    add_quantize_option(parser)
    add_runtime_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer lines until they end, and return the exit status."""
    # No seed of its own for each answer: the engine draws them from --seed, so that no two answers share one.
    params = sampling_params(args, seed=None)
    conversation = Conversation(load(args), params, args.system)
    if not args.quiet:
        _notice(conversation.loaded.describe())
        _notice("/help says what you can do" if sys.stdin.isatty() else "reading messages from standard input")
    for line in _lines():
        if not line.strip():
            continue
        if re.fullmatch(r"/\w+", line.strip()):
            if line.strip() == "/exit":
                break
            _obey(line.strip(), conversation)
            continue
        statistics = conversation.answer(line, lambda piece: print(piece, end="", flush=True))
        if statistics is not None:
            print(flush=True)
            if not args.quiet:
                _notice(statistics)
    return 0


class Conversation:
    """Messages so far, and a model that answers the next."""

    def __init__(self, loaded: Loaded, params: SamplingParams, system: str) -> None:
        self.loaded, self.params = loaded, params
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self._turns.clear()

    def answer(self, text: str, write: Callable[[str], None]) -> str | None:
        """Write the answer in pieces and return a line of statistics. Ctrl-C ends it with its next piece.

        A message that does not fit (None) or gets no answer is dropped again.
        """
        self._turns.append({"role": "user", "content": text})
        ids = self._fitting_ids()
        if ids is None:
            self._turns.pop()
            return None
        llm = self.loaded.llm
        generation = llm.start(ids, self.params)
        begun = False
        with suppress(KeyboardInterrupt), _interruptible() as interrupted:
            for piece in llm.follow(generation):
                shown = piece if begun else piece.lstrip()
                begun = begun or bool(shown)
                write(shown)
                if interrupted:
                    break
        llm.engine.abort(generation)
        output = generation.output()
        (sample,) = output.outputs
        if sample.finish_reason == "error":
            raise ValueError(no_numbers(sample))
        if sample.text.strip():
            self._turns.append({"role": "assistant", "content": sample.text})
        else:
            self._turns.pop()
        reason = "stopped" if sample.finish_reason == "abort" else sample.finish_reason
        return f"[{Timings.of(output).describe()}; finish: {reason}]"

    def _fitting_ids(self) -> list[int] | None:
        """The conversation's ids, its oldest turns dropped until there is room for an answer; None if that fails."""
        from fastllama.io.chat import encode_chat

        limit = self.loaded.llm.engine.scheduler.max_model_len
        room = min(self.params.max_tokens, limit // 4)
        dropped = 0
        while True:
            # Tags are escaped: a model may write some too, and must not make its own history illegal.
            ids = encode_chat(self.loaded.tokenizer, [*self._system, *self._turns], tags="escape")
            if len(ids) + room <= limit or len(self._turns) == 1:
                break
            del self._turns[:2]
            dropped += 1
        if dropped:
            _notice(f"the conversation is too long for {limit} tokens: its oldest {dropped} turn(s) were dropped")
        if len(ids) < limit:
            return ids
        _notice(f"the message is too long: {len(ids)} tokens; legal: less than {limit}")
        return None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Within it, the first Ctrl-C is noted in the list that it gives, so that no step is torn; the second is raised."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user writes, line by line: with a prompt and a history on a terminal, as UTF-8 from elsewhere."""
    if not sys.stdin.isatty():
        for number, data in enumerate(sys.stdin.buffer, 1):
            yield decode(data, f"line {number} of standard input")
        return
    with suppress(ImportError):  # not everywhere; importing it gives input() its line editing
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
        except EOFError:
            print()
            return


def _obey(command: str, conversation: Conversation) -> None:
    if command == "/reset":
        conversation.reset()
        _notice("the conversation starts anew")
    elif command == "/help":
        _notice("\n".join(f"{name:7} {meaning}" for name, meaning in COMMANDS.items()))
    else:
        hint = nearest(command, COMMANDS)
        _notice(f"unknown command {command}; " + (f"did you mean {hint}?" if hint else f"legal: {', '.join(COMMANDS)}"))


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
