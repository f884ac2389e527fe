"""`fastllama chat`: a conversation that keeps its history; the prefix cache keeps its keys and values."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastllama.cli.options import (
    Loaded,
    add_chat_format_option,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_sampling_options,
    check_names,
    describe_defaults,
    failure_in_words,
    load,
    sampling_params,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import argument, decode, read_prompt
from fastllama.cli.timings import Timings
from fastllama.errors import counted, nearest
from fastllama.runtime.params import SamplingParams

if TYPE_CHECKING:
    from fastllama.io.chat import Message

COMMANDS = {"/help": "show this", "/reset": "forget the conversation", "/exit": "leave, as Ctrl-D does"}
LINES = "a line that ends in a backslash continues on the next"
DETAILS = """One line is one message; a line that ends in a backslash continues on the next. /reset clears the
conversation, /exit or Ctrl-D leaves. Ctrl-C stops an answer: the part already printed stays in the conversation. When
the conversation outgrows the model's context, its oldest turns are dropped. The chat format is the checkpoint's own
template; without one, Llama 2's for a model whose name contains chat or instruct, else plain text. Its tags ([INST],
<|im_end|>...) are escaped in every message."""


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
    system = parser.add_mutually_exclusive_group()
    system.add_argument(
        "--system",
        type=argument,
        default="",
        metavar="TEXT",
        help="system message: instructions before the conversation",
    )
    system.add_argument("--system-file", metavar="F", help="file with the system message, in UTF-8")
    add_chat_format_option(parser)
    parser.add_argument("--quiet", action="store_true", help="print the answers only, no notices or statistics")
    add_model_options(parser)
    add_quantize_option(parser)
    add_runtime_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer messages until they end, and return the exit status."""
    # Checks that need no model come first: a wrong option should not cost the minute that loading takes.
    sampling_params(args)
    check_names(args)
    from fastllama.io.chat import check_chat_format

    check_chat_format(args.chat_format)
    system = _system(args)
    loaded = load(args)
    # Answers get no seed here: the engine derives one for each from --seed, so that no two share one.
    conversation = Conversation(loaded, sampling_params(args, loaded.llm.sampling_defaults, seed=None), system)
    if not args.quiet:
        _notice(loaded.describe() + describe_defaults(args, loaded.llm.sampling_defaults))
        if not conversation.format.guessed:  # the log has a warning about it already
            _notice(conversation.format.description)
        _notice("/help lists the commands" if sys.stdin.isatty() else "reading messages from standard input")
    for message in _messages():
        if not message.strip():
            continue
        if re.fullmatch(r"/\w+", message.strip()):
            if message.strip() == "/exit":
                break
            _obey(message.strip(), conversation)
            continue
        statistics = conversation.answer(message, lambda piece: print(piece, end="", flush=True))
        if statistics is not None:
            print(flush=True)
            if not args.quiet:
                _notice(statistics)
    return 0


class Conversation:
    """The messages so far, and the model that answers the next."""

    def __init__(self, loaded: Loaded, params: SamplingParams, system: str) -> None:
        """params: of each answer; the format's stop texts are added. ValueError if it takes no system message."""
        self.loaded, self.format = loaded, loaded.llm.chat_format
        self.params = dataclasses.replace(
            params,
            stop=[*params.stop, *self.format.stop],
            stop_token_ids=[*params.stop_token_ids, *self.format.stop_token_ids],
        )
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        if system:
            self.format.encode([*self._system, {"role": "user", "content": "Hi"}], tags="escape")

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self._turns.clear()

    def answer(self, text: str, write: Callable[[str], None]) -> str | None:
        """Write the answer as it is generated and return a line of statistics. Ctrl-C ends it at the next piece.

        Returns None, and drops the message, where it does not fit, the chat format rejects it, or no answer comes.
        """
        self._turns.append({"role": "user", "content": text})
        ids = self._fitting_ids()
        if ids is None:
            self._turns.pop()
            return None
        llm = self.loaded.llm
        generation = llm.start(ids, self.params, continues_text=False)
        begun = False
        with failure_in_words(), suppress(KeyboardInterrupt), _interruptible() as interrupted:
            for piece in llm.follow(generation):
                shown = piece if begun else piece.lstrip()
                begun = begun or bool(shown)
                write(shown)
                if interrupted:
                    break
        llm.engine.abort(generation)
        output = generation.output()
        (sample,) = output.outputs
        if sample.text.strip():
            self._turns.append({"role": "assistant", "content": sample.text})
        else:
            self._turns.pop()
        reason = "stopped" if sample.finish_reason == "abort" else sample.finish_reason
        return f"[{Timings.of(output).describe()}; finish: {reason}]"

    def _fitting_ids(self) -> list[int] | None:
        """The conversation's token ids; drops the oldest turns until an answer fits. None if that fails."""
        limit = self.loaded.llm.max_model_len
        room = min(self.params.max_tokens or limit, limit // 4)
        dropped = 0
        while True:
            try:
                # Escaped, since a model may write tags too, and they would make its own history illegal.
                ids = self.format.encode([*self._system, *self._turns], tags="escape")
            except ValueError as error:
                _notice(f"the message is dropped: {error}")
                return None
            if len(ids) + room <= limit or len(self._turns) == 1:
                break
            del self._turns[:2]
            dropped += 1
        if dropped:
            _notice(f"the conversation is too long for {limit} tokens: its oldest {counted(dropped, 'turn')} dropped")
        if len(ids) < limit:
            return ids
        _notice(f"the message is too long: {len(ids)} tokens; legal: less than {limit}")
        return None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C is noted in the yielded list, so that no step is interrupted midway; the second raises."""
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


def _system(args: argparse.Namespace) -> str:
    """The system message. Raises ValueError for a bad file, or for standard input, which holds the messages."""
    if args.system_file is None:
        return str(args.system)
    if args.system_file == "-":
        raise ValueError("--system-file is '-', and standard input holds the messages; legal: a file")
    return read_prompt(args.system_file)


def _messages() -> Iterator[str]:
    r"""The user's messages: lines, joined where one ends in a backslash; two backslashes stand for one."""
    begun: list[str] = []
    for line in _lines(begun):
        backslashes = len(line) - len(line.rstrip("\\"))
        begun.append(line[:-1] if backslashes % 2 else line)
        if backslashes % 2 == 0:
            yield "\n".join(begun)
            begun.clear()
    if begun:
        yield "\n".join(begun)


def _lines(begun: list[str]) -> Iterator[str]:
    """Input lines without line ends: with a prompt and a history on a terminal, else decoded as UTF-8.

    begun: the lines of an unfinished message; Ctrl-C on a terminal discards them.
    """
    if not sys.stdin.isatty():
        for number, data in enumerate(sys.stdin.buffer, 1):
            yield decode(data, f"line {number} of standard input").removesuffix("\n").removesuffix("\r")
        return
    with suppress(ImportError):  # missing on Windows; importing it gives input() line editing
        importlib.import_module("readline")
    while True:
        try:
            yield input(". " if begun else "> ")
        except KeyboardInterrupt:
            begun.clear()
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
        except EOFError:
            print()
            return


def _obey(command: str, conversation: Conversation) -> None:
    if command == "/reset":
        conversation.reset()
        _notice("the conversation starts anew")
    elif command == "/help":
        _notice("\n".join([*(f"{name:7} {meaning}" for name, meaning in COMMANDS.items()), LINES]))
    else:
        hint = nearest(command, COMMANDS)
        _notice(f"unknown command {command}; " + (f"did you mean {hint}?" if hint else f"legal: {', '.join(COMMANDS)}"))


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
