"""Compares layers, logits and tokens of the whole runtime on a held-out text with a dense reference."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllama.errors import RequestError, counted
from fastllama.io.formats.base import Checkpoint
from fastllama.layers.config import LlamaConfig
from fastllama.layers.weights import hf_tensors
from fastllama.progress import progress_bar
from fastllama.runtime.llm import LLM
from fastllama.runtime.outputs import CompletionOutput
from fastllama.runtime.params import SamplingParams
from fastllama.verify import oracle
from fastllama.verify.hugging_face import TransformersReference
from fastllama.verify.report import Row, bound_of, error_of

NUM_TOKENS = 128  # of text and answer together: two pages of the KV cache, so that a page boundary is crossed
NUM_GREEDY = 32
CHUNK = 40  # prompt tokens per step: the text takes three, whose bounds are not page bounds


def lengths(config: LlamaConfig) -> tuple[int, int]:
    """Numbers of tokens of the text and of the greedy answer, fewer for a model with a shorter context."""
    longest = config.longest_context
    total = NUM_TOKENS if longest is None else min(NUM_TOKENS, longest)
    answer = min(NUM_GREEDY, total // 4)
    return total - answer, answer


@dataclass(frozen=True)
class Run:
    """What the runtime computed for ids [T]: the residual stream [T, H] after each layer, logits [T, V], T in order.

    answer: the tokens sampled from the last logits; trouble: why there are fewer than requested.
    """

    ids: Tensor
    layers: list[Tensor]
    logits: Tensor
    answer: tuple[int, ...]
    trouble: str | int | None


def weight_row(llm: LLM, checkpoint: Checkpoint) -> Row:
    """Whether the model holds the checkpoint's tensors, cast to its dtype, bit for bit."""
    held = dict(hf_tensors(llm.engine.model))
    error, count = 0.0, 0
    for name, tensor in checkpoint.tensors():
        if name in held:
            ours = held[name]
            tensor = tensor if isinstance(tensor, Tensor) else tensor.dequantize()
            error = max(error, error_of(ours.flatten(), tensor.to(ours.device, ours.dtype).flatten()))
            count += 1
    return Row("weights", "weights", f"{count} tensors", error, 0.0)


def rows(llm: LLM, theirs: TransformersReference | None = None, *, progress: bool | None = None) -> Iterator[Row]:
    """A row for each layer, one for the logits, two for the greedy tokens. progress: a bar; None: on a terminal.

    theirs: the reference instead of the oracle.

    Layers and logits are recorded by hooks, with which every step runs eagerly. So the second row is for the tokens
    without hooks, whose steps are replayed where they can be captured: on a GPU as CUDA graphs that include sampling.
    """
    dtype = llm.engine.model.dtype
    count, num_answer = lengths(llm.config)
    run = _observe(llm, _text_ids(llm, count), num_answer)
    params = SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True)
    replayed = _answer(llm, run.ids[:count].tolist(), params)
    references = _references(llm, run.ids, theirs)
    with torch.inference_mode(), progress_bar("Layers", progress, total=len(run.layers)) as bar:
        for i, ours in enumerate(run.layers):
            reference, bound = next(references)
            yield Row("layer", f"layer {i}", counted(ours.shape[0], "token"), error_of(ours, reference), bound)
            bar.update()
        reference, bound = next(references)
        yield Row("logits", "logits", counted(run.logits.shape[0], "token"), error_of(run.logits, reference), bound)
        ties = 0.0 if dtype == torch.float32 else 2 * bound
        yield _token_row(run, reference, ties)
        way = "by replayed steps" if llm.engine.replays else "by eager steps"
        yield _again_row(run, replayed, reference, ties, way)


def _references(llm: LLM, ids: Tensor, theirs: TransformersReference | None) -> Iterator[tuple[Tensor, float]]:
    """The reference for each layer's output, then for the logits of ids [T], each with the bound of the difference.

    Ours may differ from the oracle by twice the error of plain torch plus one rounding. So may transformers, so the two
    may differ by twice that. It also rounds the rotary frequencies in another order, up to an ulp away, which position
    127 multiplies: the change of plain torch by that ulp is added. The bound is based on plain torch even then: with a
    misread config, transformers would be far off our oracle, and a bound based on it would widen.
    """
    weights, dtype = dict(hf_tensors(llm.engine.model)), llm.engine.model.dtype

    def forward(dtype: torch.dtype, *, next_frequencies: bool = False) -> Iterator[Tensor]:
        return oracle.forward(llm.config, weights, ids, dtype, llm.max_model_len, next_frequencies=next_frequencies)

    both = zip(forward(torch.float64), forward(dtype), strict=True)
    if theirs is None:
        yield from ((exact, bound_of(plain, exact, dtype)) for exact, plain in both)
        return
    seen = zip(both, forward(dtype, next_frequencies=True), theirs.forward(ids, llm.max_model_len), strict=True)
    for (exact, plain), moved, reference in seen:
        yield reference, 2 * bound_of(plain, exact, dtype) + error_of(moved, plain)


def _token_row(run: Run, logits: Tensor, bound: float) -> Row:
    """The logit gap between the reference's choice and our tokens after the same text.

    In fp32 each must be its choice. In 16 bits, each logit may be off by its bound, so ties extend to twice the bound.
    """
    case = counted(len(run.answer), "greedy token")
    if run.trouble is not None:
        return Row("tokens", "tokens", f"{case}, then {run.trouble}", math.inf, bound)
    logits = logits[-len(run.answer) :]
    best, ours = (
        logits.amax(-1),
        logits.gather(1, torch.tensor(run.answer, dtype=torch.int64, device=logits.device)[:, None])[:, 0],
    )
    gaps = (best - ours) / logits.abs().amax(-1)
    if ties := int((gaps > 0).sum()):
        one, more = ("a near-tie", "near-ties") if float(gaps.max()) <= bound else ("another", "others")
        case += f", {ties} of them {one if ties == 1 else more}"
    return Row("tokens", "tokens", case, float(gaps.max()), bound)


def _again_row(run: Run, again: CompletionOutput, logits: Tensor, bound: float, way: str) -> Row:
    """The reference's logit gap at the first token that differs from the hooked run's.

    Up to there the texts are equal, and so are the reference's logits; after it they are not known.
    """
    case = f"{len(again.token_ids)} greedy tokens {way}"
    if run.trouble is not None or len(again.token_ids) < len(run.answer):
        return Row("tokens", "replayed tokens", case, math.inf, bound)
    others = [i for i, (ours, seen) in enumerate(zip(again.token_ids, run.answer, strict=True)) if ours != seen]
    if not others:
        return Row("tokens", "replayed tokens", case, 0.0, bound)
    row = logits[-len(run.answer) :][others[0]]
    gap = float((row.max() - row[again.token_ids[others[0]]]) / row.abs().max())
    return Row("tokens", "replayed tokens", f"{case}, others from token {others[0] + 1} on", gap, bound)


def _text_ids(llm: LLM, count: int) -> list[int]:
    """The start of the held-out text; without a tokenizer, ids from a seed."""
    if llm.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(llm.config.vocab_size, (count,), generator=generator, dtype=torch.int64, device="cpu")
        return ids.tolist()
    text = importlib.resources.files("fastllama").joinpath("assets", "tiny", "heldout_seed.txt")
    return llm.tokenizer.encode(text.read_text(encoding="utf-8")[: 40 * count])[:count]


def _answer(llm: LLM, ids: list[int], params: SamplingParams) -> CompletionOutput:
    """The completion of these ids; a partial one where it failed."""
    try:
        (output,) = llm.generate(ids, params)
    except RequestError as error:
        (output,) = error.outputs
    return output.outputs[0]


def _observe(llm: LLM, ids: list[int], num_answer: int) -> Run:
    """Complete ids greedily through the engine, and record hidden states and logits by hooks."""
    model = llm.engine.model
    streams: list[list[Tensor]] = [[] for _ in model.layers]
    logits: list[Tensor] = []

    handles = [model.register_forward_hook(lambda module, args, output: logits.append(output.clone()))]
    for block, stream in zip(model.layers, streams, strict=True):

        def hook(module: nn.Module, args: Any, output: Tensor, stream: list[Tensor] = stream) -> None:
            stream.append(output.clone())  # the next layer adds to it in place

        handles.append(block.register_forward_hook(hook))
    params = SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True, prompt_logprobs=0)
    try:
        sample = _answer(llm, ids, params)
    finally:
        for handle in handles:
            handle.remove()
    seen = torch.cat(logits)
    fed = torch.tensor([*ids, *sample.token_ids][: seen.shape[0]], dtype=torch.int64, device=model.device)
    return Run(fed, [torch.cat(stream) for stream in streams], seen, sample.token_ids, sample.stop_reason)
