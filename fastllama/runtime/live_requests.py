"""The unfinished requests: adding, forking, collecting tokens, ending."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import abc
from collections.abc import Callable

from fastllama.errors import RequestError, brief, check_range
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.config import LlamaConfig
from fastllama.runtime.bad_words import BadWords, bad_words
from fastllama.runtime.calls import check_request_id
from fastllama.runtime.device.adjustments import ends_of
from fastllama.runtime.device.execution import Launched
from fastllama.runtime.device.sampler import SampledToken
from fastllama.runtime.generation import Generation
from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Scoring, Sequence, Status, check_fork

Gained = dict[Sequence, tuple[int, ...]]  # the tokens that a step added to each sequence


class LiveRequests:
    """The unfinished requests: the scheduler has their sequences, a Generation their text and reports.

    Methods that change both leave them inconsistent if interrupted; the engine detects that (consistency.py).
    seed: seeds the random seeds of requests without one. forget: callbacks that drop the state of ended sequences.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        config: LlamaConfig,
        seed: int,
        forget: abc.Sequence[Callable[[abc.Sequence[Sequence]], None]],
    ) -> None:
        self.scheduler = scheduler
        self.generations: dict[str, Generation] = {}
        self._tokenizer, self._config = tokenizer, config
        self._numbers = map(str, itertools.count())
        self._seeds = random.Random(seed)
        self._forget = forget

    def check(
        self, prompt_token_ids: abc.Sequence[int], params: SamplingParams, scoring: Scoring | None = None
    ) -> None:
        """Raises ValueError if the prompt can never run or has a token id out of range. Thread-safe."""
        length, limit, vocab = len(prompt_token_ids), self.scheduler.max_model_len, self._config.vocab_size
        if scoring is None and length >= limit and self._config.longest_context is None:
            raise ValueError(
                f"the prompt has {length} tokens; legal: at most {limit - 1}, one less than max_model_len, "
                "which can be raised, as the model's rope scaling is dynamic"
            )
        self.scheduler.check(length, params, scores=scoring is not None)
        last = () if scoring is None else (scoring.last_token_id,)
        for place, token_id in enumerate(itertools.chain(prompt_token_ids, last)):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab:
                raise ValueError(f"prompt token {place} is {brief(token_id)}; legal: integers from 0 to {vocab - 1}")
        for name, token_id in params.largest_ids.items():
            check_range(f"a token id in {name}", token_id, 0, vocab - 1)
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(
                    f"{name} is {brief(getattr(params, name))}; legal without a tokenizer: no strings, only token ids"
                )
        words = self._bad_words(params)
        if params.allowed is not None:
            banned = {i for i, bias in (params.logit_bias or {}).items() if bias == -math.inf}
            ends = ends_of(params, self._config.eos_token_ids) if params.min_tokens else ()
            if params.allowed <= banned | {*ends} | (words.single if words else set()):
                raise ValueError(
                    "allowed_token_ids has only tokens that logit_bias, bad_words or min_tokens ban; legal: any other"
                )

    def _bad_words(self, params: SamplingParams) -> BadWords | None:
        if not params.bad_words:
            return None
        assert self._tokenizer is not None, "checked"
        return bad_words(self._tokenizer, tuple(params.bad_words))

    def check_fork(self, generation: Generation, params: SamplingParams) -> None:
        """Raises ValueError if a request has ended, is another engine's, or cannot be forked with `params`."""
        origin = generation.request
        if origin.scoring is not None:
            raise ValueError(
                f"generation is request {origin.request_id!r}, whose prompt is scored; legal: one that generates"
            )
        if self.generations.get(origin.request_id) is not generation:
            raise ValueError(
                f"generation is request {origin.request_id!r}, which has ended or is another engine's; "
                "legal: an unfinished one of this engine"
            )
        check_fork(origin, params)
        self.check(origin.prompt_token_ids, params)

    def add(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        prompt: str | None,
        arrival: float,
        request_id: str | None,
        continues_text: bool,
        scoring: Scoring | None,
    ) -> Generation:
        """Queue a prompt that passes `check`, under an id that passes `check_id`; continues_text: see Generation."""
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        request = Request(request_id or self._new_id(), ids, params, arrival, seed=seed, scoring=scoring)
        request.bad_words = self._bad_words(params)
        self.scheduler.add(request)
        generation = Generation(request, prompt, self._tokenizer, continues_text=continues_text)
        self.generations[request.request_id] = generation
        return generation

    def fork(self, generation: Generation, params: SamplingParams, request_id: str | None) -> Generation:
        """Add a fork of a request; `check_fork` and `check_id` have passed."""
        origin, now = generation.request, time.monotonic()
        seed = params.seed
        if seed is None:
            seed = origin.seed if params is origin.params else self._seeds.getrandbits(63)
        request = Request(request_id or self._new_id(), origin.prompt_token_ids, params, now, seed=seed)
        request.bad_words = self._bad_words(params)
        self.scheduler.fork(origin.sequences[0], request)
        forked = self.generations[request.request_id] = generation.fork(request)
        return forked

    def check_id(self, request_id: str | None) -> None:
        """Raises TypeError or ValueError for an illegal or used request id. Thread-safe."""
        check_request_id(request_id, self.generations)

    def _new_id(self) -> str:
        return next(number for number in self._numbers if number not in self.generations)

    def abort(self, generation: Generation, reason: FinishReason) -> None:
        """End a request now and free its pages at once. No effect on a finished one."""
        if self.generations.get(generation.request.request_id) is generation:
            self.scheduler.abort(generation.request, reason)
            generation.abort(reason)
            self._drop(generation)

    def start_anew(self, scheduler: Scheduler, cause: str) -> None:
        """End every request with "abort", whatever the state of its sequences, and use another scheduler from now on.

        cause: the exception that interrupted a change.
        """
        for request_id, generation in list(self.generations.items()):
            try:
                generation.error = generation.error or RequestError(f"a step was interrupted by {cause}")
                generation.abort()
            except Exception:  # of a tokenizer, which would raise at each call
                del self.generations[request_id]
                raise
            self._drop(generation)
        self.generations.clear()
        self.scheduler = scheduler

    def _drop(self, generation: Generation) -> None:
        """Drop all references to a request that has ended."""
        for forget in self._forget:
            forget(generation.request.sequences)
        self.generations.pop(generation.request.request_id, None)  # last: an interrupt must still find it

    def take_in(self, launched: Launched, tokens: list[SampledToken]) -> tuple[list[Generation], Gained]:
        """Append the tokens of a step that has run; returns the generations that gained one or failed, and the tokens.

        An exception for one request fails only that request.
        """
        # Before the commit, which would publish their pages for other requests.
        touched = {request.request_id: self._fail(request, error) for request, error in launched.failures.items()}
        tokens = [token for token in tokens if token.seq.status is not Status.FINISHED]  # ended meanwhile, or failed
        for token in tokens:
            if not token.ahead and not token.finite:
                self._spoil(token.seq)
        for seq, first, logprobs in (report for part in launched.parts for report in part.prompt_logprobs):
            generation = self.generations.get(seq.request.request_id)
            if generation is None:
                continue
            generation.report_prompt(first, logprobs)
            if seq.request.scoring is not None and any(math.isnan(each.logprob) for each in logprobs):
                self._spoil(seq)
        self.scheduler.commit(launched.step)
        for chunk in launched.step.chunks:
            if chunk.samples or chunk.seq.request.scoring is None or chunk.seq.status is not Status.FINISHED:
                continue
            generation = self.generations.get(chunk.seq.request.request_id)
            if generation is not None:  # else it ended while the step ran
                touched[generation.request.request_id] = generation
        now = time.monotonic()
        gained: Gained = {}
        for token in tokens:
            generation = touched[token.seq.request.request_id] = self.generations[token.seq.request.request_id]
            ended = token.ahead and token.seq.status is Status.FINISHED
            unseen = token.ahead and generation.request.params.logits_processors
            if token.ahead != gained.get(token.seq, ()) or ended or unseen or generation.error is not None:
                continue  # sampled after a rejected draft, the end, or tokens that a processor has not seen; or failed
            try:
                self._accept(generation, token, now)
            except Exception as error:
                self._fail(generation.request, error)
            gained[token.seq] = *token.ahead, token.token_id
        for generation in touched.values():
            if generation.request.finished:
                generation.finish_time = now
                self._drop(generation)
        return list(touched.values()), gained

    def _fail(self, request: Request, error: Exception) -> Generation:
        """End a request that raised; its held text is dropped, since its tokenizer may be what raised."""
        self.scheduler.abort(request, "error", repr(error))
        generation = self.generations[request.request_id]
        generation.error = error
        return generation

    def _spoil(self, seq: Sequence) -> None:
        """End a sequence whose logits are not finite."""
        params, why = seq.request.params, "the model's logits are not finite numbers"
        if params.logits_processors:
            why = "the logits processors' results are not finite numbers"
        elif params.adjusts:
            why += ", or every token is banned"
        self.scheduler.finish(seq, "error", why)

    def _accept(self, generation: Generation, token: SampledToken, now: float) -> None:
        """Append a token to its sequence, and finish the sequence if it ends there."""
        seq, token_id = token.seq, token.token_id
        sample = generation.sample(seq)
        if not token.finite:
            self._spoil(seq)
            if sample.stream is not None:
                sample.stream.close()
            return
        if token.ahead:
            self.scheduler.keep_draft(seq)
        if generation.first_token_time is None:
            generation.first_token_time = now
        self.scheduler.append(seq, token_id)
        if token.logprob is not None:
            sample.report(token.logprob)
        ended = sample.push(token_id, self._config.eos_token_ids)
        if ended is not None:
            self.scheduler.finish(seq, *ended)
