"""`FastLlamaLM`: an LLM as a model of lm-eval, registered as "fastllama"."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401  (fills the registry: a model registered earlier would stay the only one)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import nn
from tqdm import tqdm

import fastllama
from fastllama.errors import brief
from fastllama.integrations.lm_eval_requests import (
    ScoredPrompt,
    fitting_context,
    generation_params,
    rolling_windows,
    scored_pair,
)
from fastllama.io.chat.errors import ConversationRefusedError
from fastllama.io.chat.template import ChatTemplate
from fastllama.runtime.llm import LLM
from fastllama.runtime.outputs import ScoreOutput
from fastllama.runtime.params import SamplingParams

_LOG = logging.getLogger("fastllama")
_AT_ONCE = 1024  # requests per batch to the runtime, after which lm-eval's cache of answers is written

Item = TypeVar("Item")


@register_model("fastllama")
class FastLlamaLM(TemplateLM):
    """A Llama for lm-eval: log-likelihoods by LLM.score, texts by the runtime's continuous batching.

    pretrained: an LLM, or the `model` argument of one: "tiny", a path, a Hub id or a loaded model. model: an alias.
    max_length: maximum number of tokens of the model's input; default LLM.max_model_len. Contexts are cut on the left.
    add_bos_token: whether texts begin with BOS; None is the tokenizer's own rule, as in lm-eval's `hf`. A text that
    begins with BOS gets no second one.
    prefix_token_id: first token of an empty context and of a rolling text; default BOS, or EOS without one.
    batch_size, max_batch_size: accepted and unused: the runtime chooses its batches.
    options: other arguments of LLM, such as dtype, quantization, kv_cache_dtype, max_model_len, device, adapter.

    Texts are encoded as by transformers, so that special tokens in them become ids. Sampling settings of
    generation_config.json are ignored: a task's generation_kwargs are complete.
    num_prompt_tokens, num_cached_tokens: prompt tokens of all requests so far, and those found in the prefix cache.

    Raises the errors of LLM; ValueError for a model without a tokenizer, and for options given with an LLM.
    """

    def __init__(
        self,
        pretrained: str | Path | nn.Module | LLM | None = None,
        *,
        model: str | Path | nn.Module | LLM | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = model if pretrained is None else pretrained
        if given is None or (pretrained is not None and model is not None):
            raise ValueError(f"pretrained is {brief(pretrained)} and model {brief(model)}; legal: one of the two names")
        if "chat_format" in options:
            raise ValueError(
                f"chat_format is {brief(options['chat_format'])}; legal: none, as lm-eval uses the tokenizer's own "
                "chat template, or without one"
            )
        if isinstance(given, LLM) and options:
            raise ValueError(f"{', '.join(options)} given with an LLM; legal: LLM({next(iter(options))}=...)")
        self.llm = given if isinstance(given, LLM) else LLM(given, **{"max_model_len": max_length, **options})
        self.max_length = self.llm.max_model_len if max_length is None else max_length
        if not 1 < self.max_length <= self.llm.max_model_len:
            raise ValueError(f"max_length is {max_length}; legal: 2 to max_model_len, {self.llm.max_model_len}")
        self.tokenizer = self.llm.prompts.needed_tokenizer()
        bos = self.tokenizer.bos_token_id
        self._bos = [] if bos is None else [bos]
        if add_bos_token and not self._bos:
            raise ValueError("add_bos_token is True; legal: None or False, as the tokenizer has no BOS")
        own = self.tokenizer.encode("")[:1] == self._bos
        self._begins = self._bos if (own if add_bos_token is None else add_bos_token) else []
        self._prefix = [*self._bos, self.tokenizer.eos_token_id][0] if prefix_token_id is None else prefix_token_id
        self.num_prompt_tokens = self.num_cached_tokens = 0

    @property
    def eot_token_id(self) -> int:
        """The id of EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The first token of an empty context and of a rolling text."""
        return self._prefix

    @property
    def max_gen_toks(self) -> int:
        """Default maximum of an answer's tokens, where the task specifies none."""
        return 256

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.llm.engine.model.device

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(self.tokenizer.path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Entries that lm-eval writes with the results."""
        model = self.llm.engine.model
        return {
            "model_num_parameters": model.num_parameters,
            "model_dtype": str(model.dtype).split(".")[1],
            "quantization": self.llm.quantization,
            "max_length": self.max_length,
            "add_bos_token": bool(self._begins),
            "fastllama_version": fastllama.__version__,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; add_special_tokens: whether it begins with BOS, None is the rule of add_bos_token."""
        ids = self.tokenizer.encode_template(string)
        if add_special_tokens is None:
            return ids if string.startswith(self._prefix_piece) else [*self._begins, *ids]
        return [*self._bos, *ids] if add_special_tokens else ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation rendered by the tokenizer's chat template, or with its last message to be continued.

        Where the template rejects it, retries without the system message, as lm-eval's `hf` does.
        Raises ValueError without a template, or where it rejects that too, CheckpointError for a broken one.
        """
        messages: Any = [dict(message) for message in chat_history]
        write = self._template.render if add_generation_prompt else self._template.render_continued
        try:
            return write(messages)
        except ConversationRefusedError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            _LOG.warning("%s; retried without the system message", error)
            return write(others)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to contexts, each with its generation_kwargs, in order.

        Raises ValueError or TypeError, with the task and document, for an illegal request.
        """
        asked = []
        for request in requests:
            with _naming(request):
                asked.append(self._question(*request.args))
        answers: list[str] = []
        with tqdm(total=len(asked), desc="Generating", unit="prompt", disable=disable_tqdm or None) as bar:
            for batch in _batches(list(zip(requests, asked, strict=True))):
                for request, text in zip(batch, self._answers([question for _, question in batch]), strict=True):
                    answers.append(text)
                    self.cache_hook.add_partial("generate_until", request[0].args, text)
                    bar.update()
        return answers

    def _question(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        params = generation_params(options, self.max_gen_toks, self._special_id)
        assert params.max_tokens is not None, "generation_params gives a number"
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return fitting_context(ids, params.max_tokens, self.max_length), params

    def _answers(self, questions: Sequence[tuple[list[int], SamplingParams]]) -> Iterator[str]:
        """Answers as separate texts, without the first token's leading space, also for stop strings."""
        started = []
        try:
            for ids, params in questions:
                started.append(self.llm.start(ids, params, continues_text=False))
            for generation in started:
                yield "".join(self.llm.follow(generation))
                self._count(generation.output().metrics)
        finally:
            for generation in started:
                self.llm.abort(generation)  # after a failure, abort the others; finished ones are unaffected

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding produces it.

        Raises ValueError, with the task and document, for a continuation without tokens or longer than max_length.
        """
        asked = [(request, *self._context_and_continuation(*request.args)) for request in requests]
        return self._loglikelihood_tokens(asked, disable_tqdm)

    def _context_and_continuation(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; an empty context is replaced by the prefix, which the continuation does not repeat."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return [self._prefix], ids[1:] if ids[:1] == [self._prefix] else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The answers to (request, its context, its continuation)."""
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        if longest > self.max_length + 1:
            _LOG.warning(
                "the longest context and continuation have %d tokens, of which the last %d are read; max_length is %d",
                longest,
                self.max_length + 1,
                self.max_length,
            )
        prompts = []
        for request, context, continuation in requests:
            with _naming(request):
                prompts.append(scored_pair(context, continuation, self.max_length))
        answers = []
        for asked, output in zip(requests, self._score(prompts), strict=True):
            answers.append((output.cumulative_logprob, output.is_greedy))
            self.cache_hook.add_partial("loglikelihood", asked[0].args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, of any length, after a single prefix token."""
        texts = [rolling_windows(self._rolling_ids(*each.args), self._prefix, self.max_length) for each in requests]
        outputs = self._score([window for windows in texts for window in windows])
        totals = []
        for request, windows in zip(requests, texts, strict=True):
            totals.append(sum((next(outputs).cumulative_logprob for _ in windows), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _rolling_ids(self, text: str) -> list[int]:
        ids = self.tok_encode(text, add_special_tokens=False)
        return ids[1:] if ids[:1] == [self._prefix] else ids

    def _score(self, prompts: Sequence[ScoredPrompt]) -> Iterator[ScoreOutput]:
        for batch in _batches(prompts):
            outputs = self.llm.score([each.token_ids for each in batch], [each.start for each in batch])
            for output in outputs:
                self._count(output.metrics)
                yield output

    def _count(self, metrics: Any) -> None:
        self.num_prompt_tokens += metrics.num_prompt_tokens
        self.num_cached_tokens += metrics.num_cached_tokens

    def _special_id(self, text: str) -> int | None:
        """The id of a text that is one special token."""
        ids = self.tokenizer.encode_template(text)
        return ids[0] if len(ids) == 1 and ids[0] in self.tokenizer.special_ids else None

    @cached_property
    def _prefix_piece(self) -> str:
        return self.tokenizer.id_to_piece(self._prefix)

    @cached_property
    def _template(self) -> ChatTemplate:
        source = self.tokenizer.chat_template
        if source is None:
            raise ValueError("apply_chat_template is set; legal: only with a tokenizer that has a chat template")
        return ChatTemplate(self.tokenizer, source, str(self.tokenizer.path.parent))


@contextmanager
def _naming(request: Any) -> Iterator[None]:
    """Prefix errors raised within with the request's task and document, where it has them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if request.task_name is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"task {request.task_name}, document {request.doc_id}: {error}") from error


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(items), _AT_ONCE):
        yield items[begin : begin + _AT_ONCE]
