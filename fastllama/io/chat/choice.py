"""Chooses a model's chat format: its template, Llama 2's format, or plain text."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.errors import CheckpointError, check_choice
from fastllama.io.chat import llama2, plain
from fastllama.io.chat.messages import Message, Tags
from fastllama.io.chat.template import ChatTemplate
from fastllama.io.tokenizer import Tokenizer

_LOG = logging.getLogger("fastllama")
_CHOICES = ("auto", "llama2", "plain")
_CHAT_MODEL = re.compile(r"(?<![a-z])(?:chat|instruct)(?![a-z])")


@dataclass(frozen=True)
class ChatFormat:
    """Encodes conversations as token ids; names the stop texts and ids that end an answer besides EOS.

    name: "template", "llama2" or "plain". description: one line with the choice and its reason. `guessed`: no file
    of the checkpoint specifies the format. stop, stop_token_ids: texts and ids that end an answer, for SamplingParams.
    """

    name: str
    description: str
    guessed: bool
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    _encode: Callable[[Sequence[Message], Tags, bool], list[int]] = field(repr=False, compare=False)
    _encode_whole: Callable[[str, Tags], list[int] | None] = field(repr=False, compare=False)

    def encode(
        self, messages: Sequence[Message], *, tags: Tags = "refuse", continue_final_message: bool = False
    ) -> list[int]:
        """Token ids of the prompt for the next answer.

        Args:
            messages: the conversation, the last message not from the assistant. The format decides which roles and
                which order are legal.
            continue_final_message: as in transformers: the last message is from the assistant, and is continued. The
                ids end with its content, without the blanks and end tag that the format writes after a message.
            tags: how to treat text inside contents that would pose as another role: special pieces, the template's
                own tags and labels. "refuse" raises ValueError; "escape" inserts a backslash after the opening bracket
                ("[\\INST]", "<\\|im_end|>", "<\\/s>"), or before the last letter where there is none ("USER\\:"), so
                that the text stays legible, is no longer the tag, and can be restored.

        Raises:
            ValueError: with the message's index, for an illegal role, a refused tag, a message that would be left out,
                or a last content that the template changes and that so cannot be continued; with the template's own
                message, where it rejects the conversation.
            TypeError: for a message that is not a mapping of `role` and `content`, both text.
            CheckpointError: where the template fails.
        """
        check_choice("tags", tags, ("refuse", "escape"))
        return self._encode(messages, tags, continue_final_message)

    def stop_after(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """The texts of `stop` that end the answer to these messages.

        Empty for a single message in plain text: it is the prompt itself, without "User:" labels, so that a "User:" in
        the answer is ordinary text. Whole prompts (`encode_whole`) are a single message, too.
        """
        return () if self.name == "plain" and len(messages) == 1 else self.stop

    def encode_whole(self, text: str, *, tags: Tags = "refuse") -> list[int] | None:
        """Token ids of a text that is already a whole prompt in Llama 2's format; None where it is not.

        Its form: any number of finished turns "<s>[INST] ... [/INST] ... </s>", then "<s>[INST] ... [/INST]", where
        each "<s>" and blanks at both ends are optional. The ids are those of `encode` for the same conversation: the
        first BOS is added here, "</s>" and "<s>" between turns become ids, everything else is encoded literally,
        "<<SYS>>" included. None for any text where the format is a template that does not write "[INST]".
        tags: how to treat special pieces inside a turn, as in `encode`; ValueError for the first if "refuse".
        """
        check_choice("tags", tags, ("refuse", "escape"))
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        return self._encode_whole(text, tags)


def check_chat_format(choice: str | Path) -> None:
    """Raise ValueError or FileNotFoundError unless `chat_format` accepts `choice`; no file is read."""
    choice = str(choice)
    if choice in _CHOICES or Path(choice).is_file():
        return
    if choice.endswith(".jinja") or os.sep in choice:
        raise FileNotFoundError(f"chat_format is {choice!r}: there is no such file")
    check_choice("chat_format", choice, (*_CHOICES, "FILE.jinja"))


def chat_format(tokenizer: Tokenizer, *, choice: str | Path = "auto", model: str | None = None) -> ChatFormat:
    """A model's chat format. A choice that no file specifies is logged as a warning.

    choice: "auto", "llama2", "plain", or the path of a jinja file. "auto" is the tokenizer's template; without one,
    Llama 2's format where `model` is None or its name contains the word chat or instruct, else plain text.
    model: the model as the user named it (a path or Hub id), None where that is unknown.

    A template that renders conversations as Meta's reference does counts as Llama 2's format: Meta's ids are exact for
    every tokenizer (llama2.py lists where those of transformers differ).
    Raises ValueError for another choice, FileNotFoundError for a missing file, CheckpointError for a broken template.
    """
    chosen = _choose(tokenizer, choice, model)
    if chosen.guessed:
        _LOG.warning("%s", chosen.description)
    return chosen


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tags: Tags = "refuse",
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of the prompt for the next answer, in the tokenizer's template, else in Llama 2's format.

    Arguments and errors are those of `ChatFormat.encode`.
    """
    chosen = _choose(tokenizer, "auto", None)
    return chosen.encode(messages, tags=tags, continue_final_message=continue_final_message)


def _choose(tokenizer: Tokenizer, choice: str | Path, model: str | None) -> ChatFormat:
    check_chat_format(choice)
    choice = str(choice)
    if choice == "llama2":
        return _llama2(tokenizer, "chat format: Llama 2's, as requested")
    if choice == "plain":
        return _plain(tokenizer, "chat format: plain text, as requested")
    if choice != "auto":
        return _of_template(tokenizer, _read(Path(choice)), choice)
    if tokenizer.chat_template is not None:
        return _of_template(tokenizer, tokenizer.chat_template, str(_template_file(tokenizer)))
    missing = "the checkpoint has no chat template"
    if model is None:
        return _llama2(tokenizer, f"{missing}: Llama 2's chat format", guessed=True)
    if _CHAT_MODEL.search(_name(model).lower()):
        return _llama2(tokenizer, f"{missing}, and its name is a chat model's: Llama 2's chat format", guessed=True)
    return _plain(tokenizer, f"{missing}, and its name is not a chat model's: plain text", guessed=True)


def _of_template(tokenizer: Tokenizer, source: str, file: str) -> ChatFormat:
    template = ChatTemplate(tokenizer, source, file)
    bos, eos = (tokenizer.special_tokens.get(name, "") for name in ("bos_token", "eos_token"))
    ids = [tokenizer.encode_template(text) for text in (bos, eos)]
    if ids == [[tokenizer.bos_token_id], [tokenizer.eos_token_id]] and llama2.is_written_by(template.render, bos, eos):
        return _llama2(tokenizer, f"chat format: Llama 2's, which the chat template of {file} writes")
    found = template.findings
    description = f"chat format: the chat template of {file}"
    return ChatFormat(
        "template", description, False, found.stop, found.stop_token_ids, template.encode, template.encode_whole
    )


def _llama2(tokenizer: Tokenizer, description: str, *, guessed: bool = False) -> ChatFormat:
    special = _special_in_text(tokenizer)
    encode = functools.partial(llama2.encode, tokenizer, special)
    whole = functools.partial(llama2.encode_whole, tokenizer, special)
    return ChatFormat("llama2", description, guessed, (), (tokenizer.eos_token_id,), encode, whole)


def _plain(tokenizer: Tokenizer, description: str, *, guessed: bool = False) -> ChatFormat:
    special = _special_in_text(tokenizer)
    encode = functools.partial(plain.encode, tokenizer, special)
    whole = functools.partial(llama2.encode_whole, tokenizer, special)
    return ChatFormat("plain", description, guessed, (plain.STOP,), (tokenizer.eos_token_id,), encode, whole)


def _special_in_text(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special pieces that become ids in plain text too: added tokens, but not SentencePiece's own pieces."""
    return tuple(
        piece
        for piece in tokenizer.special_pieces()
        if set(tokenizer.encode_template(piece)) & set(tokenizer.encode(f"a{piece}", bos=False))
    )


def _read(path: Path) -> str:
    """The text of a jinja file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise CheckpointError(f"{path} is not a chat template: not UTF-8 text, {byte}") from None


def _template_file(tokenizer: Tokenizer) -> Path:
    names = ("chat_template.jinja", "chat_templates/default.jinja")
    files = [tokenizer.path.parent / name for name in names]
    return next((file for file in files if file.is_file()), tokenizer.path.with_name("tokenizer_config.json"))


def _name(model: str) -> str:
    """The part of a path or Hub id that names the model: a file's folder too; the repository of the Hub's cache."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    for part in path.parts:
        if part.startswith("models--"):
            return part.split("--")[-1]
    return f"{path.parent.name} {path.name}" if path.is_file() else path.name
