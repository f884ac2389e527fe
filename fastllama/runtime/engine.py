"""The engine: schedule a step, launch it, launch the next one before its tokens are read, collect them."""

from __future__ import annotations

import logging
import random
import time
from collections import abc, deque
from collections.abc import Iterable, Mapping

from torch import Tensor

from fastllama.arithmetic import ceil_div
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.batch import KVCache
from fastllama.layers.model import LlamaForCausalLM, runners
from fastllama.layers.update import update_weights
from fastllama.runtime.access import Access
from fastllama.runtime.consistency import Consistency
from fastllama.runtime.device import memory
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.execution import Launched, launch, launch_parts
from fastllama.runtime.device.probe import device_error
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
from fastllama.runtime.planning.sequence import Scoring
from fastllama.runtime.planning.step import Step
from fastllama.runtime.prompts import Prepared

logger = logging.getLogger("fastllama")


class Engine:
    """Runs requests in steps on the caller's thread; threads take turns (access.py).

    If a step raises, the requests responsible end with "error" and the others continue (isolation.py). An interrupt
    (Ctrl-C) or bug in the bookkeeping leaves page ownership unknown: the next call ends every request with "abort" and
    starts with an empty pool (consistency.py).
    speculation: "prompt_lookup", or a smaller draft model of the same vocabulary on the same device; None for no draft
    tokens (speculation.py).
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
        num_drafts = 0 if speculation is None else options.num_draft_tokens
        self._sizes = sizes = memory.choose(model, options, kv_dtype, more, num_drafts)
        self.model, self.tokenizer = model, tokenizer
        self._page_size = size = options.page_size
        num_pages = sizes.kv_cache_tokens // size
        scheduler = self._new_scheduler(num_pages, ceil_div(options.host_cache_tokens, size))
        self._ahead: Launched | None = None  # the next step, if it was launched before the last one's tokens were read
        self._noted: set[tuple[type[Exception], str]] = set()
        self._to_abort: deque[tuple[Generation, FinishReason]] = deque()  # aborts requested during a step
        self.failures_in_a_row = 0  # steps in which every request failed
        self.device_error: Exception | None = None  # a permanent fault of the device
        self.access = Access()
        self._consistency = Consistency()
        eos = model.config.eos_token_ids
        adjustments = Adjustments(sizes.max_num_seqs, model.config.vocab_size, eos, model.device)
        self._runner = Runner(
            model,
            num_pages,
            size,
            kv_dtype=kv_dtype,
            host_cache_tokens=options.host_cache_tokens,
            max_num_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            deterministic=options.deterministic,
            adjustments=adjustments,
        )
        self.speculation: Speculation | None = None
        if speculation is not None:
            drafter: Drafter = PromptLookup()
            if draft is not None:
                drafter = DraftModel(draft, model, num_pages, size, sizes, adjustments)
            self.speculation = Speculation(drafter, options.num_draft_tokens)
        forget = [adjustments.forget] if self.speculation is None else [adjustments.forget, self.speculation.forget]
        seed = random.SystemRandom().getrandbits(63) if options.seed is None else options.seed
        self._requests = LiveRequests(scheduler, tokenizer, model.config, seed, forget)
        runners(model).add(self)

    @staticmethod
    def runs(model: LlamaForCausalLM, *, besides: Engine | None = None) -> bool:
        """Whether an engine of this process, other than `besides`, runs a model."""
        return any(engine is not besides for engine in runners(model))

    def _new_scheduler(self, num_pages: int, num_host_pages: int) -> Scheduler:
        return Scheduler(
            BlockPool(num_pages, self._page_size, num_host_pages),
            max_num_batched_tokens=self._sizes.max_num_batched_tokens,
            max_num_seqs=self._sizes.max_num_seqs,
            max_model_len=self._sizes.max_model_len,
        )

    def _start_anew(self) -> None:
        scheduler = self._new_scheduler(self.pool.num_pages, self.pool.num_host_pages)
        self._requests.start_anew(scheduler, self._consistency.cause)
        self._ahead = None

    def _roll_back(self) -> None:
        self.scheduler.rollback()
        self._ahead = None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, which chooses the tokens of each step."""
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
        """Whether decode steps are captured and replayed, unless a request needs them eager."""
        return self._runner.replays

    @property
    def num_drafts(self) -> tuple[int, int]:
        """Draft tokens verified, and draft tokens accepted, since the LLM was made."""
        return (0, 0) if self.speculation is None else (self.speculation.num_drafted, self.speculation.num_accepted)

    def warm_up(self) -> float:
        """Compile and capture everything used later, in pages that no request holds. Returns the seconds it took."""
        assert not self.has_work, "a page that a request may hold would be overwritten"
        if self.speculation is None:
            return warm_up(self._runner, self._sizes)
        return warm_up(self._runner, self._sizes, (1, 1 + self.speculation.count)) + self.speculation.drafter.warm_up()

    def check_request(
        self, prompt_token_ids: abc.Sequence[int], params: SamplingParams, scoring: Scoring | None = None
    ) -> None:
        """Raises ValueError if the prompt can never run or has a token id out of range. Thread-safe."""
        self._requests.check(prompt_token_ids, params, scoring)

    def add_request(
        self,
        prompt_token_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        arrival: float | None = None,
        request_id: str | None = None,
        continues_text: bool = True,
        scoring: Scoring | None = None,
    ) -> Generation:
        """Queue a prompt. Raises ValueError, and changes nothing, where check_request does.

        arrival: by time.monotonic(); None is now. request_id: unique among unfinished requests; None makes one.
        continues_text: whether the answer continues the prompt's text; False decodes it as a text of its own, as
        Tokenizer.decode does. scoring: scores the prompt instead of generating.
        """
        ids = tuple(prompt_token_ids)
        self._requests.check(ids, params, scoring)
        with self.access:
            self._requests.check_id(request_id)
            with self._consistency.change(self._start_anew):
                arrived = time.monotonic() if arrival is None else arrival
                return self._requests.add(ids, params, prompt, arrived, request_id, continues_text, scoring)

    def add(self, prepared: Prepared, *, arrival: float | None = None, request_id: str | None = None) -> Generation:
        """Queue a prompt prepared by PromptEncoder; see `add_request`."""
        return self.add_request(
            prepared.token_ids,
            prepared.params,
            prompt=prepared.text,
            arrival=arrival,
            request_id=request_id,
            continues_text=prepared.continues_text,
            scoring=prepared.scoring,
        )

    def fork(
        self, generation: Generation, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Generation:
        """Fork an unfinished request at its current token; see LLM.fork.

        Raises ValueError, and changes nothing, if it has ended, is another engine's, or cannot be forked with `params`.
        """
        params = generation.request.params if params is None else params
        with self.access:
            self._consistency.mend(self._start_anew)  # ends the request if an interrupt has torn the engine
            self._requests.check_fork(generation, params)
            self._requests.check_id(request_id)
            with self._consistency.change(self._start_anew):
                return self._requests.fork(generation, params, request_id)

    def find(self, request_id: str) -> Generation | None:
        """Returns the unfinished request of this id; None if there is none."""
        return self._requests.generations.get(request_id)

    def abort(self, generation: Generation, reason: FinishReason = "abort") -> None:
        """End a request now and free its pages at once. No effect on a finished one.

        Within a step, or while another thread owns the engine (a stream may be dropped anywhere), the abort is queued
        for the end of the next step.
        """
        if self.access.inside or self.access.claimed_by_another:
            self._to_abort.append((generation, reason))
            return
        with self.access, self._consistency.change(self._start_anew):
            self._requests.abort(generation, reason)
            self._settle()

    def step(self) -> list[Generation]:
        """Run one step: launch it, launch the next, append its tokens; returns requests that gained one or failed.

        If the model raises, this does not: the requests responsible (isolation.py) end with "error" and have the
        exception in their `error`; the others continue.
        """
        with self.access, self._consistency.change(self._start_anew):
            launched = self._next_launched()
            if launched is None:
                return []
            self._launch_ahead(launched)
            touched = self._collect(launched)
            self._abort_queued()
            self._settle()
            return touched

    def reset_prefix_cache(self) -> None:
        """Drop all cached keys and values, on the host too; unfinished requests recompute theirs and continue."""
        with self.access, self._consistency.change(self._start_anew):
            self._forget_prefixes()

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights; see LLM.update_weights."""
        if Engine.runs(self.model, besides=self):
            raise RuntimeError("another LLM runs this model, with cached keys and values; legal: one LLM of a model")
        with self.access, self._consistency.change(self._start_anew):
            self._forget_prefixes()
            captures_differ = True
            with self._consistency.attempt(self._roll_back):
                try:
                    captures_differ = update_weights(self.model, tensors)
                finally:
                    if captures_differ:
                        self._runner.drop_graphs()

    def _forget_prefixes(self) -> None:
        self._roll_back()
        self.pool.forget_prefixes()

    def _next_launched(self) -> Launched | None:
        """Returns the step launched ahead, or schedules and launches the next; None if there is no work."""
        launched, self._ahead = self._ahead, None
        if launched is None and (step := self._schedule()) is not None:
            with self._consistency.attempt(self._roll_back):
                launched = launch_parts(self._runner, step)
        return launched

    def _schedule(self) -> Step | None:
        """Returns the next step, with draft tokens where they pay and its host-cache pages copied in."""
        while (step := self.scheduler.schedule()) is not None:
            if self._transfer(step):
                if self.speculation is None:
                    return step
                extended = self._with_drafts(step, self.speculation)
                if extended is step or self._transfer(extended):
                    return extended
            self.scheduler.rollback()
        return None

    def _with_drafts(self, step: Step, speculation: Speculation) -> Step:
        """Returns the step, extended by draft tokens if there are any. A fault in drafting fails no request."""
        wanted, drafts = speculation.reserve(step, self.scheduler), None
        with self._consistency.attempt(self._roll_back):
            try:
                speculation.follow(step)
                drafts = speculation.draft(step) if wanted else None
            except Exception as error:
                self._note(error, "a step runs without draft tokens: drafting raised %r")
        return step if drafts is None else self.scheduler.extend(step, drafts)

    def _transfer(self, step: Step) -> bool:
        """Copy the step's pages between device and host. Returns False if that failed, so that the step cannot run."""
        if not step.transfers:
            return True
        with self._consistency.attempt(self._roll_back):
            self._runner.transfer(step.transfers, self.pool)
        return self._runner.host is not None

    def _launch_ahead(self, launched: Launched) -> None:
        """Schedule and launch the next step before this one's tokens are read, if it does not depend on them.

        A step that fails here stays in flight for `_settle`; rescheduled, it reports its error if it fails again.
        """
        if not self._runner.runs_ahead or self.speculation is not None or not launched.may_be_followed:
            return  # drafts depend on the tokens; a device that is not asynchronous gains nothing
        self.scheduler.expect(launched.step)
        step = self.scheduler.schedule()
        if step is None or not self._transfer(step):
            return
        with self._consistency.attempt(self._roll_back):
            try:
                self._ahead = launch(self._runner, step, before=launched)
            except Exception as error:
                self._note(error, "a step launched ahead raised and is run again in order: %r")

    def _note(self, error: Exception, message: str) -> None:
        """Log an error that fails no request; the first of each kind as a warning, since each costs time."""
        level = logging.DEBUG if (type(error), message) in self._noted else logging.WARNING
        self._noted.add((type(error), message))
        logger.log(level, message, error, exc_info=error)

    def _collect(self, launched: Launched) -> list[Generation]:
        """Wait for a step's tokens and append them; returns the generations that gained one or failed."""
        self.failures_in_a_row += 1
        try:
            with self._consistency.attempt(self._roll_back):
                tokens = launched.read()
        except Exception:
            self.device_error = device_error(self.model.device)
            raise
        if launched.parts:
            self.failures_in_a_row = 0
        else:
            self.device_error = device_error(self.model.device)
        touched, gained = self._requests.take_in(launched, tokens)
        if self.speculation is not None:
            self.speculation.end(launched.step, gained)
        return touched

    def _abort_queued(self) -> None:
        while self._to_abort:
            self._requests.abort(*self._to_abort.popleft())

    def _settle(self) -> None:
        """Leave in flight only a step launched ahead: roll back a failed one, commit one that no request needs."""
        if self._ahead is None:
            if self.scheduler.in_flight:
                self.scheduler.rollback()
        elif not self.scheduler.has_work:
            self.scheduler.commit(self._ahead.step)
            self._ahead = None
