"""The engine step: schedule, run, sample, postprocess."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

from fastllama.arithmetic import ceil_div
from fastllama.errors import check_range
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.batch import KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device import memory, sampler
from fastllama.runtime.device.execution import Launched, launch
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.warm_up import warm_up
from fastllama.runtime.drafting.draft_model import DraftModel
from fastllama.runtime.drafting.prompt_lookup import PromptLookup
from fastllama.runtime.drafting.speculation import Drafter, Speculation
from fastllama.runtime.generation import Generation
from fastllama.runtime.options import KV_DTYPES, EngineOptions
from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import BlockPool
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Sequence, Status, check_fork
from fastllama.runtime.planning.step import Step

logger = logging.getLogger("fastllama")


class Engine:
    """Requests in, tokens out, one step at a time, on the caller's thread.

    step() may raise what the model raises; the requests then stay, and are recomputed by the next step (but for
    step(isolate=True), by which those fail that it raises for). What breaks
    into the bookkeeping instead (Ctrl-C, a bug) leaves nobody knowing which pages belong to whom: the next call ends
    every request with "abort" and starts with an empty pool.
    speculation: what guesses tokens (see speculation.py): "prompt_lookup", or a smaller model of the same vocabulary,
    on the same device; None guesses nothing.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
        speculation: str | LlamaForCausalLM | None = None,
    ) -> None:
        kv_dtype = KV_DTYPES[options.kv_cache_dtype] or model.dtype
        draft = speculation if isinstance(speculation, LlamaForCausalLM) else None
        more = 0 if draft is None else KVCache.bytes_per_token(draft.config, draft.dtype)
        sizes = memory.choose(model, options, kv_dtype, more)
        model.set_max_model_len(sizes.max_model_len)
        self.model, self.tokenizer = model, tokenizer
        self._options, self._sizes = options, sizes
        size = options.page_size
        self._start_anew(sizes.kv_cache_tokens // size, ceil_div(options.host_cache_tokens, size))
        self._runner = Runner(
            model,
            self.pool.num_pages,
            options.page_size,
            kv_dtype=kv_dtype,
            host_cache_tokens=options.host_cache_tokens,
            max_num_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            deterministic=options.deterministic,
        )
        self.speculation: Speculation | None = None
        if speculation is not None:
            drafter: Drafter = PromptLookup()
            if draft is not None:
                drafter = DraftModel(draft, model, self.pool.num_pages, size, sizes)
            self.speculation = Speculation(drafter, options.num_draft_tokens)
        self._generations: dict[str, Generation] = {}
        self._numbers = itertools.count()
        self._seeds = random.Random(options.seed)
        self._raised_ahead: set[type[Exception]] = set()

    def _start_anew(self, num_pages: int, num_host_pages: int) -> None:
        self.pool = BlockPool(num_pages, self._options.page_size, num_host_pages)
        self.scheduler = Scheduler(
            self.pool,
            max_num_batched_tokens=self._sizes.max_num_batched_tokens,
            max_num_seqs=self._sizes.max_num_seqs,
            max_model_len=self._sizes.max_model_len,
        )
        self._ahead: Launched | None = None  # the step after the last that was taken in, where it runs already
        self._torn = False

    def _begin(self) -> None:
        """Before a change of several parts, which sets _torn to False again when it is whole."""
        if self._torn:
            for request_id, generation in list(self._generations.items()):
                try:
                    generation.abort()
                except Exception:  # a tokenizer's, which would raise at each call
                    del self._generations[request_id]
                    raise
            self._generations.clear()
            self._start_anew(self.pool.num_pages, self.pool.num_host_pages)
        self._torn = True

    def warm_up(self) -> float:
        """Compile and capture, in pages that nobody has yet, what is so at first use. Returns the seconds it took."""
        assert not self.has_work, "a page that a request may hold would be overwritten"
        if self.speculation is None:
            return warm_up(self._runner, self._sizes)
        return warm_up(self._runner, self._sizes, (1, 1 + self.speculation.count)) + self.speculation.drafter.warm_up()

    @property
    def replays(self) -> bool:
        """Whether decode steps are captured and replayed where nothing asks for them as they are written."""
        return self._runner.replays

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def check_request(self, prompt_token_ids: Items[int], params: SamplingParams) -> None:
        """Raises ValueError if the prompt can never run or holds an id out of range. Any thread may ask."""
        vocab = self.model.config.vocab_size
        for place, token_id in enumerate(prompt_token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab:
                raise ValueError(f"prompt token {place} is {token_id!r}; legal: integers from 0 to {vocab - 1}")
        for token_id in (*(params.logit_bias or ()), *params.stop_token_ids):
            check_range("a token id in logit_bias or stop_token_ids", token_id, 0, vocab - 1)
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop is {params.stop!r}; legal without a tokenizer: no stop strings, only stop_token_ids"
            )
        self.scheduler.check(len(prompt_token_ids), params)

    def add_request(
        self,
        prompt_token_ids: Items[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        arrival: float | None = None,
    ) -> Generation:
        """Queue a prompt. Raises ValueError, and changes nothing, where check_request does.

        arrival: when it came, by time.monotonic(); None is now.
        """
        ids = tuple(prompt_token_ids)
        self.check_request(ids, params)
        self._begin()
        request = Request(str(next(self._numbers)), ids, params, time.monotonic() if arrival is None else arrival)
        self.scheduler.add(request)
        self._give_seed(request)
        generation = Generation(request, prompt, self.tokenizer)
        self._generations[request.request_id] = generation
        self._torn = False
        return generation

    def fork(self, generation: Generation, params: SamplingParams | None = None) -> Generation:
        """A new request that goes on from where an unfinished one stands; see LLM.fork.

        Raises ValueError, and changes nothing, if that has ended, is another engine's, or cannot go on with `params`.
        """
        self._begin()  # which ends it where an interrupt has torn the engine
        self._torn = False
        origin = generation.request
        if self._generations.get(origin.request_id) is not generation:
            raise ValueError(
                f"generation is request {origin.request_id!r}, which has ended or is another engine's; "
                "legal: an unfinished one of this engine"
            )
        params = origin.params if params is None else params
        check_fork(origin, params)
        self.check_request(origin.prompt_token_ids, params)
        self._torn = True
        request = Request(str(next(self._numbers)), origin.prompt_token_ids, params, time.monotonic())
        self.scheduler.fork(origin.sequences[0], request)
        self._give_seed(request)
        forked = self._generations[request.request_id] = generation.fork(request)
        self._torn = False
        return forked

    def _give_seed(self, request: Request) -> None:
        if request.params.seed is None:
            request.params = dataclasses.replace(request.params, seed=self._seeds.getrandbits(63))

    def abort(self, generation: Generation, reason: FinishReason = "abort") -> None:
        """End a request now; its pages return at once. Without effect on a finished one."""
        self._begin()
        if generation.request.request_id in self._generations:
            self.scheduler.abort(generation.request, reason)
            generation.abort(reason)
            del self._generations[generation.request.request_id]  # last: an interrupt must find it
        self._settle()
        self._torn = False

    def step(self, *, isolate: bool = False) -> list[Generation]:
        """Advance every request that can run; returns those that gained a token or failed.

        isolate: where something raises, find out for which requests (see isolation.py). These end with "error" and
        have the cause in their `error`; the others go on, and nothing is raised.
        """
        self._begin()
        launched, self._ahead = self._ahead, None
        if launched is None:
            step = self._schedule(isolate)
            if step is None:
                self._torn = False
                return []
            with self._rolling_back():
                launched = launch(self._runner, step, isolate=isolate)
        next_step = self._schedule_ahead(launched)
        broken = next_step is not None and not self._transfer(next_step)
        with self._rolling_back():
            if next_step is not None and not broken:
                try:
                    self._ahead = launch(self._runner, next_step, before=launched)
                except Exception as error:
                    broken = True  # scheduled anew and not ahead, it tells why, if it fails again
                    self._note_ahead(error)
            draws = launched.read()
        touched = self._take_in(launched, draws, isolate)
        if broken:
            self.scheduler.rollback()
        self._settle()
        self._torn = False
        return touched

    def _note_ahead(self, error: Exception) -> None:
        """Log what a step raised that ran ahead: the first of each kind as a warning, for each costs time."""
        level = logging.DEBUG if type(error) in self._raised_ahead else logging.WARNING
        self._raised_ahead.add(type(error))
        logger.log(level, "a step that was run ahead raised, and is run again in its turn: %r", error, exc_info=error)

    def _take_in(self, launched: Launched, draws: Items[sampler.Draw], isolate: bool) -> list[Generation]:
        """Give what a step drew to those who asked for it; returns these, and those for whom it raised."""
        step = launched.step
        # Before the commit, which would offer their pages to other requests.
        touched = {request.request_id: self._fail(request, error) for request, error in launched.failures.items()}
        draws = [drawn for drawn in draws if drawn.seq.status is not Status.FINISHED]  # ended, while it ran, or failed
        for drawn in draws:
            if not drawn.ahead and not drawn.finite:
                self._spoil(drawn.seq)
        self.scheduler.commit(step)
        for seq, first, logprobs in (report for part in launched.parts for report in part.prompt_logprobs):
            if seq.request.request_id in self._generations:
                self._generations[seq.request.request_id].prompt_logprobs.update(enumerate(logprobs, first))
        now = time.monotonic()
        gained: dict[Sequence, tuple[int, ...]] = {}  # of this step
        for drawn in draws:
            generation = touched[drawn.seq.request.request_id] = self._generations[drawn.seq.request.request_id]
            ended = drawn.ahead and drawn.seq.status is Status.FINISHED
            if drawn.ahead != gained.get(drawn.seq, ()) or ended or generation.error is not None:
                continue  # drawn behind a draft that did not come true, behind the end, for a request that failed
            try:
                self._accept(generation, drawn, now)
            except Exception as error:
                if not isolate:
                    raise
                self._fail(generation.request, error)
            gained[drawn.seq] = *drawn.ahead, drawn.token_id
        if self.speculation is not None:
            self.speculation.end(step, gained)
        for generation in touched.values():
            if generation.request.finished:
                generation.finish_time = now
                del self._generations[generation.request.request_id]
        return list(touched.values())

    def _settle(self) -> None:
        """Nobody waits for what runs ahead if there is no work."""
        if self._ahead is not None and not self.scheduler.has_work:
            self.scheduler.commit(self._ahead.step)
            self._ahead = None

    def _schedule(self, isolate: bool) -> Step | None:
        """The next step, with drafts where they pay, and with all that it wants of the host cache in its pages."""
        while (step := self.scheduler.schedule()) is not None:
            if self._transfer(step):
                if self.speculation is None:
                    return step
                extended = self._extended(step, self.speculation, isolate)
                if extended is step or self._transfer(extended):
                    return extended
            self.scheduler.rollback()
        return None

    def _extended(self, step: Step, speculation: Speculation, isolate: bool) -> Step:
        """The step with drafts, if it gets any. A fault in guessing them is no request's."""
        wanted, drafts = speculation.reserve(step, self.scheduler), None
        with self._rolling_back():
            try:
                speculation.follow(step)
                drafts = speculation.guess(step) if wanted else None
            except Exception:
                if not isolate:
                    raise
                logger.exception("no drafts in this step, for they cannot be made")
        return step if drafts is None else self.scheduler.extend(step, drafts)

    def _schedule_ahead(self, launched: Launched) -> Step | None:
        """The step after one that runs, if it can be scheduled before what that draws is known.

        Penalties want the tokens, and drafts follow them. Where a device does not run by itself, nothing is gained.
        """
        if not self._runner.runs_ahead or self.speculation is not None or not launched.whole:
            return None
        if any(seq.request.params.penalizes for chunk in launched.step.chunks for seq in chunk.samples):
            return None
        self.scheduler.expect(launched.step)
        return self.scheduler.schedule()

    def _transfer(self, step: Step) -> bool:
        """Copy between device and host what the step wants. False if that failed: the host cache is given up then.

        Nobody needs it to get on, and whoever tries the same again may never.
        """
        if not step.transfers:
            return True
        assert self._runner.host is not None
        with self._rolling_back():
            try:
                self._runner.host.transfer(step.transfers)
            except BaseException as error:
                self.pool.forget(step.transfers)
                if not isinstance(error, Exception):
                    raise
                logger.warning("the host cache is given up, for a copy failed: %r", error)
                self.pool.drop_host()
                self._runner.host = None
        return self._runner.host is not None

    @contextmanager
    def _rolling_back(self) -> Iterator[None]:
        """Around what may fail of a step without harm to the bookkeeping."""
        try:
            yield
        except BaseException:
            self.scheduler.rollback()
            self._ahead, self._torn = None, False
            raise

    def _fail(self, request: Request, error: Exception) -> Generation:
        """End a request that raised; what is held of its text stays so, for its tokenizer may be what raised."""
        self.scheduler.abort(request, "error", repr(error))
        generation = self._generations[request.request_id]
        generation.error = error
        return generation

    def _spoil(self, seq: Sequence) -> None:
        """End a sequence whose logits are no numbers."""
        self.scheduler.finish(seq, "error", "the model's logits are not finite numbers")

    def _accept(self, generation: Generation, drawn: sampler.Draw, now: float) -> None:
        """Give a sequence its token and see whether it ends there."""
        seq, token_id = drawn.seq, drawn.token_id
        sample = generation.sample(seq)
        if not drawn.finite:
            self._spoil(seq)
            if sample.stream is not None:
                sample.stream.close()
            return
        if drawn.ahead:
            self.scheduler.keep_draft(seq)
        if generation.first_token_time is None:
            generation.first_token_time = now
        self.scheduler.append(seq, token_id)
        if drawn.logprob is not None:
            sample.logprobs.append(drawn.logprob)
        ended = sample.push(token_id, self.model.config.eos_token_ids)
        if ended is not None:
            self.scheduler.finish(seq, *ended)
