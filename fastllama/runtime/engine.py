"""The engine: schedule a step, launch it, launch the next ahead of its tokens, collect these."""

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
    """Requests in, tokens out, one step at a time, on the caller's thread; threads take turns (access.py).

    Where a step raises, those requests end with "error" that it raises for, and the others go on (isolation.py). What
    breaks into the bookkeeping instead (Ctrl-C, a bug) leaves unknown which pages belong to whom: the next call ends
    every request with "abort" and starts with an empty pool (consistency.py).
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
        num_drafts = 0 if speculation is None else options.num_draft_tokens
        self._sizes = sizes = memory.choose(model, options, kv_dtype, more, num_drafts)
        self.model, self.tokenizer = model, tokenizer
        self._page_size = size = options.page_size
        num_pages = sizes.kv_cache_tokens // size
        scheduler = self._new_scheduler(num_pages, ceil_div(options.host_cache_tokens, size))
        self._ahead: Launched | None = None  # the step after the last that was taken in, where it runs already
        self._noted: set[tuple[type[Exception], str]] = set()
        self._to_abort: deque[tuple[Generation, FinishReason]] = deque()  # asked for within a step
        self.failures_in_a_row = 0  # steps of which nothing succeeded
        self.device_error: Exception | None = None  # which the device will not recover from
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

    @property
    def num_drafts(self) -> tuple[int, int]:
        """Draft tokens verified, and those accepted, since the LLM was made."""
        return (0, 0) if self.speculation is None else (self.speculation.num_drafted, self.speculation.num_accepted)

    def warm_up(self) -> float:
        """Compile and capture what is so at first use, in pages that no request holds. Returns the seconds it took."""
        assert not self.has_work, "a page that a request may hold would be overwritten"
        if self.speculation is None:
            return warm_up(self._runner, self._sizes)
        return warm_up(self._runner, self._sizes, (1, 1 + self.speculation.count)) + self.speculation.drafter.warm_up()

    def check_request(
        self, prompt_token_ids: abc.Sequence[int], params: SamplingParams, scoring: Scoring | None = None
    ) -> None:
        """Raises ValueError if the prompt can never run or holds an id out of range. Any thread may ask."""
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

        arrival: when it came, by time.monotonic(); None is now. request_id: none of an unfinished request; None makes
        one. continues_text: whether the answer goes on with the prompt's text; False makes it a text of its own, as
        Tokenizer.decode gives it. scoring: the prompt is scored, and no token generated.
        """
        ids = tuple(prompt_token_ids)
        self._requests.check(ids, params, scoring)
        with self.access:
            self._requests.check_id(request_id)
            with self._consistency.change(self._start_anew):
                arrived = time.monotonic() if arrival is None else arrival
                return self._requests.add(ids, params, prompt, arrived, request_id, continues_text, scoring)

    def add(self, prepared: Prepared, *, arrival: float | None = None, request_id: str | None = None) -> Generation:
        """Queue what PromptEncoder has prepared; see `add_request`."""
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
        """A new request that goes on from where an unfinished one stands; see LLM.fork.

        Raises ValueError, and changes nothing, if that has ended, is another engine's, or cannot go on with `params`.
        """
        params = generation.request.params if params is None else params
        with self.access:
            self._consistency.mend(self._start_anew)  # which ends it where an interrupt has torn the engine
            self._requests.check_fork(generation, params)
            self._requests.check_id(request_id)
            with self._consistency.change(self._start_anew):
                return self._requests.fork(generation, params, request_id)

    def find(self, request_id: str) -> Generation | None:
        """The unfinished request of this id, if there is one."""
        return self._requests.generations.get(request_id)

    def abort(self, generation: Generation, reason: FinishReason = "abort") -> None:
        """End a request now; its pages return at once. Without effect on a finished one.

        Within a step, or beside an owner (a stream may be let go of anywhere), it is noted, and done at the end of the
        next step.
        """
        if self.access.inside or self.access.claimed_by_another:
            self._to_abort.append((generation, reason))
            return
        with self.access, self._consistency.change(self._start_anew):
            self._requests.abort(generation, reason)
            self._settle()

    def step(self) -> list[Generation]:
        """Advance every request that can run; returns those that gained a token or failed.

        Where something raises, it is found out for which requests (see isolation.py). These end with "error" and have
        the cause in their `error`; the others go on, and nothing is raised.
        """
        with self.access, self._consistency.change(self._start_anew):
            launched = self._launched()
            if launched is None:
                return []
            self._launch_ahead(launched)
            touched = self._collect(launched)
            while self._to_abort:
                self._requests.abort(*self._to_abort.popleft())
            self._settle()
            return touched

    def reset_prefix_cache(self) -> None:
        """Forget all keys and values, on the host too; unfinished requests compute theirs anew, and go on."""
        with self.access, self._consistency.change(self._start_anew):
            self._forget_prefixes()

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Give the model new weights; see LLM.update_weights."""
        if Engine.runs(self.model, besides=self):
            raise RuntimeError("another LLM runs this model, and keeps what it computed; legal: one LLM of a model")
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

    def _launched(self) -> Launched | None:
        """The step that runs already, or else the next, scheduled and launched; None if there is no work."""
        launched, self._ahead = self._ahead, None
        if launched is None and (step := self._schedule()) is not None:
            with self._consistency.attempt(self._roll_back):
                launched = launch_parts(self._runner, step)
        return launched

    def _schedule(self) -> Step | None:
        """The next step, with drafts where they pay, and with all that it wants of the host cache in its pages."""
        while (step := self.scheduler.schedule()) is not None:
            if self._transfer(step):
                if self.speculation is None:
                    return step
                extended = self._extended(step, self.speculation)
                if extended is step or self._transfer(extended):
                    return extended
            self.scheduler.rollback()
        return None

    def _extended(self, step: Step, speculation: Speculation) -> Step:
        """The step with drafts, if it gets any. A fault in proposing them is no request's."""
        wanted, drafts = speculation.reserve(step, self.scheduler), None
        with self._consistency.attempt(self._roll_back):
            try:
                speculation.follow(step)
                drafts = speculation.guess(step) if wanted else None
            except Exception as error:
                self._note(error, "no drafts in a step, for they cannot be made: %r")
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
                self._note(error, "a step that was run ahead raised, and is run again in its turn: %r")

    def _note(self, error: Exception, message: str) -> None:
        """Log what no request is told of: the first of each kind as a warning, for each costs time."""
        level = logging.DEBUG if (type(error), message) in self._noted else logging.WARNING
        self._noted.add((type(error), message))
        logger.log(level, message, error, exc_info=error)

    def _collect(self, launched: Launched) -> list[Generation]:
        """Wait for a step's tokens and append them; returns the generations that gained one or failed."""
        self.failures_in_a_row += 1
        try:
            with self._consistency.attempt(self._roll_back):
                draws = launched.read()
        except Exception:
            self.device_error = device_error(self.model.device)
            raise
        if launched.parts:
            self.failures_in_a_row = 0
        else:
            self.device_error = device_error(self.model.device)
        touched, gained = self._requests.take_in(launched, draws)
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
