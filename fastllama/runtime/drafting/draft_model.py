"""Draft tokens from a smaller model of the same vocabulary."""

from __future__ import annotations

from collections import abc

from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device import sampler
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.memory import Sizes
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.warm_up import warm_up
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.planning.step import Chunk, Step


class DraftModel:
    """Proposes tokens sampled from a smaller model, with the large one's sampling parameters and random numbers.

    Its KV cache has as many pages of the same size, and a token has the same page in both models. So page tables,
    sharing, copies and the prefix cache apply to both, and only the number of computed tokens of each sequence is
    tracked here. Where that is wrong, because a cached prefix was computed while drafting was off or came from the host
    cache, the drafts are worse, but no answer changes.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        large: LlamaForCausalLM,
        num_pages: int,
        page_size: int,
        sizes: Sizes,
        adjustments: Adjustments,
    ) -> None:
        """Makes a drafter beside a large model, whose logit adjustments it uses.

        Raises ValueError for another vocabulary, another device or a shorter context.
        """
        if (model.config.vocab_size, model.device) != (large.config.vocab_size, large.device):
            raise ValueError(
                f"the draft model has a vocabulary of {model.config.vocab_size} on {model.device}; legal: the model's, "
                f"{large.config.vocab_size} on {large.device}"
            )
        longest = model.config.longest_context
        if longest is not None and longest < sizes.max_model_len:
            raise ValueError(
                f"the draft model takes {longest} tokens and max_model_len is "
                f"{sizes.max_model_len}; legal: a draft model that takes as many, or a smaller max_model_len"
            )
        self._sizes = sizes
        self._runner = Runner(
            model,
            num_pages,
            page_size,
            kv_dtype=model.dtype,
            host_cache_tokens=0,
            max_num_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            deterministic=False,
            adjustments=adjustments,
        )
        self._held: dict[Sequence, tuple[int, tuple[int, ...]]] = {}  # tokens computed, drafts after them

    def warm_up(self) -> float:
        """Compile and capture prompt steps, and decode steps of one or two tokens."""
        return warm_up(self._runner, self._sizes, (1, 2))

    def follow(self, step: Step) -> None:
        """Compute the step's prompts too, so that drafting starts with their KV; decode-only steps just copy pages.

        Skips scored prompts, which get no drafts.
        """
        chunks = tuple(chunk for chunk in step.chunks if chunk.seq.request.scoring is None)
        if all(chunk.length == 1 for chunk in chunks):
            self._runner.copy(step)
            return
        num_decodes = sum(chunk.seq.request.scoring is None for chunk in step.chunks[: step.num_decodes])
        self._runner.run(Step(chunks, num_decodes, step.copies))
        for chunk in chunks:
            for seq in chunk.samples or (chunk.seq,):
                self._held[seq] = chunk.start + chunk.length, ()

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """Samples `count` tokens, one after another, for each sequence; none if any sequence has a single token."""
        if any(len(seq.token_ids) < 2 for seq in sequences):
            return [()] * len(sequences)
        for seq in sequences:
            self._catch_up(seq)
        # The first pass takes two tokens: after a fully accepted step, the last draft has not been computed here.
        chunks = [Chunk(seq, len(seq.token_ids) - 2, 2, (seq,)) for seq in sequences]
        for number in range(count):
            tokens = sampler.sample(self._runner.run(Step(tuple(chunks), num_decodes=len(chunks), copies=())))
            chunks = [
                Chunk(token.seq, len(token.seq.token_ids) + number, 1, (token.seq,), (*token.ahead, token.token_id))
                for token in tokens
            ]
        for chunk in chunks:
            self._held[chunk.seq] = len(chunk.seq.token_ids), chunk.drafts[:-1]
        return [chunk.drafts for chunk in chunks]

    def _catch_up(self, seq: Sequence) -> None:
        """Compute what a sequence gained while drafting was off, except its last two tokens."""
        start, drafts = self._held.get(seq, (0, ()))
        for token_id, draft in zip(seq.token_ids[start:], drafts, strict=False):
            if token_id != draft:
                break
            start += 1
        end = len(seq.token_ids) - 2
        while start < end:
            length = min(end - start, self._sizes.max_num_batched_tokens)
            self._runner.run(Step((Chunk(seq, start, length, ()),), num_decodes=0, copies=()))
            start += length

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Drop the state of sequences that have ended."""
        for seq in sequences:
            self._held.pop(seq, None)
