"""Llama 2's chat format: a conversation to the token ids that the chat models were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastllama.io.chat.messages import Markers, Message, Tags, check_messages, check_turns, without_markers
from fastllama.io.chat.whole import TAGS, turns_of, without_special
from fastllama.io.tokenizer import Tokenizer

_BLANK = " \t\n\u3000\u00a0"
# Conversations that a template must render as Meta does to count as Llama 2's, with blanks to strip and blanks to keep.
_PROBES: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, (f"{_BLANK}Hi  all{_BLANK}",)),
    (None, ("",)),
    ("", (" Hi ",)),
    (f"{_BLANK}Be\nbrief.{_BLANK}", (f"{_BLANK}Hi{_BLANK}",)),
    (None, ("one", "two", "three")),
    ("s", (f"{_BLANK}one\n", f"{_BLANK}two{_BLANK}", f"{_BLANK}three{_BLANK}", "", "five")),
)


def encode(
    tokenizer: Tokenizer, special: Sequence[str], messages: Sequence[Message], tags: Tags, continues: bool
) -> list[int]:
    """Token ids of the prompt for the next answer, as `chat_completion` of Meta's Llama 2 reference (generation.py).

    Each finished turn is BOS, "[INST] user [/INST] assistant ", EOS; the last is BOS, "[INST] user [/INST]". A system
    message is prepended to the first user message, as "<<SYS>>\\nsystem\\n<</SYS>>\\n\\n"; only then are contents
    stripped. Each turn is encoded separately, so it begins with SentencePiece's leading space. The chat template on
    Hugging Face gives the same ids, except that

    - transformers 5 leaves out that space after each BOS (the piece "[", not "▁[") unless the files set
      `legacy: true`, or have a `Prepend` in tokenizer.json and a tokenizer_class that is not LlamaTokenizer;
    - "<s>" and "</s>" inside contents become control ids there, and stay plain text here and in Meta's reference.

    With `continues`, the last message is the assistant's, to be continued: "[INST] user [/INST] assistant", without the
    blank and EOS that would follow.

    Contents may contain neither TAGS nor the `special` pieces that this tokenizer encodes as ids in plain text.
    """
    messages = check_messages(messages)
    check_turns(messages, continues)
    *finished, last = _turns(without_markers(messages, Markers((*TAGS, *special)), tags))
    ids: list[int] = []
    for turn in finished:
        ids += tokenizer.encode(turn, bos=True)
        ids.append(tokenizer.eos_token_id)
    return ids + tokenizer.encode(last, bos=True)


def encode_whole(tokenizer: Tokenizer, special: Sequence[str], text: str, tags: Tags) -> list[int] | None:
    """Token ids of a text that is a whole prompt in this format (see whole.py), None of any other.

    "<s>" before and "</s>" after a turn are BOS and EOS. `special` pieces inside turns never become ids.
    """
    turns = turns_of(text)
    if turns is None:
        return None
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for index, turn in enumerate(turns):
        ids += [tokenizer.eos_token_id] * (index > 0) + bos * turn.begins
        ids += tokenizer.encode(without_special(turn.text, Markers(special), tags), bos=False)
    return ids


def is_written_by(render: Callable[[Sequence[Message]], str], bos: str, eos: str) -> bool:
    """Whether a chat template renders conversations as Meta does; its output is compared, not its source."""
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
    """The text of each turn, without BOS and EOS; the last has no answer yet, or an unfinished one."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
    contents = [content.strip() for content in contents]
    turns = [f"[INST] {user} [/INST]" for user in contents[::2]]
    for index, assistant in enumerate(contents[1::2]):
        turns[index] += f" {assistant} "
    return [*turns[:-1], turns[-1].rstrip()]
