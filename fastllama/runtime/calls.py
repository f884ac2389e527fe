"""Checks of arguments shared by methods of LLM and AsyncEngine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from fastllama.errors import brief, check_choice, reject_unknown
from fastllama.io.chat.messages import Tags
from fastllama.runtime.generation import Generation
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.peer_names import peer_hint
from fastllama.runtime.values import flag

T = TypeVar("T")


def reject(unknown: Mapping[str, Any], owner: str, method: Callable[..., Any]) -> None:
    """Raise TypeError, with a hint, if there are unknown options of a method."""
    if unknown:
        legal = [name for name in inspect.signature(method).parameters if name not in ("self", "unknown")]
        reject_unknown(owner, unknown, legal, peer_hint)


def checked(**how: Any) -> dict[str, Any]:
    """Checks encoding options that apply to any kind of prompt: `tags`, `add_special_tokens`, or both."""
    if "tags" in how:
        check_choice("tags", how["tags"], get_args(Tags))
    if "add_special_tokens" in how:
        how["add_special_tokens"] = flag("add_special_tokens", how["add_special_tokens"])
    return how


def check_params(params: Any) -> None:
    """Raise TypeError unless params is SamplingParams or None."""
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"params is {brief(params)}; legal: SamplingParams or None")


def check_started(generation: Any) -> None:
    if not isinstance(generation, Generation):
        raise TypeError(f"generation is {brief(generation)}; legal: what LLM.start returns")


def check_request_id(request_id: Any, unfinished: Container[str]) -> None:
    """Raise TypeError or ValueError for an illegal request id; None is legal."""
    if request_id is None:
        return
    if not isinstance(request_id, str):
        raise TypeError(f"request_id is {brief(request_id)}; legal: a string, or None to have one made")
    if not request_id or request_id in unfinished:
        raise ValueError(f"request_id is {brief(request_id)}; legal: a text that no unfinished request has")


def params_of_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    each = [params] * count if isinstance(params, SamplingParams) else params
    if not isinstance(each, Sequence) or not all(isinstance(own, SamplingParams) for own in each):
        raise TypeError(f"params is {brief(params)}; legal: SamplingParams, or a list of one for each prompt")
    return _as_many("params", list(each), count)


@contextmanager
def naming_prompt(number: int, count: int) -> Iterator[None]:
    """Appends the prompt's number to a TypeError or ValueError raised inside, if there are several prompts."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if count > 1 and len(error.args) == 1:
            error.args = (f"{error} (prompt {number} of {count})",)
        raise


def for_each_prompt(prepare: Callable[..., T], *given: Sequence[Any]) -> list[T]:
    """Returns prepare(*own) for each prompt's own arguments; an error names the prompt if there are several."""
    each = list(zip(*given, strict=True))
    prepared = []
    for number, own in enumerate(each):
        with naming_prompt(number, len(each)):
            prepared.append(prepare(*own))
    return prepared


def starts_of_each(start: Any, count: int) -> list[Any]:
    """Returns start positions, one for all prompts or one for each; each is checked later with its prompt."""
    if hasattr(start, "tolist"):
        start = start.tolist()
    return _as_many("start", list(start), count) if isinstance(start, Sequence) else [start] * count


def _as_many(name: str, each: list[T], count: int) -> list[T]:
    if len(each) != count:
        raise ValueError(f"{name} has {len(each)} entries for {count} prompts; legal: one for all, or one for each")
    return each
