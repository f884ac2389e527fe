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

    That it is there says little: it may be too old for the NumPy beside it, or want a folder that cannot be written.
    """
    try:
        found = importlib.util.find_spec(package)
    except ImportError:  # of a finder that keeps the package out
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
    """An optional dependency is missing or broken; the message names the pip extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        why = why_unusable(package) or NOT_INSTALLED
        said = f"is {why}" if why == NOT_INSTALLED else f"is installed but cannot be imported ({why})"
        super().__init__(f"{feature} needs {package!r}, which {said}: pip install 'fastllama[{extra}]'")


class TuningError(ValueError):
    """A file of tuned launch configurations that is broken or meant for something else; names the file and field."""


class BackendError(RuntimeError):
    """FASTLLAMA_BACKEND, or the device, asks for an implementation of an op that cannot run here."""


class QueueFullError(RuntimeError):
    """More requests wait than an AsyncEngine lets wait; nothing was queued, and a later try may succeed."""


class RequestError(RuntimeError):
    """A request that failed while it ran, or was aborted; its `__cause__` is what was raised.

    outputs: of LLM.generate, those of all its prompts (RequestOutput), for most of which nothing failed.
    reason: "error" where something was raised, "abort" where somebody ended it, "deadline" where that passed before its
    prompt was tokenized; afterwards a deadline raises nothing, and is the finish_reason of what came by then.
    """

    def __init__(
        self, message: str, outputs: Sequence[Any] = (), *, reason: Literal["error", "abort", "deadline"] = "error"
    ) -> None:
        super().__init__(message)
        self.outputs, self.reason = outputs, reason


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, "1 token" or "2 tokens"; the plural ends in s unless it is given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shown(text: object, limit: int = 200) -> str:
    """A name or path in a message: control characters as escapes, and of a long one both ends, `limit` characters."""
    letters, half = str(text), limit // 2
    if len(letters) > limit:
        letters = f"{letters[:half]}...{letters[-half:]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in letters)


class _Brief(reprlib.Repr):
    """Representations for messages: of a long string, list or dict the first elements, of a huge integer its length."""

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
    """A value in a message: its repr, of at most about 200 characters. Raises nothing."""
    return shown(_BRIEF.repr(value))


_BRIEF = _Brief()


def nearest(word: str, legal: Iterable[str], alike: float = 0.5) -> str | None:
    """The legal word most like `word`, or None when nothing is close: `alike` as difflib's ratio, 0 to 1."""
    found = difflib.get_close_matches(word, list(legal), n=1, cutoff=alike)
    return found[0] if found else None


def check_choice(name: str, value: Any, legal: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `legal`."""
    legal = list(legal)
    if not any(isinstance(value, type(each)) and value == each for each in legal):  # an array equals nothing, not all
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
    """The legal word that an unknown one may be misspelled for, as a question; None where none is really alike.

    What has all parts of a legal word and one more, as repetition_penalty_range, means something else.
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

    hint: the sentence to say about an unknown word, given the legal ones, or None.
    """
    legal = list(legal)
    for word in unknown:
        said = hint(word, legal)
        options = f"{f'{said} Legal' if said else 'legal'} options: {', '.join(legal)}"
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
    """Raise ValueError unless the last dimension is contiguous; every other stride is honoured."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {list(tensor.stride())}; legal: a contiguous last dimension (stride 1)")


def check_device(name: str, tensor: Any, other_name: str, other: Any) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}; legal: one device for all")
