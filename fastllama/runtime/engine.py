"""The engine: schedule a step, launch it, launch the next ahead of its tokens, collect these."""

from __future__ import annotations

import logging
import time
from collections import abc

from fastllama.arithmetic import ceil_div
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.batch import KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.consistency import Consistency
from fastllama.runtime.device import memory
from fastllama.runtime.device.execution import Launched, launch
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.warm_up import warm_up
from fastllama.runtime.drafting.draft_model import DraftModel
from fastllama.runtime.drafting.prompt_lookup import PromptLookup
from fastllama.runtime.drafting.speculation import Drafter, Speculation
from fastllama.runtime.generation import Generation
from fastllama.runtime.live_requests import LiveRequests
from fastllama.runtime.options import KV_DTYPES, EngineOptions
from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import BlockPool
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.step import Step

logger = logging.getLogger("fastllama")


class Engine:
    """Requests in, tokens out, one step at a time, on the caller's thread.

    step() may raise what the model raises; the requests then stay, and are recomputed by the next step (but for
    step(isolate=True), by which those fail that it raises for). What breaks into the bookkeeping instead (Ctrl-C, a
    bug) leaves unknown which pages belong to whom: the next call ends every request with "abort" and starts with an
    empty pool (consistency.py).
    speculation: what proposes draft tokens (see speculation.py): "prompt_lookup", or a smaller model of the same
    vocabulary, on the same device; None for no drafts.
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
        self._sizes = sizes = memory.choose(model, options, kv_dtype, more)
        model.set_max_model_len(sizes.max_model_len)
        self.model, self.tokenizer = model, tokenizer
        self._page_size = size = options.page_size
        num_pages = sizes.kv_cache_tokens // size
        scheduler = self._new_scheduler(num_pages, ceil_div(options.host_cache_tokens, size))
        self._requests = LiveRequests(scheduler, tokenizer, model.config, options.seed)
        self._ahead: Launched | None = None  # the step after the last that was taken in, where it runs already
        self._consistency = Consistency()
        self._runner = Runner(
            model,
            num_pages,
            size,
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
                drafter = DraftModel(draft, model, num_pages, size, sizes)
            self.speculation = Speculation(drafter, options.num_draft_tokens)
        self._raised_ahead: set[type[Exception]] = set()

    def _new_scheduler(self, num_pages: int, num_host_pages: int) -> Scheduler:
        return Scheduler(
            BlockPool(num_pages, self._page_size, num_host_pages),
            max_num_batched_tokens=self._sizes.max_num_batched_tokens,
            max_num_seqs=self._sizes.max_num_seqs,
            max_model_len=self._sizes.max_model_len,
        )

    def _start_anew(self) -> None:
        self._requests.start_anew(self._new_scheduler(self.pool.num_pages, self.pool.num_host_pages))
        self._ahead = None

    def _roll_back(self) -> None:
        self.scheduler.rollback()
        self._ahead = None

    @property
    def scheduler(self) -> Scheduler:
        """What decides which tokens run next."""
        return self._requests.scheduler

    @property
    def pool(self) -> BlockPool:
        """The pages of the KV cache."""
        return self._requests.scheduler.pool

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    @property
    def replays(self) -> bool:
        """Whether decode steps are captured and replayed where nothing asks for them as they are written."""
        return self._runner.replays

    def warm_up(self) -> float:
        """Compile and capture what is so at first use, in pages that no request holds. Returns the seconds it took."""
        assert not self.has_work, "a page that a request may hold would be overwritten"
        if self.speculation is None:
            return warm_up(self._runner, self._sizes)
        return warm_up(self._runner, self._sizes, (1, 1 + self.speculation.count)) + self.speculation.drafter.warm_up()

    def check_request(self, prompt_token_ids: abc.Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError if the prompt can never run or holds an id out of range. Any thread may ask."""
        self._requests.check(prompt_token_ids, params)

    def add_request(
        self,
        prompt_token_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        arrival: float | None = None,
    ) -> Generation:
        """Queue a prompt. Raises ValueError, and changes nothing, where check_request does.

        arrival: when it came, by time.monotonic(); None is now.
        """
        ids = tuple(prompt_token_ids)
        self._requests.check(ids, params)
        with self._consistency.change(self._start_anew):
            return self._requests.add(ids, params, prompt, time.monotonic() if arrival is None else arrival)

    def fork(self, generation: Generation, params: SamplingParams | None = None) -> Generation:
        """A new request that goes on from where an unfinished one stands; see LLM.fork.

        Raises ValueError, and changes nothing, if that has ended, is another engine's, or cannot go on with `params`.
        """
        params = generation.request.params if params is None else params
        self._consistency.mend(self._start_anew)  # which ends it where an interrupt has torn the engine
        self._requests.check_fork(generation, params)
        with self._consistency.change(self._start_anew):
            return self._requests.fork(generation, params)

    def abort(self, generation: Generation, reason: FinishReason = "abort") -> None:
        """End a request now; its pages return at once. Without effect on a finished one."""
        with self._consistency.change(self._start_anew):
            self._requests.abort(generation, reason)
            self._settle()

    def step(self, *, isolate: bool = False) -> list[Generation]:
        """Advance every request that can run; returns those that gained a token or failed.

        isolate: where something raises, find out for which requests (see isolation.py). These end with "error" and
        have the cause in their `error`; the others go on, and nothing is raised.
        """
        with self._consistency.change(self._start_anew):
            launched = self._launched(isolate)
            if launched is None:
                return []
            self._launch_ahead(launched)
            touched = self._collect(launched, isolate)
            self._settle()
            return touched

    def _launched(self, isolate: bool) -> Launched | None:
        """The step that runs already, or else the next, scheduled and launched; None if there is no work."""
        launched, self._ahead = self._ahead, None
        if launched is None and (step := self._schedule(isolate)) is not None:
            with self._consistency.attempt(self._roll_back):
                launched = launch(self._runner, step, isolate=isolate)
        return launched

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
        """The step with drafts, if it gets any. A fault in proposing them is no request's."""
        wanted, drafts = speculation.reserve(step, self.scheduler), None
        with self._consistency.attempt(self._roll_back):
            try:
                speculation.follow(step)
                drafts = speculation.guess(step) if wanted else None
            except Exception:
                if not isolate:
                    raise
                logger.exception("no drafts in this step, for they cannot be made")
        return step if drafts is None else self.scheduler.extend(step, drafts)

    def _transfer(self, step: Step) -> bool:
        """Copy the step's pages between device and host. False if that failed: the step cannot run then."""
        if not step.transfers:
            return True
        with self._consistency.attempt(self._roll_back):
            self._runner.transfer(step.transfers, self.pool)
        return self._runner.host is not None

    def _launch_ahead(self, launched: Launched) -> None:
        """Schedule and launch the step after one that runs, if that can be done before what that draws is known.

        What is scheduled and then fails is left in flight, for `_settle`: scheduled anew, it says why, if it fails
        again.
        """
        if not self._runner.runs_ahead or self.speculation is not None or not launched.may_be_followed:
            return  # drafts follow the tokens; and where a device does not run by itself, nothing is gained
        self.scheduler.expect(launched.step)
        step = self.scheduler.schedule()
        if step is None or not self._transfer(step):
            return
        with self._consistency.attempt(self._roll_back):
            try:
                self._ahead = launch(self._runner, step, before=launched)
            except Exception as error:
                self._note_ahead(error)

    def _note_ahead(self, error: Exception) -> None:
        """Log what a step raised that ran ahead: the first of each kind as a warning, for each costs time."""
        level = logging.DEBUG if type(error) in self._raised_ahead else logging.WARNING
        self._raised_ahead.add(type(error))
        logger.log(level, "a step that was run ahead raised, and is run again in its turn: %r", error, exc_info=error)

    def _collect(self, launched: Launched, isolate: bool) -> list[Generation]:
        """Wait for a step's tokens and append them; returns the generations that gained one or failed."""
        with self._consistency.attempt(self._roll_back):
            draws = launched.read()
        touched, gained = self._requests.take_in(launched, draws, isolate=isolate)
        if self.speculation is not None:
            self.speculation.end(launched.step, gained)
        return touched

    def _settle(self) -> None:
        """Leave in flight only what runs ahead for a request: undo what failed to, commit what none waits for."""
        if self._ahead is None:
            if self.scheduler.in_flight:
                self.scheduler.rollback()
        elif not self.scheduler.has_work:
            self.scheduler.commit(self._ahead.step)
            self._ahead = None
