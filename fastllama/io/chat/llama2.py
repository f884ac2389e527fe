"""Llama 2's chat format: a conversation to the token ids that the chat models were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastllama.io.chat.messages import Markers, Message, Tags, check_messages, check_turns, without_markers
from fastllama.io.tokenizer import Tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_BLANK = " \t\n\u3000\u00a0"
# What a template must write as Meta does to be taken for Llama 2's: strings that it strips, and those that it must not.
_PROBES: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, (f"{_BLANK}Hi  all{_BLANK}",)),
    (None, ("",)),
    ("", (" Hi ",)),
    (f"{_BLANK}Be\nbrief.{_BLANK}", (f"{_BLANK}Hi{_BLANK}",)),
    (None, ("one", "two", "three")),
    ("s", (f"{_BLANK}one\n", f"{_BLANK}two{_BLANK}", f"{_BLANK}three{_BLANK}", "", "five")),
)


def encode(tokenizer: Tokenizer, special: Sequence[str], messages: Sequence[Message], tags: Tags) -> list[int]:
    """Token ids that ask for the next answer: those of `chat_completion` in Meta's Llama 2 reference (generation.py).

    Each finished turn is BOS, "[INST] user [/INST] assistant ", EOS; the last is BOS, "[INST] user [/INST]". A system
    message is first put before the first user message, as "<<SYS>>\\nsystem\\n<</SYS>>\\n\\n"; only then are contents
    stripped. Each turn is encoded by itself, so it begins with SentencePiece's leading space. The chat template on
    Hugging Face gives the same ids, except that

    - transformers 5 leaves out that space after each BOS (the piece "[", not "▁[") where the files do not ask for it by
      `legacy: true`, or by a `Prepend` in tokenizer.json and a tokenizer_class that is not LlamaTokenizer;
    - "<s>" and "</s>" inside contents become control ids there, and stay plain text here and in Meta's reference.

    Contents may hold neither TAGS nor the `special` pieces that this tokenizer reads as ids in plain text.
    """
    messages = check_messages(messages)
    check_turns(messages)
    *finished, last = _turns(without_markers(messages, Markers((*TAGS, *special)), tags))
    ids: list[int] = []
    for turn in finished:
        ids += tokenizer.encode(turn, bos=True)
        ids.append(tokenizer.eos_token_id)
    return ids + tokenizer.encode(last, bos=True)


def is_written_by(render: Callable[[Sequence[Message]], str], bos: str, eos: str) -> bool:
    """Whether a chat template writes conversations as Meta does: told by what it renders, not by its text."""
    for system, contents in _PROBES:
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for index, content in enumerate(contents):
            messages.append({"role": ("user", "assistant")[index % 2], "content": content})
        *finished, last = _turns(messages)
        expected = "".join(f"{bos}{turn}{eos}" for turn in finished) + bos + last
        try:
            if render(messages) != expected:
                return False
        except ValueError:
            return False
    return True


def _turns(messages: Sequence[Message]) -> list[str]:
    """The text of each turn, without BOS and EOS; the last waits for its answer."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
    *finished, last = [content.strip() for content in contents]
    pairs = zip(finished[::2], finished[1::2], strict=True)
    return [*(f"[INST] {user} [/INST] {assistant} " for user, assistant in pairs), f"[INST] {last} [/INST]"]
