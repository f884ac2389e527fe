"""Checks at the public boundary: one sentence that names the argument, the value seen and what is legal.

Free of torch, so that the scheduler and the command line can use it; of tensors only shape, dtype, strides and device
are read.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal


class CheckpointError(ValueError):
    """A checkpoint that is broken or does not hold the model it declares; the message names the file and the tensor."""


NOT_INSTALLED = "not installed"


def why_unusable(package: str) -> str | None:
    """Why an optional package cannot be used: NOT_INSTALLED, or what importing it raises. None where it works.

    An installed package may still fail: too old for the installed NumPy, or without a writable cache folder.
    """
    try:
        found = importlib.util.find_spec(package)
    except ImportError:  # raised by an import hook that blocks the package
        found = None
    if found is None:
        return NOT_INSTALLED
    try:
        importlib.import_module(package)
    except Exception as error:
        return summary(error)
    return None


def summary(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


class ExtraRequiredError(ImportError):
    """An optional dependency is missing or broken; the message names the pip extra that installs it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        why = why_unusable(package) or NOT_INSTALLED
        state = f"is {why}" if why == NOT_INSTALLED else f"is installed but cannot be imported ({why})"
        super().__init__(f"{feature} needs {package!r}, which {state}: pip install 'fastllama[{extra}]'")


class TuningError(ValueError):
    """A file of tuned launch configurations is broken or has another purpose; the message names the file and field."""


class BackendError(RuntimeError):
    """The implementation of an op that FASTLLAMA_BACKEND or the device selects cannot run here."""


class QueueFullError(RuntimeError):
    """The queue of an AsyncEngine is full; the request was not queued, and a later try may succeed."""


class RequestError(RuntimeError):
    """A request failed while it ran, or was aborted; its `__cause__` is the original exception.

    outputs: from LLM.generate, the RequestOutputs of all its prompts, including those that did not fail.
    reason: "error" for an exception, "abort" for a request that was aborted, "deadline" for one whose deadline passed
    before its prompt was tokenized. A later deadline raises nothing: it is the finish_reason of the partial output.
    """

    def __init__(
        self, message: str, outputs: Sequence[Any] = (), *, reason: Literal["error", "abort", "deadline"] = "error"
    ) -> None:
        super().__init__(message)
        self.outputs, self.reason = outputs, reason


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, "1 token" or "2 tokens"; `plural` where that does not end in s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shown(text: object, limit: int = 200) -> str:
    """A name or path for a message: control characters escaped, the middle cut out beyond `limit` characters."""
    letters, half = str(text), limit // 2
    if len(letters) > limit:
        letters = f"{letters[:half]}...{letters[-half:]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in letters)


class _Brief(reprlib.Repr):
    """Short representations for messages: the first elements of a long value, the length of a huge integer."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 20

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() <= 1024:
            return repr(x)
        digits = int(x.bit_length() * math.log10(2)) + 1  # Python refuses to write more than 4300
        return f"{'minus ' if x < 0 else ''}an integer of {digits} digits"


def brief(value: object) -> str:
    """A value for a message: its repr, cut to about 200 characters. Never raises."""
    return shown(_BRIEF.repr(value))


_BRIEF = _Brief()


def nearest(word: str, legal: Iterable[str], alike: float = 0.5) -> str | None:
    """The legal word most similar to `word`; None below the ratio `alike` of difflib, 0 to 1."""
    found = difflib.get_close_matches(word, list(legal), n=1, cutoff=alike)
    return found[0] if found else None


def check_choice(name: str, value: Any, legal: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `legal`."""
    legal = list(legal)
    # Types first: an array is never legal, and its == is no bool.
    if not any(isinstance(value, type(each)) and value == each for each in legal):
        hint = nearest(value, [word for word in legal if isinstance(word, str)]) if isinstance(value, str) else None
        meant = f" (did you mean {hint!r}?)" if hint else ""
        raise ValueError(f"{name} is {brief(value)}{meant}; legal values: {', '.join(map(repr, legal))}")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless low <= value (<= high). NaN is never in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {brief(value)} of type {type(value).__name__}")
    if not (low <= value and (high is None or value <= high)):
        raise ValueError(
            f"{name} is {brief(value)}; legal: {f'at least {low}' if high is None else f'{low} to {high}'}"
        )


def similar(word: str, legal: Iterable[str]) -> str | None:
    """A "did you mean" question with the legal word that an unknown one may misspell; None if no word is close.

    A legal word with a part added, as in repetition_penalty_range, is another option and not a misspelling.
    """
    parts = _parts(word)
    others = [each for each in legal if not _parts(each) < parts]
    found = nearest(word, others, 0.8)  # temprature and temperature are, best_of and stop are not
    return f"did you mean {found!r}?" if found else None


def _parts(word: str) -> set[str]:
    return set(filter(None, word.split("_")))


def reject_unknown(
    owner: str,
    unknown: Iterable[str],
    legal: Iterable[str],
    hint: Callable[[str, Collection[str]], str | None] = similar,
) -> None:
    """Raise TypeError for the first unknown option, with a hint where there is one, and the legal options.

    hint: returns a sentence about an unknown word, given the legal words, or None.
    """
    legal = list(legal)
    for word in unknown:
        question = hint(word, legal)
        options = f"{f'{question} Legal' if question else 'legal'} options: {', '.join(legal)}"
        raise TypeError(f"{owner} got an unknown option {brief(word)}; {options}")


def check_shape(name: str, tensor: Any, shape: Sequence[int | str]) -> None:
    """Raise ValueError unless `tensor.shape` matches `shape`, where a string names a dimension of any size."""
    seen = tensor.shape
    if len(seen) == len(shape):
        for have, want in zip(seen, shape, strict=True):
            if have != want and not isinstance(want, str):
                break
        else:
            return
    raise ValueError(f"{name} has shape {list(seen)}; legal: [{', '.join(map(str, shape))}]")


def check_dtype(name: str, tensor: Any, legal: Sequence[Any]) -> None:
    """Raise TypeError unless `tensor.dtype` is one of `legal`."""
    if tensor.dtype not in legal:
        raise TypeError(f"{name} has dtype {tensor.dtype}; legal: {', '.join(map(str, dict.fromkeys(legal)))}")


def check_rows(name: str, tensor: Any) -> None:
    """Raise ValueError unless the last dimension is contiguous; all other strides are legal."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {list(tensor.stride())}; legal: a contiguous last dimension (stride 1)")


def check_device(name: str, tensor: Any, other_name: str, other: Any) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}; legal: one device for all")
