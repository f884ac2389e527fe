"""The blocking face: a model by name, prompts in, texts out."""

from __future__ import annotations

import inspect
import logging
from collections import abc
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from fastllama.errors import reject_unknown
from fastllama.io.adapter import locate
from fastllama.io.chat import ChatFormat, Message, check_chat_format
from fastllama.io.chat import chat_format as choose_format
from fastllama.io.companions import find_tokenizer, read_sampling_settings
from fastllama.io.hub import resolve_model
from fastllama.io.load import load_model, resolve_device
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from fastllama.kernels.compiling import compiling_announced
from fastllama.layers import packing
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import check_quantization
from fastllama.progress import progress_bar
from fastllama.runtime.drafting.prompt_lookup import PROMPT_LOOKUP
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.options import EngineOptions
from fastllama.runtime.outputs import RequestOutput
from fastllama.runtime.params import SamplingParams

_LOG = logging.getLogger("fastllama")


class LLM:
    """A Llama with its tokenizer and runtime.

    model: "tiny" (bundled), a path (Hugging Face or Meta folder, llama2.c file), a Hub id, or a LlamaForCausalLM, whose
    rotary cache is then made anew for max_model_len.
    tokenizer: a path or a Tokenizer; by default the one that lies with the model. Without one, only ids go in and out.
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
    page_size: tokens of a KV page, 16 to 256. seed: of the draws of requests that bring none.
    max_num_seqs: sequences that run at once; by default as many as the cache should hold, up to 64 on a CPU and 256 on
    a GPU. max_num_batched_tokens: tokens of one step, by default 512 up to 2048 on a CPU and 8192 on a GPU, by memory;
    each running answer waits for that step. The logger "fastllama" tells at level INFO what was chosen.
    speculation: guesses that are verified several at once: "prompt_lookup" takes them from the text itself, a draft
    model (given as `model` is) writes them; None makes none. Answers stay as they are, seed by seed, but for rounding.
    num_draft_tokens: guesses of a sequence in one step, 1 to 7.
    deterministic: a request's logits, and so its tokens, are the same bit for bit, whatever else runs beside it, from
    whichever pages, in whatever chunks. Prompts then take as long as decoding on a CPU (docs/numerics.md).
    progress: bars on stderr; None shows them on a terminal only, and lines about kernels that are compiled anywhere.

    Kernels compile while it is made, none under the first request; warm_up_seconds says how long that took.
    Raises TypeError for an unknown option, ValueError or FileNotFoundError for an illegal value, CheckpointError for a
    broken model. One thread at a time.
    """

    def __init__(
        self,
        model: str | Path | LlamaForCausalLM = "tiny",
        *,
        tokenizer: str | Path | Tokenizer | None = None,
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
        seed: int = 0,
        deterministic: bool = False,
        speculation: str | Path | LlamaForCausalLM | None = None,
        num_draft_tokens: int = 3,
        progress: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            legal = [name for name in inspect.signature(LLM.__init__).parameters if name not in ("self", "unknown")]
            reject_unknown("LLM", unknown, legal)
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
        check_quantization(quantization)
        check_chat_format(chat_format)
        if speculation not in (None, PROMPT_LOOKUP) and not isinstance(speculation, LlamaForCausalLM):
            speculation = resolve_model(str(speculation))
        self._progress = progress
        if not isinstance(model, (str, Path, LlamaForCausalLM)):
            raise TypeError(
                f"model is a {type(model).__name__}; legal: 'tiny', a path, a Hub id, or what fastllama.load_model "
                "returns (for a model of transformers: fastllama.patch(model))"
            )
        self._name = None if isinstance(model, LlamaForCausalLM) else str(model)
        self._choice = chat_format
        self._chat_format: ChatFormat | None = None
        self.sampling_defaults: dict[str, Any] = {}  # what generation_config.json sets, by SamplingParams' names
        if isinstance(model, LlamaForCausalLM):
            for name, value in (("dtype", dtype), ("device", device)):
                if value != "auto":
                    raise ValueError(f"{name} is {value!r} beside a loaded model, which has its own; legal: 'auto'")
            if adapter is not None:
                raise ValueError(f"adapter is {str(adapter)!r} beside a loaded model; legal: load_model(..., adapter=)")
            self.tokenizer, loaded = _tokenizer_of(tokenizer), model
        else:
            target, (path, merged) = resolve_device(device), locate(model, adapter)
            self.tokenizer = _tokenizer_of(tokenizer, *filter(None, (merged, path)))
            self.sampling_defaults = _legal_settings(path)
            loaded = load_model(path, adapter=merged, dtype=dtype, device=target, progress=progress)
        if self.tokenizer is not None and self.tokenizer.vocab_size > loaded.config.vocab_size:
            _LOG.warning(
                "the tokenizer has ids up to %d, the model embeddings up to %d: prompts that need others are refused",
                self.tokenizer.vocab_size - 1,
                loaded.config.vocab_size - 1,
            )
        given = isinstance(model, LlamaForCausalLM)
        self.quantization = packing.resolve(loaded, quantization, given=given)  # what is done
        with nullcontext() if progress is False else compiling_announced(loaded.device):
            packing.apply(loaded, self.quantization, progress=progress)
            if isinstance(speculation, Path):
                speculation = load_model(speculation, dtype=loaded.dtype, device=loaded.device, progress=progress)
                packing.apply(speculation, packing.resolve(speculation, "auto"), progress=progress)
            self._engine: Engine | None = Engine(loaded, self.tokenizer, options, speculation)
            self.warm_up_seconds = self._engine.warm_up()

    @property
    def engine(self) -> Engine:
        """The engine below. Raises RuntimeError once the LLM is closed."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    @property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return self.engine.model.config

    @property
    def default_params(self) -> SamplingParams:
        """The parameters of requests that bring none: the checkpoint's sampling settings, else SamplingParams' own."""
        return SamplingParams(**self.sampling_defaults)

    @property
    def chat_format(self) -> ChatFormat:
        """How conversations are asked, and what ends an answer. A guess is logged as a warning, once."""
        if self._chat_format is None:
            self._chat_format = choose_format(self._needed_tokenizer(), choice=self._choice, model=self._name)
        return self._chat_format

    def generate(
        self,
        prompts: str | abc.Sequence[str] | abc.Sequence[int] | abc.Sequence[abc.Sequence[int]],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch; outputs in the order of the prompts.

        prompts: a text, texts, token ids, or lists of token ids. params: one for all, or one for each prompt.
        Raises before anything runs if a prompt is too long, holds an id out of range, or the counts differ.
        """
        given = _as_list(prompts)
        each = _params_of_each(self.default_params if params is None else params, len(given))
        generations: list[Generation] = []
        try:
            for prompt, own in zip(given, each, strict=True):
                generations.append(self._add(prompt, own))
            self._finish(generations)
        except BaseException:
            for generation in generations:
                self.engine.abort(generation)
            raise
        return [generation.output() for generation in generations]

    def chat(self, messages: abc.Sequence[Message], params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation in `chat_format`; messages: [{"role": "user", "content": ...}, ...]."""
        (params,) = _params_of_each(self.default_params if params is None else params, 1)
        return self.generate([self.chat_format.encode(messages)], self._ending_answers(params))[0]

    def stream(
        self, prompt: str | abc.Sequence[int] | abc.Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The completion of a prompt (a text, token ids, or the messages of a chat) in pieces, as they become certain.

        Closing the iterator aborts the request. Raises ValueError where params.n is not 1.
        """
        return self.follow(self.start(prompt, params))

    def start(
        self, prompt: str | abc.Sequence[int] | abc.Sequence[Message], params: SamplingParams | None = None
    ) -> Generation:
        """Queue what `stream` would: `follow` runs it; its `output()` tells tokens, reason and timings at any time."""
        (params,) = _params_of_each(self.default_params if params is None else params, 1)
        self._needed_tokenizer()
        if params.n != 1:
            raise ValueError(f"n is {params.n}; legal for a stream: 1")
        return self._add(prompt, params)

    def fork(self, generation: Generation, params: SamplingParams | None = None) -> Generation:
        """A second request that goes on from where a started, unfinished one stands, sharing its pages until it writes.

        params: of the tokens from here on; None takes those of the first, seed included, which so give the same tokens.
        Its output begins with what the first has generated: tokens, text and log-probabilities, which max_tokens,
        penalties and `follow` count in. Stop strings are sought in text that was not released yet. All else is its own:
        id, arrival, times, end. Where no seat is free, or the first waits or is reading its prompt, it is queued.
        Raises TypeError for other things, ValueError if the first has ended, for n other than 1 of either, max_tokens
        that are reached already, and log-probabilities that the first does not report.
        """
        if not isinstance(generation, Generation):
            raise TypeError(f"generation is {generation!r:.99}; legal: what LLM.start returns")
        if params is not None and not isinstance(params, SamplingParams):
            raise TypeError(f"params is {params!r:.99}; legal: SamplingParams or None")
        return self.engine.fork(generation, params)

    def encode(self, prompt: str | abc.Sequence[int] | abc.Sequence[Message]) -> abc.Sequence[int]:
        """The token ids of a prompt: a text, token ids (which stay as they are), or the messages of a chat.

        Raises TypeError for anything else, ValueError for text or messages without a tokenizer.
        """
        if not isinstance(prompt, abc.Sequence) or isinstance(prompt, bytes):
            raise TypeError(f"prompt is {prompt!r:.99}; legal: a text, token ids, or the messages of a chat")
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.chat_format.encode(cast(abc.Sequence[Message], prompt))
        return cast(abc.Sequence[int], prompt)

    def prepare(
        self, prompt: str | abc.Sequence[int] | abc.Sequence[Message], params: SamplingParams
    ) -> tuple[abc.Sequence[int], SamplingParams]:
        """What `encode` gives, and the parameters that it runs with: those of a chat end where its format's answers do.

        Raises what `encode` raises.
        """
        ids = self.encode(prompt)
        chat = not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping)
        return ids, self._ending_answers(params) if chat else params

    def _ending_answers(self, params: SamplingParams) -> SamplingParams:
        """Parameters that end an answer where the chat format does, too."""
        chat = self.chat_format
        ids = [] if params.ignore_eos else [i for i in chat.stop_token_ids if i not in self.config.eos_token_ids]
        stop, stop_token_ids = (*params.stop, *chat.stop), (*params.stop_token_ids, *ids)
        return replace(params, stop=stop, stop_token_ids=stop_token_ids)

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self._needed_tokenizer()
        ids = tokenizer.encode(text)
        if not ids and tokenizer.bos_token_id is not None:  # nothing to go on from, as in transformers' generate
            return [tokenizer.bos_token_id]
        return ids

    def follow(self, generation: Generation) -> Iterator[str]:
        """The text of a started request in pieces; closing the iterator aborts it."""
        pieces = self._follow(generation)
        next(pieces)  # into its try: closing an iterator that was never asked for a piece aborts the request too
        return pieces

    def _follow(self, generation: Generation) -> Iterator[str]:
        try:
            yield ""
            while True:
                streams = [sample.stream for sample in generation.samples.values()]
                if piece := "".join(stream.take() for stream in streams if stream is not None):
                    yield piece
                elif generation.finished:
                    return
                else:
                    self.engine.step()
        finally:
            if self._engine is not None:
                self._engine.abort(generation)

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, prompt: str | abc.Sequence[int] | abc.Sequence[Message], params: SamplingParams) -> Generation:
        ids, params = self.prepare(prompt, params)
        return self.engine.add_request(ids, params, prompt=prompt if isinstance(prompt, str) else None)

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("tokenizer is None and there is none with the model; legal for text: tokenizer=PATH")
        return self.tokenizer

    def _finish(self, generations: list[Generation]) -> None:
        """Run until these requests have finished."""
        shown = False if len(generations) < 2 else self._progress
        pending = set(generations)
        with progress_bar("Generating", shown, total=len(generations), unit="prompt") as bar:
            while pending:
                ended = {generation for generation in self.engine.step() if generation.finished} & pending
                pending -= ended
                bar.update(len(ended))


def _tokenizer_of(tokenizer: str | Path | Tokenizer | None, *places: Path) -> Tokenizer | None:
    """The tokenizer that is given or lies at a path, else the first that lies with the model."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer or find_tokenizer(*places)
    if not isinstance(tokenizer, (str, Path)):
        raise TypeError(f"tokenizer is {tokenizer!r:.99}; legal: a path, fastllama's Tokenizer, or None")
    return load_tokenizer(tokenizer)


def _legal_settings(model: Path) -> dict[str, Any]:
    """The checkpoint's sampling settings, less those that SamplingParams refuses, which are logged."""
    legal = {}
    file, settings = read_sampling_settings(model)
    for name, value in settings.items():
        try:
            SamplingParams.from_dict({name: value})
        except (TypeError, ValueError) as error:
            _LOG.warning("%s: %s; the setting is ignored", file, error)
        else:
            legal[name] = value
    if legal:
        given = ", ".join(f"{name}={value!r}" for name, value in legal.items())
        _LOG.info("%s: %s, unless a request brings parameters of its own", file.name, given)
    return legal


def _as_list(
    prompts: str | abc.Sequence[str] | abc.Sequence[int] | abc.Sequence[abc.Sequence[int]],
) -> list[str | abc.Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, abc.Sequence) and not isinstance(prompts, bytes):
        if len(prompts) > 0 and isinstance(prompts[0], int):
            return [cast("abc.Sequence[int]", prompts)]
        if all(isinstance(prompt, abc.Sequence) and not isinstance(prompt, bytes) for prompt in prompts):
            return list(cast("abc.Sequence[str] | abc.Sequence[abc.Sequence[int]]", prompts))
    raise TypeError(f"prompts is {prompts!r:.99}; legal: a text, texts, token ids, or lists of token ids")


def _params_of_each(params: SamplingParams | abc.Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    each = [params] * count if isinstance(params, SamplingParams) else params
    if not isinstance(each, abc.Sequence) or not all(isinstance(own, SamplingParams) for own in each):
        raise TypeError(f"params is {params!r:.99}; legal: SamplingParams, or a list of one for each prompt")
    if len(each) != count:
        raise ValueError(f"params has {len(each)} entries for {count} prompts; legal: one for all, or one for each")
    return list(each)
