"""The blocking face: a model by name, prompts in, texts out."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastllama.errors import brief
from fastllama.io.chat import ChatFormat, Message, check_chat_format
from fastllama.io.chat.messages import Tags
from fastllama.io.tokenizer import Tokenizer
from fastllama.layers.config import LlamaConfig
from fastllama.runtime.calls import (
    check_params,
    check_started,
    checked,
    for_each_prompt,
    params_of_each,
    reject,
    starts_of_each,
)
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.handle import EngineHandle
from fastllama.runtime.options import EngineOptions
from fastllama.runtime.outputs import RequestOutput, ScoreOutput
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.parts import announcing, load_parts
from fastllama.runtime.prompts import Prepared, Prompt, PromptEncoder, as_list, continues_message
from fastllama.runtime.values import flag


class LLM:
    """A Llama with its tokenizer and runtime.

    model: "tiny" (bundled), a path (Hugging Face or Meta folder, llama2.c file), a Hub id, or a LlamaForCausalLM, which
    several LLMs may run: ours, or one of transformers, which goes on working on the same memory (from_transformers).
    tokenizer: a path, a Tokenizer or one of transformers; by default the model's. Without one, only ids go in and out.
    adapter: a PEFT LoRA folder or Hub id, merged into the weights while they load. A model that is itself such a folder
    brings its base.
    chat_format: "auto" is the checkpoint's own chat template, "llama2", "plain" (text, for base models), or a .jinja
    file; `chat_format.description` says what was chosen.
    dtype: "auto" (the checkpoint's), "bfloat16", "float16", "float32".
    device: "auto" (cuda if there is one), "cpu", "cuda", "cuda:1".
    quantization: "int4" rounds weights to 4 bits in groups of 128, "int8" to 8 bits with a scale for each row, "w8a8"
    so too, and each token's activations before products with them: all but for embeddings and output head. "bf12" keeps
    weights in bf16 in 12 bits, without loss (on a CPU). All in place if the model was given. None keeps them as they
    are; "auto" is "bf12" where it makes decoding faster and the model is loaded here.
    max_model_len: tokens of prompt and answer together; by default the model's context, less if the cache is smaller.
    kv_cache_tokens: tokens of all running requests together; by default what fits in a share of the free memory.
    host_cache_tokens: tokens that host memory keeps when that cache has no room for them, so that old conversations and
    preempted requests come back as copies, not computed again; 0 for none.
    kv_cache_dtype: "int8" and "fp8" keep keys and values in 8 bits, with a scale for each token and head: nearly twice
    as many tokens as in 16 bits. "auto" keeps them as the model computes.
    page_size: tokens of a KV page, 16 to 256. seed: of the seeds of requests that bring none; None takes one of the
    system's, and each output says which was used.
    max_num_seqs: sequences that run at once; by default as many as the cache should hold, up to 64 on a CPU and 256 on
    a GPU. max_num_batched_tokens: tokens of one step, by default 512 up to 2048 on a CPU and 8192 on a GPU, by memory;
    each running answer waits for that step. The logger "fastllama" tells at level INFO what was chosen.
    speculation: guesses that are verified several at once: "prompt_lookup" takes them from the text itself, a draft
    model (given as `model` is) writes them; None makes none. Answers stay as they are, seed by seed, but for rounding.
    num_draft_tokens: guesses of a sequence in one step, 1 to 7.
    deterministic: a request's logits, and so its tokens, are the same bit for bit, whatever else runs beside it, from
    whichever pages, in whatever chunks. Prompts then take as long as decoding on a CPU (docs/design/numerics.md).
    progress: bars on stderr; None shows them on a terminal only, and lines about kernels that are compiled anywhere.

    None is an option's default, but for model and quantization; a number may be NumPy's or a 0-d tensor.

    Kernels compile while it is made, none under the first request; warm_up_seconds says how long that took.
    Raises TypeError for an unknown option, ValueError or FileNotFoundError for an illegal value, CheckpointError for a
    broken model.

    Threads may share an LLM: their requests run together, in one batch, as the steps that each thread makes advance
    all. Beside an AsyncEngine, which has it alone, and in a forked process every call raises RuntimeError.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "tiny",
        *,
        tokenizer: str | Path | Tokenizer | Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        quantization: str | None = "auto",
        adapter: str | Path | None = None,
        chat_format: str | Path = "auto",
        max_model_len: int | None = None,
        kv_cache_tokens: int | None = None,
        host_cache_tokens: int = 0,
        kv_cache_dtype: str = "auto",
        page_size: int = 64,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        seed: int | None = None,
        deterministic: bool = False,
        speculation: str | Path | nn.Module | None = None,
        num_draft_tokens: int = 3,
        progress: bool | None = None,
        **unknown: Any,
    ) -> None:
        reject(unknown, "LLM", LLM.__init__)
        dtype = "auto" if dtype is None else dtype
        device = "auto" if device is None else device
        chat_format = "auto" if chat_format is None else chat_format
        # What needs no weights first: a wrong option or path should not cost the minute that they take.
        options = EngineOptions(
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache_tokens,
            host_cache_tokens=host_cache_tokens,
            kv_cache_dtype=kv_cache_dtype,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            seed=seed,
            deterministic=deterministic,
            num_draft_tokens=num_draft_tokens,
        )
        check_chat_format(chat_format)
        self._progress = progress
        parts = load_parts(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantization=quantization,
            adapter=adapter,
            speculation=speculation,
            progress=progress,
        )
        self.tokenizer, self.quantization = parts.tokenizer, parts.quantization
        self.sampling_defaults = parts.sampling_defaults  # what generation_config.json sets
        with announcing(parts.model.device, progress):
            self._handle = EngineHandle(Engine(parts.model, parts.tokenizer, options, parts.speculation))
            self.warm_up_seconds = self.engine.warm_up()
        self.prompts = PromptEncoder(self.tokenizer, self.config, self.max_model_len, str(chat_format), parts.name)

    @property
    def engine(self) -> Engine:
        """The engine below. Raises RuntimeError once the LLM is closed."""
        return self._handle.engine

    @property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return self.engine.model.config

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.scheduler.max_model_len

    @property
    def default_params(self) -> SamplingParams:
        """The parameters of requests that bring none: the checkpoint's sampling settings, else SamplingParams' own."""
        return SamplingParams(**self.sampling_defaults)

    @property
    def chat_format(self) -> ChatFormat:
        """How conversations are asked, and what ends an answer. A guess is logged as a warning, once."""
        return self.prompts.chat_format

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch; outputs in the order of the prompts.

        prompts: a text, texts, token ids, or lists, arrays or tensors of token ids. params: one for all, or one for
        each prompt. tags: of prompts that are messages, as in `chat`. add_special_tokens: False for text that has its
        own, as what apply_chat_template writes.
        Raises before anything runs if a prompt is too long, holds an id out of range, or the counts differ. Raises
        RequestError where a request failed or was aborted, once all have ended: its `outputs` are those of all.
        """
        reject(unknown, "LLM.generate", LLM.generate)
        how = checked(tags=tags, add_special_tokens=add_special_tokens)
        given = as_list(prompts)
        each = params_of_each(self.default_params if params is None else params, len(given))
        return self._generate(for_each_prompt(partial(self.prompts.prepare, **how), given, each))

    def _generate(self, prompts: abc.Sequence[Prepared]) -> list[RequestOutput]:
        return self._handle.run(prompts, Generation.output, description="Generating", progress=self._progress)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        start: int | abc.Sequence[int] = 1,
        *,
        top_logprobs: int = 0,
        on_logits: Callable[[int, int, Tensor], None] | None = None,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        progress: bool | None = None,
        **unknown: Any,
    ) -> list[ScoreOutput]:
        """Log-probabilities of the prompts' own tokens, each given those before it; nothing is generated.

        prompts, tags, add_special_tokens: as in `generate`; a prompt may have max_model_len + 1 tokens, of which the
        last is scored and not fed.
        start: position of the first token scored, one for all prompts or one for each: 1, the default, scores all but
        the first, which has none before it. Pages of the tokens before `start` are reused, so that the prompt that the
        choices of one question share is computed once.
        top_logprobs: how many of the likeliest tokens to report beside each, 0 to 20. Ranks are always there.
        on_logits: called as on_logits(number, position, logits) for runs of scored tokens, with the logits [R, V] of
        those of prompt `number` from `position` on, in the model's dtype, on its device; valid in the call alone, which
        any thread that uses the LLM may make, and may come again for the same tokens.
        progress: a bar; None is the LLM's own choice.
        Raises what `generate` raises.
        """
        reject(unknown, "LLM.score", LLM.score)
        how = checked(tags=tags, add_special_tokens=add_special_tokens)
        given = as_list(prompts)
        starts, numbers = starts_of_each(start, len(given)), range(len(given))
        shows = [partial(on_logits, number) if callable(on_logits) else on_logits for number in numbers]
        prepare = partial(self.prompts.prepare_scored, top_logprobs=top_logprobs, **how)
        prepared = for_each_prompt(prepare, given, starts, shows)
        return self._handle.run(
            prepared, Generation.score, description="Scoring", progress=self._progress if progress is None else progress
        )

    def chat(
        self,
        messages: abc.Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tags: Tags = "refuse",
        continue_final_message: bool = False,
        **unknown: Any,
    ) -> RequestOutput:
        """Answer a conversation in `chat_format`; messages: [{"role": "user", "content": ...}, ...].

        The answer is a text of its own, as Tokenizer.decode gives it: without the space that its first token begins
        with, for stop strings too.
        tags: "escape" changes text in a content that would pose as another role, "refuse" raises ValueError.
        continue_final_message: the last message is the assistant's, and the output what follows in it: with its space,
        unless the message ends in blanks that the format leaves out, or is blank. See ChatFormat.encode. Raises what
        `generate` raises.
        """
        reject(unknown, "LLM.chat", LLM.chat)
        (params,) = params_of_each(self.default_params if params is None else params, 1)
        continues = flag("continue_final_message", continue_final_message)
        ids = self.chat_format.encode(messages, continue_final_message=continues, **checked(tags=tags))
        goes_on = continues and continues_message(messages[-1]["content"], ids, self.prompts.needed_tokenizer())
        prepared = self.prompts.prepare(ids, self.prompts.ending_answers(params, messages), continues_text=goes_on)
        return self._generate([prepared])[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        **unknown: Any,
    ) -> Iterator[str]:
        """The completion of a prompt (a text, token ids, or the messages of a chat) in pieces, as they become certain.

        Closing the iterator aborts the request. Raises ValueError where params.n is not 1, and at the end RequestError
        where the request did not end by itself.
        """
        reject(unknown, "LLM.stream", LLM.stream)
        return self.follow(self.start(prompt, params, tags=tags, add_special_tokens=add_special_tokens))

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        continues_text: bool | None = None,
        **unknown: Any,
    ) -> Generation:
        """Queue what `stream` would: `follow` runs it; its `output()` tells tokens, reason and timings at any time.

        request_id: names it for `abort` and in its output; None makes one. continues_text: whether the answer goes on
        with the prompt's text, or is one of its own, as in `chat`; None is that for messages alone.
        """
        reject(unknown, "LLM.start", LLM.start)
        how = checked(tags=tags, add_special_tokens=add_special_tokens)
        how["continues_text"] = None if continues_text is None else flag("continues_text", continues_text)
        (params,) = params_of_each(self.default_params if params is None else params, 1)
        self.prompts.needed_tokenizer()
        if params.n != 1:
            raise ValueError(f"n is {params.n}; legal for a stream: 1")
        return self.engine.add(self.prompts.prepare(prompt, params, **how), request_id=request_id)

    def fork(
        self,
        generation: Generation,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **unknown: Any,
    ) -> Generation:
        """A second request that goes on from where a started, unfinished one stands, sharing its pages until it writes.

        params: of the tokens from here on; None takes those of the first, seed included, which so give the same tokens.
        Its output begins with what the first has generated: tokens, text and log-probabilities, which max_tokens,
        penalties and `follow` count in. Stop strings are sought in text that was not released yet. All else is its own:
        id, arrival, times, end. Where no seat is free, or the first waits or is reading its prompt, it is queued.
        Raises TypeError for other things, ValueError if the first has ended, for n other than 1 of either, max_tokens
        that are reached already, and log-probabilities that the first does not report.
        """
        reject(unknown, "LLM.fork", LLM.fork)
        check_started(generation)
        check_params(params)
        return self.engine.fork(generation, params, request_id=request_id)

    def abort(self, request: str | Generation) -> None:
        """End a started request, by its id or itself: `follow` raises RequestError. No effect on one that ended."""
        if not isinstance(request, (str, Generation)):
            raise TypeError(f"request is {brief(request)}; legal: a request's id, a string, or what LLM.start returns")
        generation = request if isinstance(request, Generation) else self.engine.find(request)
        if generation is not None:
            self.engine.abort(generation)

    def encode(
        self, prompt: Prompt, *, tags: Tags = "refuse", add_special_tokens: bool = True, **unknown: Any
    ) -> list[int]:
        """The token ids of a prompt: a text, token ids (which stay as they are), or the messages of a chat.

        Raises TypeError for anything else, ValueError for text or messages without a tokenizer.
        """
        reject(unknown, "LLM.encode", LLM.encode)
        return self.prompts.encode(prompt, **checked(tags=tags, add_special_tokens=add_special_tokens))

    def follow(self, generation: Generation) -> Iterator[str]:
        """The text of a started request in pieces; closing the iterator aborts it.

        Raises RequestError behind the last piece where the request failed or was aborted: what came is not all then.
        """
        check_started(generation)
        pieces = self._follow(generation)
        next(pieces)  # into its try: closing an iterator that was never asked for a piece aborts the request too
        return pieces

    def _follow(self, generation: Generation) -> Iterator[str]:
        try:
            yield ""
            while True:
                finished = generation.finished  # before the text is taken: another thread may run the last step now
                streams = [sample.stream for sample in list(generation.samples.values())]
                if piece := "".join(stream.take() for stream in streams if stream is not None):
                    yield piece
                elif not finished:
                    self.engine.step()
                elif (failure := generation.failure()) is not None:
                    raise failure
                else:
                    return
        finally:
            self._handle.leave(generation)

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of all prompts, on the host too: the next ones are computed anew.

        For weights that were changed in place. Unfinished requests stay, and compute theirs anew.
        """
        self.engine.reset_prefix_cache()

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights, in place, as in a loop of reinforcement learning; what is cached of the old is forgotten.

        tensors: by the names of Hugging Face checkpoints, of any device and floating dtype: all of them, or some (of a
        model quantized by AWQ or SmoothQuant all, since scales have moved between its weights). A dict is checked as a
        whole before anything is written, an iterator tensor by tensor. Quantized layers are quantized anew; what shares
        memory with a model of transformers changes there too. Captured steps stay, but for bf12, and unfinished
        requests go on with the new weights.
        Raises ValueError for names, shapes and dtypes that are not the model's (layers.update.update_weights),
        RuntimeError where another LLM runs the model.
        """
        self.engine.update_weights(tensors)

    def close(self) -> None:
        """Free the model and the KV cache. An AsyncEngine of this LLM is shut down first. May be called twice."""
        self._handle.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
