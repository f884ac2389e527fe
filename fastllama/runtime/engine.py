"""The engine step: schedule, run, sample, postprocess."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

from fastllama.errors import check_range
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime import sampler
from fastllama.runtime.block_pool import BlockPool
from fastllama.runtime.generation import Generation
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.runner import Runner
from fastllama.runtime.scheduler import Scheduler
from fastllama.runtime.sequence import Request


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the runtime. kv_cache_tokens is rounded up to whole pages."""

    max_model_len: int
    kv_cache_tokens: int
    page_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_tokens", "page_size", "max_num_seqs", "max_num_batched_tokens", "seed"):
            value = getattr(self, name)
            check_range(name, value, 0 if name == "seed" else 1)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")


class Engine:
    """Requests in, tokens out, one step at a time, on the caller's thread.

    step() may raise what the model raises; the requests then stay, and are recomputed by the next step.
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer | None, options: EngineOptions) -> None:
        model.set_max_model_len(options.max_model_len)
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.pool = BlockPool(-(-options.kv_cache_tokens // options.page_size), options.page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
        )
        self._runner = Runner(model, self.pool.num_pages, options.page_size)
        self._generations: dict[str, Generation] = {}
        self._numbers = itertools.count()
        self._seeds = random.Random(options.seed)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add_request(
        self, prompt_token_ids: Items[int], params: SamplingParams, *, prompt: str | None = None
    ) -> Generation:
        """Queue a prompt. Raises ValueError, and changes nothing, if it can never run or holds an id out of range."""
        ids = tuple(prompt_token_ids)
        vocab = self.model.config.vocab_size
        for place, token_id in enumerate(ids):
            if not isinstance(token_id, int) or not 0 <= token_id < vocab:
                raise ValueError(f"prompt token {place} is {token_id!r}; legal: integers from 0 to {vocab - 1}")
        for token_id in (*(params.logit_bias or ()), *params.stop_token_ids):
            check_range("a token id in logit_bias or stop_token_ids", token_id, 0, vocab - 1)
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop is {params.stop!r}; legal without a tokenizer: no stop strings, only stop_token_ids"
            )
        if params.seed is None:
            params = dataclasses.replace(params, seed=self._seeds.getrandbits(63))
        request = Request(str(next(self._numbers)), ids, params, time.monotonic())
        self.scheduler.add(request)
        generation = Generation(request, prompt, self.tokenizer)
        self._generations[request.request_id] = generation
        return generation

    def abort(self, generation: Generation) -> None:
        """End a request now; its pages return at once. Without effect on a finished one."""
        if self._generations.pop(generation.request.request_id, None) is None:
            return
        self.scheduler.abort(generation.request)
        for sample in generation.samples.values():
            if sample.stream is not None and sample.seq.finish_reason == "abort":
                sample.stream.close()

    def step(self) -> list[Generation]:
        """Advance every request that can run; returns those that gained a token."""
        step = self.scheduler.schedule()
        if step is None:
            return []
        try:
            logits = self._runner.run(step)
            prompt_logprobs = sampler.prompt_logprobs(logits)
            draws = sampler.draw(logits)
        except BaseException:
            self.scheduler.rollback(step)
            raise
        self.scheduler.commit(step)
        for seq, first, logprobs in prompt_logprobs:
            self._generations[seq.request.request_id].prompt_logprobs.update(enumerate(logprobs, first))
        now = time.monotonic()
        touched = {draw.seq.request.request_id: self._accept(draw, now) for draw in draws}
        for generation in touched.values():
            if generation.finished:
                generation.finish_time = now
                del self._generations[generation.request.request_id]
        return list(touched.values())

    def _accept(self, draw: sampler.Draw, now: float) -> Generation:
        """Give a sequence its token and see whether it ends there."""
        seq, token_id = draw.seq, draw.token_id
        generation = self._generations[seq.request.request_id]
        sample, params = generation.sample(seq), seq.request.params
        if not draw.finite:
            self.scheduler.finish(seq, "error", "the model's logits are not finite numbers")
            return generation
        if generation.first_token_time is None:
            generation.first_token_time = now
        self.scheduler.append(seq, token_id)
        if draw.logprob is not None:
            sample.logprobs.append(draw.logprob)
        ends = token_id in params.stop_token_ids
        stop: str | int | None = token_id if ends else None
        ends = ends or (not params.ignore_eos and token_id in self.model.config.eos_token_ids)
        full = len(seq.token_ids) >= seq.max_length
        if sample.stream is not None:
            # A stop token asked for by id is the caller's mark, not text.
            reached = sample.stream.push(token_id) if stop is None else None
            if reached is None and (ends or full):
                reached = sample.stream.close()
            if reached is not None:
                ends, stop = True, reached
        if ends:
            self.scheduler.finish(seq, "stop", stop)
        elif full:
            self.scheduler.finish(seq, "length")
        return generation
