"""Converts prompts to token ids: text, token ids in any container, or the messages of a chat."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from fastllama.errors import brief, counted
from fastllama.io.chat import ChatFormat, Message, chat_format
from fastllama.io.chat.messages import Tags
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.config import LlamaConfig
from fastllama.runtime.params import MAX_LOGPROBS, SamplingParams
from fastllama.runtime.planning.sequence import Scoring
from fastllama.runtime.values import integer

# A text, token ids (a sequence, a NumPy array or a one-dimensional tensor), {"prompt": text}, {"prompt_token_ids":
# ids}, or messages.
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | Any"
_BYTES = (bytes, bytearray, memoryview)  # ambiguous: text or numbers
_LEGAL = "a text, token ids, or the messages of a chat"


class Prepared(NamedTuple):
    """An encoded prompt and its sampling parameters. text: None if token ids were given.

    continues_text: whether the answer continues the prompt's text, or is a text of its own.
    scoring: set if the prompt is scored; its last token is in there, not in token_ids.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    text: str | None
    continues_text: bool = True
    scoring: Scoring | None = None


class PromptEncoder:
    """Encodes prompts with a checkpoint's tokenizer and chat format. Thread-safe.

    choice: the `chat_format` option. name: the user's name for the model. max_model_len: tokens of prompt and answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: LlamaConfig,
        max_model_len: int,
        choice: str,
        name: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self._config, self._max_model_len = config, max_model_len
        self._choice, self._name = choice, name
        self._chat_format: ChatFormat | None = None

    @property
    def chat_format(self) -> ChatFormat:
        """The chat format: how to encode conversations and end answers. If inferred, a warning is logged once."""
        if self._chat_format is None:
            self._chat_format = chat_format(self.needed_tokenizer(), choice=self._choice, model=self._name)
        return self._chat_format

    def needed_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises ValueError if there is none."""
        if self.tokenizer is None:
            raise ValueError("tokenizer is None and the model has none; legal for text: tokenizer=PATH")
        return self.tokenizer

    def encode(self, prompt: Prompt, *, tags: Tags = "refuse", add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a prompt.

        tags: for messages, what to do with text that imitates another role; see ChatFormat.encode.
        add_special_tokens: False takes a text as the output of a chat template: special tokens in it ("<s>") become
        their ids, and none are added.
        Raises TypeError for illegal prompts, ValueError for text or messages without a tokenizer.
        """
        prompt = _unwrapped(prompt)
        if isinstance(prompt, str):
            return self._encode_text(prompt, add_special_tokens)
        if is_chat(prompt):
            return self.chat_format.encode(cast("Sequence[Message]", prompt), tags=tags)
        return token_ids(prompt)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        continues_text: bool | None = None,
    ) -> Prepared:
        """Encodes a prompt, truncated as `params` require, and adds the chat format's stop conditions for messages.

        continues_text: None is False for messages, whose answer is a text of its own, and True otherwise.
        Raises what `encode` raises, and ValueError for a text too long to be tokenized.
        """
        self.check_length(prompt, params)
        ids, prompt = self.encode(prompt, tags=tags, add_special_tokens=add_special_tokens), _unwrapped(prompt)
        if (kept := self._kept(params)) is not None:
            ids = ids[-kept:]
        asks = is_chat(prompt)
        ending = self.ending_answers(params, cast("Sequence[Message]", prompt)) if asks else params
        goes_on = not asks if continues_text is None else continues_text
        return Prepared(tuple(ids), ending, prompt if isinstance(prompt, str) else None, goes_on)

    def prepare_scored(
        self,
        prompt: Prompt,
        start: int = 1,
        on_logits: Callable[[int, Any], None] | None = None,
        *,
        top_logprobs: int = 0,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
    ) -> Prepared:
        """Prepares a prompt whose tokens are scored from position `start` on; see LLM.score.

        Raises what `encode` raises, and ValueError if `start` leaves no token to score, or no token before it.
        """
        if on_logits is not None and not callable(on_logits):
            raise TypeError(f"on_logits is {brief(on_logits)}; legal: a callable, or None")
        self.check_length(prompt)
        ids, given = self.encode(prompt, tags=tags, add_special_tokens=add_special_tokens), _unwrapped(prompt)
        if not all(map(_is_integer, ids)):
            raise TypeError(f"prompt is {brief(prompt)}; legal: a text, token ids, or the messages of a chat")
        if len(ids) < 2:
            raise ValueError(
                f"the prompt has {counted(len(ids), 'token')}; legal: at least 2, as the first is not scored"
            )
        start = integer("start", start, 1, len(ids) - 1)
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=integer("top_logprobs", top_logprobs, 0, MAX_LOGPROBS), seed=0
        )
        scoring = Scoring(start, ids[-1], on_logits)
        return Prepared(tuple(ids[:-1]), params, given if isinstance(given, str) else None, scoring=scoring)

    def check_length(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Raises ValueError for a text that cannot fit in any tokenization, by its length alone.

        params: None for a prompt that is scored.
        """
        prompt = _unwrapped(prompt)
        if self.tokenizer is None or not isinstance(prompt, str) or (params and self._kept(params) is not None):
            return
        least, more = self.tokenizer.least_length(prompt), -1 if params else 1
        if least > self._max_model_len + more:
            said = "one less than max_model_len" if params else "one more than max_model_len"
            raise ValueError(
                f"the prompt has {counted(len(prompt), 'character')}, which are {counted(least, 'token')} or more; "
                f"legal: at most {self._max_model_len + more} tokens, {said}"
            )

    def _encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self.needed_tokenizer()
        if not add_special_tokens:
            return tokenizer.encode_template(text)
        ids = tokenizer.encode(text)
        if not ids and tokenizer.bos_token_id is not None:  # no token to start from; as in transformers' generate
            return [tokenizer.bos_token_id]
        return ids

    def _kept(self, params: SamplingParams) -> int | None:
        """Number of tokens that truncation keeps of a prompt's end; None keeps all."""
        kept = params.truncate_prompt_tokens
        return kept if kept != -1 else max(1, self._max_model_len - (params.max_tokens or 1))

    def ending_answers(self, params: SamplingParams, messages: Sequence[Message]) -> SamplingParams:
        """Returns the parameters with the chat format's stop strings and tokens for an answer to these messages."""
        chat = self.chat_format
        ids = [] if params.ignore_eos else [i for i in chat.stop_token_ids if i not in self._config.eos_token_ids]
        stop, stop_token_ids = (*params.stop, *chat.stop_after(messages)), (*params.stop_token_ids, *ids)
        return params.changed(stop=stop, stop_token_ids=stop_token_ids)


def continues_message(content: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the text generated after these ids continues the last assistant message, whose content is given.

    Not if the chat format has dropped blanks at its end, since the answer's leading space would double them; and not if
    it is blank, since then nothing is continued.
    """
    blanks = content[len(content.rstrip()) :]
    return blanks != content and (not blanks or tokenizer.decode(token_ids).endswith(blanks))


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def length_of(prompt: Prompt) -> int:
    """Length of a prompt: characters of a text or of a chat's contents, or token ids; 0 if unknown."""
    prompt = _unwrapped(prompt)
    if is_chat(prompt):
        return sum(len(str(message.get("content", ""))) for message in prompt if isinstance(message, Mapping))
    return len(prompt) if hasattr(prompt, "__len__") and getattr(prompt, "ndim", 1) > 0 else 0


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Returns the prompts in an argument: one, or several in any iterable. Raises TypeError for anything else."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "tolist") and not isinstance(prompts, _BYTES):  # an array or a tensor
        prompts = prompts.tolist()
    if isinstance(prompts, Iterable) and not isinstance(prompts, _BYTES):
        each = list(prompts)
        if each and _is_integer(each[0]):
            return [each]
        if all(map(_may_be_prompt, each)):
            return each
    raise TypeError(f"prompts is {brief(prompts)}; legal: a text, texts, token ids, or lists of token ids")


def token_ids(values: Any) -> list[int]:
    """Returns token ids in any container as Python integers. Raises TypeError for other values."""
    if hasattr(values, "tolist") and not isinstance(values, _BYTES):
        values = values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, (str, *_BYTES, Mapping)):
        ids = list(values)
        # Non-integers stay, so that the check of the request can report their position.
        return list(map(operator.index, ids)) if all(map(_is_integer, ids)) else ids
    raise TypeError(f"prompt is {brief(values)}; legal: {_LEGAL}")


def _unwrapped(prompt: Prompt) -> Prompt:
    """Returns the prompt in a mapping of one entry, as vLLM's TextPrompt and TokensPrompt are."""
    if not isinstance(prompt, Mapping):
        return prompt
    if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
        raise TypeError(
            f"prompt is {brief(dict(prompt))}; legal: {_LEGAL}, also as {{'prompt': text}} or "
            "{'prompt_token_ids': ids}; messages are a list"
        )
    ((name, value),) = prompt.items()
    if not isinstance(value, Mapping) and isinstance(value, str) != (name == "prompt"):
        raise TypeError(f"{name} of a prompt is {brief(value)}; legal: {'a text' if name == 'prompt' else 'token ids'}")
    return value


def _is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy, or a 0-d integer tensor; booleans are not."""
    if type(value) is int:
        return True
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0) > 0:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _may_be_prompt(value: Any) -> bool:
    return (isinstance(value, (Sequence, Mapping)) or hasattr(value, "tolist")) and not isinstance(value, _BYTES)
