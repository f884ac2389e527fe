"""Speculative decoding: speed with and without draft tokens, and the time of a step that verifies several tokens.

python -m benchmarks.speculation [--model tiny] [--draft tiny] [--dtype float32] [--tokens 128] [--output FILE]

times decoding, one request at a time, without draft tokens, with prompt lookup and with a draft model: on stories,
which repeat little, so that speculation loses and should switch itself off; and on answers restricted to the words of
a sentence, which repeat. Contenders take turns; the time of a request counts from its first token.

python -m benchmarks.speculation --shape 1.1b [--quantize bf12 int8] [--right 0.8] [--steps 32] [--output FILE]

times decode steps of one sequence, random weights, with 1, 2, 4 and 8 tokens: the sampled one and draft tokens that are
accepted with the given probability. They are always verified, even where that is slower. A logit bias fixes the token
that is sampled, and so which draft tokens are accepted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import abc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import torch

from fastllama import LLM, LlamaForCausalLM, SamplingParams
from fastllama.bench import models
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.text import table
from fastllama.runtime.drafting.prompt_lookup import PROMPT_LOOKUP
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.planning.step import Step

SENTENCES = (
    "The cat sat on the mat.",
    "Tom and Lily went to the park and played with a ball.",
    "One day the little bird saw a big dog and a small fish.",
)
STORIES = ("Once upon a time", "The little dog", "It was a cold day, and Tom")
TEXTS = {"stories": STORIES, "a few words": SENTENCES}
SURE = 100.0  # a bias that outweighs all logits
RIGHT, WRONG = 7, 8  # token ids
LENGTHS = (1, 2, 4, 8)  # tokens of a step
CONTEXT = 512
UNCOUNTED = 4  # steps at the start

Record = dict[str, Any]


def params_of(llm: LLM, text: str, sentence: str, sampled: bool, tokens: int) -> SamplingParams:
    """Sampling parameters for that many tokens, optionally restricted to the tokens of a sentence."""
    held = {} if text == "stories" else dict.fromkeys(llm.encode(sentence)[1:], SURE)
    heat = 0.8 if sampled else 0.0
    return SamplingParams(
        temperature=heat, top_p=0.95, seed=1, max_tokens=tokens, ignore_eos=True, logit_bias=held or None
    )


def answer(llm: LLM, text: str, sampled: bool, tokens: int) -> Record:
    """Seconds after the first tokens, draft tokens, and the answers to all prompts of a kind, one after another."""
    outputs = [llm.generate(each, params_of(llm, text, each, sampled, tokens))[0] for each in TEXTS[text]]
    metrics = [output.metrics for output in outputs]
    return {
        "seconds": sum((each.finish_time or 0.0) - (each.first_token_time or 0.0) for each in metrics),
        "drafted": sum(each.num_draft_tokens for each in metrics),
        "accepted": sum(each.num_accepted_tokens for each in metrics),
        "answers": [output.outputs[0].token_ids for output in outputs],
    }


def compare(options: argparse.Namespace) -> list[Record]:
    """A record for each kind of text, temperature and contender, each with a new LLM, which has timed no steps yet."""
    guessers = {"off": None, PROMPT_LOOKUP: PROMPT_LOOKUP, f"draft {options.draft}": options.draft}
    found: list[Record] = []
    for text, sampled in product(TEXTS, (False, True)):
        case = {"text": text, "sampled": sampled}
        with ExitStack() as stack:
            llms = {
                name: stack.enter_context(
                    LLM(
                        options.model,
                        dtype=options.dtype,
                        device="cpu",
                        max_model_len=CONTEXT,
                        kv_cache_tokens=2 * CONTEXT,
                        speculation=guesser,
                        num_draft_tokens=options.num_draft_tokens,
                        progress=False,
                    )
                )
                for name, guesser in guessers.items()
            }
            rounds = _in_turns(llms, partial(answer, text=text, sampled=sampled, tokens=options.tokens), options.rounds)
        expected = rounds["off"][0]["answers"]
        for name, samples in rounds.items():
            seconds = [each["seconds"] for each in samples]
            counted = len(TEXTS[text]) * (options.tokens - 1)
            found.append(
                case
                | {"name": name, "seconds": seconds}
                | {count: sum(each[count] for each in samples) for count in ("drafted", "accepted")}
                | {"tokens_per_second": counted / statistics.median(seconds)}
                | {"different": sum(a != b for a, b in zip(samples[0]["answers"], expected, strict=True))}
            )
    return found


class Scripted:
    """Proposes the token that the bias selects, with a given probability."""

    def __init__(self, right: float) -> None:
        self._right, self._random = right, random.Random(0)

    def warm_up(self) -> float:
        """Does nothing."""
        return 0.0

    def follow(self, step: Step) -> None:
        """Does nothing."""

    def propose(self, sequences: abc.Sequence[Sequence], count: int) -> list[tuple[int, ...]]:
        """Propose `count` tokens for each sequence."""
        return [tuple(RIGHT if self._random.random() < self._right else WRONG for _ in range(count)) for _ in sequences]

    def forget(self, sequences: abc.Sequence[Sequence]) -> None:
        """Does nothing: it keeps no state."""


class Always(Pace):
    """Verifies every draft token."""

    def pays(self, num_seqs: int, num_proposals: int) -> bool:
        """Always True."""
        return True


def verifier(model: LlamaForCausalLM, length: int, right: float) -> LLM:
    """Returns an LLM whose decode steps have that many tokens."""
    count = max(length - 1, 1)
    llm = LLM(
        model,
        quantization=None,
        max_model_len=CONTEXT,
        kv_cache_tokens=CONTEXT,
        max_num_seqs=1,
        speculation=None if length == 1 else PROMPT_LOOKUP,
        num_draft_tokens=count,
        progress=False,
    )
    if llm.engine.speculation is not None:
        llm.engine.speculation.drafter = Scripted(right)
        llm.engine.speculation._pace = Always(count)
    return llm


def decode(llm: LLM, steps: int) -> Record:
    """Seconds of each counted step, and the tokens that the steps generated."""
    params = SamplingParams(temperature=0, max_tokens=CONTEXT - 8, ignore_eos=True, logit_bias={RIGHT: SURE})
    generation = llm.engine.add_request([RIGHT] * 8, params)
    for _ in range(1 + UNCOUNTED):  # the prompt, and those
        llm.engine.step()
    seconds, before = [], generation.metrics().num_generated_tokens
    for _ in range(steps):
        start = time.perf_counter()
        llm.engine.step()
        seconds.append(time.perf_counter() - start)
    gained = generation.metrics().num_generated_tokens - before
    llm.engine.abort(generation)
    return {"seconds": seconds, "tokens": gained}


def verify(options: argparse.Namespace) -> list[Record]:
    """A record for each quantization and each number of tokens in a step."""
    found: list[Record] = []
    for kind in options.quantize:
        torch.manual_seed(0)
        config = models.shape(options.shape, CONTEXT)
        model = models.random_model(config, kind, torch.bfloat16, torch.device("cpu"))
        with ExitStack() as stack:
            llms = {length: stack.enter_context(verifier(model, length, options.right)) for length in LENGTHS}
            rounds = _in_turns(llms, partial(decode, steps=options.steps), options.rounds)
        for length, samples in rounds.items():
            seconds = [each for sample in samples for each in sample["seconds"]]
            tokens = sum(sample["tokens"] for sample in samples)
            found.append(
                {"quantization": kind, "length": length, "weight_bytes": models.read_bytes(model), "seconds": seconds}
                | {"tokens_per_step": tokens / len(seconds), "tokens_per_second": tokens / sum(seconds)}
            )
        del model, llms
        models.release(torch.device("cpu"))
    return found


def _in_turns(contenders: dict[Any, LLM], take: Callable[[LLM], Record], rounds: int) -> dict[Any, list[Record]]:
    """Results of each contender in each round, after a warm-up round."""
    found: dict[Any, list[Record]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, llm in contenders.items():
            found[name].append(take(llm))
    return {name: samples[1:] for name, samples in found.items()}


def compared(found: list[Record]) -> str:
    """The table of `compare`."""
    rows = [("", "sampling", "drafts", "tokens/s", "times plain", "drafted", "accepted", "answers differ")]
    for each in found:
        off = next(
            other["tokens_per_second"]
            for other in found
            if (other["text"], other["sampled"], other["name"]) == (each["text"], each["sampled"], "off")
        )
        drafted, rate = each["drafted"], each["tokens_per_second"]
        rows.append(
            (
                each["text"],
                "sampled" if each["sampled"] else "greedy",
                each["name"],
                f"{rate:.0f}",
                f"{rate / off:.2f}",
                str(drafted),
                f"{each['accepted'] / drafted:.0%}" if drafted else "-",
                str(each["different"]),
            )
        )
    return table(rows)


def verified(found: list[Record]) -> str:
    """The table of `verify`."""
    rows = [("weights", "tokens of a step", "ms", "times one", "tokens that count", "tokens/s")]
    for each in found:
        one = next(
            other for other in found if (other["quantization"], other["length"]) == (each["quantization"], LENGTHS[0])
        )
        median = statistics.median(each["seconds"])
        rows.append(
            (
                each["quantization"],
                str(each["length"]),
                f"{1e3 * median:.1f}",
                f"{median / statistics.median(one['seconds']):.2f}",
                f"{each['tokens_per_step']:.2f}",
                f"{each['tokens_per_second']:.1f}",
            )
        )
    return table(rows)


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--draft", default="tiny", help="the draft model, of the same vocabulary")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--shape", choices=models.SHAPES, help="time steps of random weights of this shape")
    parser.add_argument("--quantize", nargs="+", choices=("none", "bf12", "int8", "int4"), default=["bf12", "int8"])
    parser.add_argument("--right", type=float, default=0.8, help="probability that a draft token is accepted")
    parser.add_argument("--steps", type=int, default=32, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=output_file, help="where to write conditions and every sample as JSON")
    options = parser.parse_args()
    found = compare(options) if options.shape is None else verify(options)
    print((compared if options.shape is None else verified)(found), flush=True)
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"}
        conditions["threads"] = str(torch.get_num_threads())
        record = {"benchmark": "speculation", "environment": environment(), "conditions": conditions}
        write_record(options.output, record | {"samples": found})


if __name__ == "__main__":
    main()
