"""The blocking interface: load a model, complete prompts."""

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
    """A Llama model with its tokenizer and serving runtime.

    model: "tiny" (bundled), a path (Hugging Face or Meta folder, llama2.c file), a Hub id, or a loaded model, which
    several LLMs may share: a LlamaForCausalLM, or one of transformers, whose memory is shared with it
    (from_transformers).
    tokenizer: a path, a Tokenizer or one of transformers; default: the model's. Without one, only token ids are
    accepted and returned.
    adapter: a PEFT LoRA folder or Hub id, merged into the weights while loading. If the model is such a folder, its
    base is loaded too.
    chat_format: "auto" (the checkpoint's chat template), "llama2", "plain" (text, for base models), or a .jinja file;
    `chat_format.description` describes the chosen one.
    dtype: "auto" (the checkpoint's), "bfloat16", "float16", "float32".
    device: "auto" (cuda if available), "cpu", "cuda", "cuda:1".
    quantization: "int4" rounds weights to 4 bits in groups of 128; "int8" to 8 bits with a scale per row; "w8a8" also
    quantizes the activations of each token before a matmul. Embeddings and output head stay. "bf12" stores bf16 weights
    in 12 bits, losslessly. A given model is changed in place. None changes nothing; "auto" is "bf12" where it makes
    decoding faster and the model is loaded here.
    max_model_len: tokens of prompt and answer together; default: the model's context, or less if the cache is smaller.
    kv_cache_tokens: tokens of all running requests together; default: what fits in a share of the free memory.
    host_cache_tokens: tokens of evicted KV pages kept in host memory, so that old conversations and preempted requests
    are copied back instead of recomputed; 0 for none.
    kv_cache_dtype: "int8" and "fp8" store keys and values in 8 bits with a scale per token and head, for nearly twice
    as many tokens as in 16 bits. "auto" uses the model's dtype.
    page_size: tokens of a KV page, 16 to 256. seed: seeds the random seeds of requests without one; None takes it from
    the system. Each output reports its seed.
    max_num_seqs: most running sequences; default: as many as the cache should hold, up to 64 on a CPU and 256 on a GPU.
    max_num_batched_tokens: tokens of one step, default 512 up to 2048 on a CPU and 8192 on a GPU, by memory; each
    running answer waits for that step. The logger "fastllama" reports the choices at level INFO.
    speculation: draft tokens, verified several at once: "prompt_lookup" copies them from the text, a draft model (given
    like `model`) samples them; None uses none. For a given seed, answers are the same, except for rounding.
    num_draft_tokens: draft tokens of a sequence in one step, 1 to 7.
    deterministic: batch-invariant logits, and so tokens: bit-identical whatever other requests run, for any pages and
    chunks. On a CPU, prompts then take as long as decoding (docs/design/numerics.md).
    progress: progress bars on stderr; None shows them on a terminal only, and reports kernel compilation anywhere.

    None selects an option's default, except for model and quantization; numbers may be NumPy scalars or 0-d tensors.

    Kernels are compiled in the constructor, not during the first request; warm_up_seconds is the time it took. Raises
    TypeError for an unknown option, ValueError or FileNotFoundError for an illegal value, CheckpointError for a broken
    model.

    Threads may share an LLM: their requests run in one batch, and each thread's steps advance all of them. Every call
    raises RuntimeError while an AsyncEngine owns the LLM, and in a forked process.
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
        # First what needs no weights: a wrong option or path should not cost the minute that loading takes.
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
        self.sampling_defaults = parts.sampling_defaults  # from generation_config.json
        with announcing(parts.model.device, progress):
            self._handle = EngineHandle(Engine(parts.model, parts.tokenizer, options, parts.speculation))
            self.warm_up_seconds = self.engine.warm_up()
        self.prompts = PromptEncoder(self.tokenizer, self.config, self.max_model_len, str(chat_format), parts.name)

    @property
    def engine(self) -> Engine:
        """The engine. Raises RuntimeError after close()."""
        return self._handle.engine

    @property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return self.engine.model.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.engine.scheduler.max_model_len

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters of requests without any: the checkpoint's settings, else SamplingParams' defaults."""
        return SamplingParams(**self.sampling_defaults)

    @property
    def chat_format(self) -> ChatFormat:
        """The chat format: how to encode conversations and end answers. If inferred, a warning is logged once."""
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
        """Complete prompts in one continuous batch; returns outputs in the order of the prompts.

        prompts: a text, texts, token ids, or lists, arrays or tensors of token ids. params: one for all, or one per
        prompt. tags: for prompts that are messages, as in `chat`. add_special_tokens: False for text that already has
        them, such as the output of apply_chat_template.
        Raises before anything runs if a prompt is too long, has a token id out of range, or the counts differ. Raises
        RequestError after all have ended if a request failed or was aborted; its `outputs` has every request's output.
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
        """Log-probabilities of the prompts' own tokens, each given those before it; generates nothing.

        prompts, tags, add_special_tokens: as in `generate`; a prompt may have max_model_len + 1 tokens, since the last
        is scored and not fed.
        start: position of the first scored token, one for all prompts or one per prompt; 1, the default, scores all but
        the first. Cached pages before `start` are reused, so that a question shared by several choices is computed
        once.
        top_logprobs: how many of the likeliest tokens to report at each position, 0 to 20. Ranks are always reported.
        on_logits: called as on_logits(number, position, logits) for runs of scored tokens, with the logits [R, V] of
        prompt `number` from `position` on, in the model's dtype, on its device. They are valid during the call only;
        any thread that uses the LLM may make the call, and may repeat it for the same tokens.
        progress: a progress bar; None is the LLM's setting.
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

        The answer is decoded as a text of its own, as by Tokenizer.decode: without its first token's leading space, for
        stop strings too.
        tags: "escape" changes text that imitates another role, "refuse" raises ValueError.
        continue_final_message: continues the last message, which is the assistant's; the output then keeps its leading
        space, unless the message is blank or ends in blanks that the format drops. See ChatFormat.encode. Raises what
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
        """Complete a prompt (a text, token ids, or messages); returns an iterator over pieces of its text.

        Closing the iterator aborts the request. Raises ValueError if params.n is not 1; at the end, the iterator raises
        RequestError if the request failed or was aborted.
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
        """Queue a prompt as `stream` does; `follow` runs it, and `output()` returns its state at any time.

        request_id: names it for `abort` and in its output; None makes one. continues_text: whether the answer continues
        the prompt's text, or is a text of its own, as in `chat`; None is False for messages, True otherwise.
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
        """Fork a started, unfinished request at its current token; both share its pages until they write.

        params: for the tokens from here on; None uses those of the first, seed included, which gives the same tokens.
        The fork's output includes what the first has generated: tokens, text and log-probabilities, which count for
        max_tokens, penalties and `follow`. Stop strings are searched for in text not released yet. Id, arrival, times
        and end are its own. If no seat is free, or the first is waiting or in its prompt, the fork is queued.
        Raises TypeError for illegal arguments; ValueError if the first has ended, for n other than 1 of either, for
        max_tokens already reached, and for log-probabilities that the first does not report.
        """
        reject(unknown, "LLM.fork", LLM.fork)
        check_started(generation)
        check_params(params)
        return self.engine.fork(generation, params, request_id=request_id)

    def abort(self, request: str | Generation) -> None:
        """End a started request, by its id or itself; `follow` raises RequestError. No effect on a finished one."""
        if not isinstance(request, (str, Generation)):
            raise TypeError(f"request is {brief(request)}; legal: a request's id, a string, or what LLM.start returns")
        generation = request if isinstance(request, Generation) else self.engine.find(request)
        if generation is not None:
            self.engine.abort(generation)

    def encode(
        self, prompt: Prompt, *, tags: Tags = "refuse", add_special_tokens: bool = True, **unknown: Any
    ) -> list[int]:
        """Returns the token ids of a prompt: a text, token ids (returned unchanged), or messages.

        Raises TypeError for anything else, ValueError for text or messages without a tokenizer.
        """
        reject(unknown, "LLM.encode", LLM.encode)
        return self.prompts.encode(prompt, **checked(tags=tags, add_special_tokens=add_special_tokens))

    def follow(self, generation: Generation) -> Iterator[str]:
        """Returns an iterator over pieces of a started request's text; closing it aborts the request.

        It raises RequestError after the last piece if the request failed or was aborted: the text is then incomplete.
        """
        check_started(generation)
        pieces = self._follow(generation)
        next(pieces)  # enters its try: closing an iterator before its first piece aborts the request too
        return pieces

    def _follow(self, generation: Generation) -> Iterator[str]:
        try:
            yield ""
            while True:
                finished = generation.finished  # read before the text: another thread may run the last step now
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
        """Drop the cached keys and values of all prompts, on the host too; later prompts are recomputed.

        Call it after weights were changed in place. Unfinished requests stay, and recompute theirs.
        """
        self.engine.reset_prefix_cache()

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights in place, as in reinforcement learning, and drop everything cached under the old ones.

        tensors: by the names of Hugging Face checkpoints, on any device, of any floating dtype: all of them, or some (a
        model quantized by AWQ or SmoothQuant needs all, since scales have moved between its weights). A dict is checked
        as a whole before anything is written, an iterator tensor by tensor. Quantized layers are quantized again; a
        transformers model that shares the memory changes too. Captured steps are kept, except for bf12, and unfinished
        requests continue with the new weights.
        Raises ValueError for names, shapes and dtypes other than the model's (layers.update.update_weights),
        RuntimeError if another LLM runs the model.
        """
        self.engine.update_weights(tensors)

    def close(self) -> None:
        """Free the model and the KV cache; shuts down an AsyncEngine of this LLM first. May be called twice."""
        self._handle.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
