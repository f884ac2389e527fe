"""The bundled model's answers, as the reference gives them on a CPU, carried to where a GPU gives its own.

`FASTLLAMA_BACKEND=reference python -m benchmarks.gpu.answers` computes answers.json anew. In fp32 a device rounds
differently from a CPU, so that greedy tokens may turn where two are nearly as likely: a first difference counts as a
tie where the gap between the two best log-probabilities, known from the CPU, is below TIE. A sampled token turns with a
probability of about 1e-5: one of the eight answers may.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastllama import LLM, SamplingParams
from fastllama.runtime.outputs import TokenLogprob

FILE = Path(__file__).parent / "answers.json"
PROMPTS = (
    "Once upon a time",
    "The dog",
    "One day, a little girl named Lily found a needle in her room.",
    "Tom and his mom went to the park",
    "There was a big red ball. ",
    "A",
    "The sun was hot and the birds were singing. Ben wanted to swim, but",
    "Once upon a time, in a small house by the river, there lived an old man who had a cat, a dog, and a very small "
    "mouse. Every morning the old man gave each of them some milk, and every morning the cat said",
)
NUM_TOKENS = 60
TIE = 1e-3
MOST_TURNED = 1
Answers = list[list[int]]


def params(kind: str, number: int, num_tokens: int) -> SamplingParams:
    """Of a prompt: greedy, or sampled with its own seed."""
    if kind == "greedy":
        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=num_tokens, ignore_eos=True)


def answers(llm: LLM, num_prompts: int = len(PROMPTS), num_tokens: int = NUM_TOKENS) -> dict[str, Answers]:
    """Token ids, all prompts at once: steps are of several sequences, and of one kind."""
    found = {}
    for kind in ("greedy", "sampled"):
        wanted = [params(kind, number, num_tokens) for number in range(num_prompts)]
        found[kind] = [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS[:num_prompts], wanted)]
    return found


def compared(found: dict[str, Answers], expected: dict[str, Any]) -> dict[str, Any]:
    """How many answers are equal, tied and turned, where each that is not equal parts, and whether all is well."""
    differences = []
    for kind, ours in found.items():
        for number, (own, theirs) in enumerate(zip(ours, expected[kind], strict=False)):
            place = next((i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), None)
            if place is not None:
                gap = expected["gaps"][number][place] if kind == "greedy" else None
                differences.append({"kind": kind, "prompt": number, "token": place, "gap": gap})
    ties = [each for each in differences if each["gap"] is not None and each["gap"] < TIE]
    turned = [each for each in differences if each["gap"] is None]
    wrong = len(differences) - len(ties) - (len(turned) if len(turned) <= MOST_TURNED else 0)
    total = sum(map(len, found.values()))
    return {
        "answers": total,
        "equal": total - len(differences),
        "ties": len(ties),
        "turned": len(turned),
        "differences": differences,
        "right": wrong == 0,
    }


def gap(logprob: TokenLogprob) -> float:
    """Between the two likeliest tokens in a place."""
    (_, first), (_, second) = logprob.top
    return first - second


def expected_answers() -> dict[str, Any]:
    """What the file holds: token ids, and at each greedy one the gap between the two best log-probabilities."""
    with LLM("tiny", dtype="float32", device="cpu", progress=False) as llm:
        found: dict[str, Any] = dict(answers(llm))
        reported = [replace(params("greedy", number, NUM_TOKENS), logprobs=2) for number in range(len(PROMPTS))]
        outputs = [each.outputs[0] for each in llm.generate(PROMPTS, reported)]
    assert [list(output.token_ids) for output in outputs] == found["greedy"]
    found["gaps"] = [[float(f"{gap(each):.2g}") for each in output.logprobs or ()] for output in outputs]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(expected_answers()) + "\n", encoding="utf-8")
