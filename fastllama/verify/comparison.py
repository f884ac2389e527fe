"""The loss of quantization: compares a model's next-token distributions with a reference's, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.llm import LLM
from fastllama.verify.estimate import Estimate
from fastllama.verify.perplexity import (
    Perplexity,
    Window,
    bar_of,
    batches_of,
    checked_windows,
    max_fed,
    mean_by_cluster,
    score,
)

# Of the reference's logits. One window may exceed it: 4096 tokens of 128256 in fp16 are 1 GB.
KEPT_BYTES = 256 * 1024**2
CHUNK_BYTES = 16 * 1024**2  # of fp32 logits compared at a time


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference on the same tokens; each difference has its paired standard error.

    nll_difference: the model's minus the reference's, in nats per token. kl: KL(reference || model) of the
    next-token distributions over the whole vocabulary, in nats per token, computed in fp32, whose rounding is about
    1e-7. top1: share of tokens for which both have the same likeliest next token.
    """

    model: Perplexity
    reference: Perplexity
    nll_difference: Estimate
    kl: Estimate
    top1: Estimate

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {name: each.as_json() for name, each in vars(self).items()}


def compare(
    llm: LLM,
    reference: LLM,
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    stride: int,
    progress: bool | None = None,
) -> Comparison:
    """Perplexity of both models on documents, KL divergence from the reference, and top-1 agreement.

    documents, context, stride, progress: as for `perplexity`. Perplexities of a quantized model and its original often
    differ by less than their standard errors; the paired differences show whether anything changed.
    Extra memory: the reference's logits of a few windows, in its dtype and on its device, at most KEPT_BYTES or those
    of one window.
    Raises the errors of `perplexity`, and ValueError before anything runs where the vocabularies differ.
    """
    windows = checked_windows(llm, documents, context, stride)
    checked_windows(reference, documents, context, stride)
    check_same_vocabulary(llm, reference, documents)
    losses: tuple[list[float], list[float]] = [], []
    seconds = [0.0, 0.0]
    divergences: list[float] = []
    agreements: list[float] = []
    max_scored = KEPT_BYTES // (reference.config.vocab_size * reference.engine.model.dtype.itemsize)
    with bar_of(windows, progress) as bar:
        for batch in batches_of(windows, max_fed(llm), max_scored):
            pairs = LogitPairs(batch)
            for side, (each, see) in enumerate(((reference, pairs.keep), (llm, pairs.compare))):
                found, took = score(each, documents, batch, see)
                losses[side].extend(found)
                seconds[side] += took
            divergences += [float(rows.sum()) for rows in pairs.kl]
            agreements += [float(rows.sum()) for rows in pairs.top1]
            del pairs, see  # free this batch's logits before the next batch's are computed
            bar.update(sum(window.num_scored for window in batch))
    differences = [ours - theirs for theirs, ours in zip(*losses, strict=True)]
    return Comparison(
        model=Perplexity.of(windows, losses[1], seconds[1]),
        reference=Perplexity.of(windows, losses[0], seconds[0]),
        nll_difference=mean_by_cluster(windows, differences),
        kl=mean_by_cluster(windows, divergences),
        top1=mean_by_cluster(windows, agreements),
    )


def check_same_vocabulary(llm: LLM, reference: LLM, documents: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where vocabulary sizes differ, or tokens of the documents stand for different text."""
    ours, theirs = llm.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ValueError(f"reference has a vocabulary of {theirs} tokens and llm of {ours}; legal: the same tokens")
    if llm.tokenizer is None or reference.tokenizer is None:
        return
    for token_id in sorted({int(each) for ids in documents for each in ids}):
        ours_read, theirs_read = (_bytes_of(each, token_id) for each in (llm.tokenizer, reference.tokenizer))
        if ours_read != theirs_read:
            raise ValueError(
                f"reference reads token {token_id} as {theirs_read!r} and llm as {ours_read!r}; legal: the same tokens"
            )


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """A token's bytes; None for an id that the tokenizer does not have."""
    return tokenizer.token_bytes(token_id, skip_special_tokens=False) if token_id < tokenizer.vocab_size else None


class LogitPairs:
    """Compares the logits of a batch of windows: stores the reference's, and reduces the model's as they arrive.

    kl, top1: of each window, fp32 [its scored tokens]. Tokens recomputed after a preemption are written twice.
    """

    def __init__(self, batch: Sequence[Window]) -> None:
        self._batch = batch
        self._kept: dict[int, Tensor] = {}
        self.kl, self.top1 = (
            [torch.full((each.num_scored,), torch.nan, dtype=torch.float32, device="cpu") for each in batch]
            for _ in range(2)
        )

    def keep(self, number: int, position: int, logits: Tensor) -> None:
        """Callback for LLM.score's on_logits, of the reference."""
        if number not in self._kept:
            self._kept[number] = logits.new_empty(self._batch[number].num_scored, logits.shape[1])
        self._kept[number][self._rows(number, position, len(logits))] = logits

    def compare(self, number: int, position: int, logits: Tensor) -> None:
        """Callback for LLM.score's on_logits, of the model."""
        rows = self._rows(number, position, len(logits))
        kept, size = self._kept[number][rows], max(CHUNK_BYTES // (4 * logits.shape[1]), 1)
        found = [
            divergence_and_agreement(ours, theirs.to(ours.device))
            for ours, theirs in zip(logits.split(size), kept.split(size), strict=True)
        ]
        self.kl[number][rows] = torch.cat([kl for kl, _ in found]).cpu()
        self.top1[number][rows] = torch.cat([same for _, same in found]).float().cpu()

    def _rows(self, number: int, position: int, count: int) -> slice:
        window = self._batch[number]
        first = position - (window.first - window.begin)
        return slice(first, first + count)


@torch.inference_mode()
def divergence_and_agreement(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || logits) in nats, fp32 [R], and whether their largest entries have the same index, bool [R].

    logits, reference: [R, V] of any floating dtype.
    """
    ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    shares = theirs.exp()
    kl = torch.where(shares > 0, shares * (theirs - ours), 0).sum(-1)  # 0 log 0 = 0, also for logits of -inf
    return kl, logits.argmax(-1) == reference.argmax(-1)
