"""Perplexity of a model on a text, computed by the runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from fastllama.errors import counted
from fastllama.progress import progress_bar
from fastllama.runtime.llm import LLM
from fastllama.runtime.values import integer
from fastllama.verify.estimate import Estimate

STEPS_OF_A_BATCH = 4  # steps' worth of windows queued at once: keeps steps full, and the progress bar moving

OnLogits = Callable[[int, int, Tensor], None]


class Window(NamedTuple):
    """A window of a document: document[begin : end], of which tokens from `first` on are scored.

    The last token is scored but not fed.
    """

    document: int
    begin: int
    first: int
    end: int

    @property
    def num_scored(self) -> int:
        """Number of tokens that this window scores."""
        return self.end - self.first


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text, and its conditions.

    tokens: number scored. nll: negative log-likelihood in nats per token, standard error by document, or by window
    where there is one document. seconds: of scoring; in a comparison, including storing or comparing the logits.
    """

    documents: int
    windows: int
    tokens: int
    nll: Estimate
    seconds: float

    @classmethod
    def of(cls, windows: Sequence[Window], losses: Sequence[float], seconds: float) -> Perplexity:
        """From the summed negative log-likelihood of each window."""
        tokens = sum(window.num_scored for window in windows)
        documents = len({window.document for window in windows})
        return cls(documents, len(windows), tokens, mean_by_cluster(windows, losses), seconds)

    @property
    def perplexity(self) -> Estimate:
        """exp of `nll`."""
        return self.nll.exp()

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second; with a stride below the context more tokens are fed."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            **vars(self),
            "nll": self.nll.as_json(),
            "perplexity": self.perplexity.as_json(),
            "tokens_per_second": self.tokens_per_second,
        }


def windows_of(length: int, context: int, stride: int, document: int = 0) -> Iterator[Window]:
    """The windows that score each of a document's tokens but the first exactly once.

    Window k feeds `context` tokens from k * stride on and scores the predicted tokens that no earlier window has
    scored: the first window `context`, each further one `stride`. With stride == context windows are disjoint, each
    fed from the last token that the previous one scored; with a smaller stride they slide, and each token after the
    first window is predicted from more than context - stride tokens. Press et al., Shortformer, arXiv:2012.15832,
    describe both ("nonoverlapping" and "sliding window").

    Hugging Face's guide (transformers, "Perplexity of fixed-length models") takes targets from the fed tokens only, so
    that the token after a window's last is not predicted: its first window scores context - 1 tokens, tokens of later
    ones have one token less of context, and disjoint windows leave out the first token of each. llama.cpp's perplexity
    scores the second half of each of its disjoint windows.
    """
    begin, first = 0, 1
    while first < length:
        end = min(begin + context + 1, length)
        yield Window(document, begin, first, end)
        begin, first = begin + stride, end


def check_documents(documents: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where there is no document, or a document has no token to score."""
    if not documents:
        raise ValueError("documents is empty; legal: at least one document")
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            raise ValueError(
                f"document {number} has {counted(len(ids), 'token')}; legal: at least 2, as the first is not scored"
            )


def checked_windows(llm: LLM, documents: Sequence[Sequence[int]], context: int, stride: int) -> list[Window]:
    """All windows of all documents. Raises the ValueErrors of `perplexity`."""
    context = integer("context", context, 1, llm.max_model_len)
    stride = integer("stride", stride, 1, context)
    check_documents(documents)
    each = (windows_of(len(ids), context, stride, number) for number, ids in enumerate(documents))
    return list(chain.from_iterable(each))


def batches_of(windows: Sequence[Window], max_fed: int, max_scored: int | None = None) -> Iterator[list[Window]]:
    """Group windows into batches that feed and score at most this many tokens, at least one window each."""
    batch: list[Window] = []
    fed = scored = 0
    for window in windows:
        fed += window.end - window.begin - 1
        scored += window.num_scored
        if batch and (fed > max_fed or (max_scored is not None and scored > max_scored)):
            yield batch
            batch, fed, scored = [], window.end - window.begin - 1, window.num_scored
        batch.append(window)
    if batch:
        yield batch


def max_fed(llm: LLM) -> int:
    """Maximum number of fed tokens per batch."""
    return STEPS_OF_A_BATCH * llm.engine.scheduler.max_num_batched_tokens


def score(
    llm: LLM, documents: Sequence[Sequence[int]], batch: Sequence[Window], on_logits: OnLogits | None = None
) -> tuple[list[float], float]:
    """The summed negative log-likelihood of each window, and the seconds taken. on_logits: as for LLM.score."""
    start = time.perf_counter()
    prompts = [documents[window.document][window.begin : window.end] for window in batch]
    outputs = llm.score(prompts, [window.first - window.begin for window in batch], on_logits=on_logits, progress=False)
    return [-output.cumulative_logprob for output in outputs], time.perf_counter() - start


def mean_by_cluster(windows: Sequence[Window], totals: Sequence[float]) -> Estimate:
    """The mean per token, given the sum totals[i] over window i; clustered by document if there are several."""
    by_document = len({window.document for window in windows}) > 1
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for number, (window, total) in enumerate(zip(windows, totals, strict=True)):
        cluster = window.document if by_document else number
        sums[cluster] = sums.get(cluster, 0.0) + total
        counts[cluster] = counts.get(cluster, 0) + window.num_scored
    return Estimate.ratio(list(sums.values()), list(counts.values()))


def perplexity(
    llm: LLM, documents: Sequence[Sequence[int]], *, context: int, stride: int, progress: bool | None = None
) -> Perplexity:
    """The perplexity of a model on documents of token ids (`text_documents`), with its quantization and KV cache.

    context: window length in tokens, at most max_model_len. stride: tokens that each window but the first scores, 1 to
    context; see `windows_of`. Each document's first token is not scored. progress: a bar; None shows it on a terminal
    only.
    Raises ValueError before anything runs for a document of fewer than 2 tokens, and the errors of LLM.score.
    """
    windows = checked_windows(llm, documents, context, stride)
    losses: list[float] = []
    seconds = 0.0
    with bar_of(windows, progress) as bar:
        for batch in batches_of(windows, max_fed(llm)):
            found, took = score(llm, documents, batch)
            losses += found
            seconds += took
            bar.update(sum(window.num_scored for window in batch))
    return Perplexity.of(windows, losses, seconds)


def bar_of(windows: Sequence[Window], progress: bool | None) -> Any:
    """A progress bar of scored tokens."""
    return progress_bar("Perplexity", progress, total=sum(window.num_scored for window in windows), unit="token")
