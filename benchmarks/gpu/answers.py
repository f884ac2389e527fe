"""The bundled model's answers by the reference on a CPU, with which a GPU's answers are compared.

`FASTLLAMA_BACKEND=reference python -m benchmarks.gpu.answers` computes answers.json anew. A GPU
rounds fp32 differently from a CPU, so a token may change where two are almost equally likely. A first difference is a
tie if the CPU was close to another token: for a greedy token by the gap between the two best log-probabilities, for a
sampled one by the probability between its random number and the next token, or the next filter bound.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama import LLM, SamplingParams, env
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS
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
TIES = {
    "greedy": 1e-3,
    "sampled": 1e-4,
}  # in log-probability, and in probability: ten times the possible difference of fp32 sums
Answers = list[list[int]]


def params(kind: str, number: int, num_tokens: int) -> SamplingParams:
    """Sampling parameters of a prompt: greedy, or sampled with its own seed."""
    if kind == "greedy":
        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=num_tokens, ignore_eos=True)


def answers(llm: LLM, num_prompts: int = len(PROMPTS), num_tokens: int = NUM_TOKENS) -> dict[str, Answers]:
    """Token ids of all prompts in one batch, greedy and sampled ones apart."""
    found = {}
    for kind in ("greedy", "sampled"):
        wanted = [params(kind, number, num_tokens) for number in range(num_prompts)]
        found[kind] = [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS[:num_prompts], wanted)]
    return found


def compared(found: dict[str, Answers], expected: dict[str, Any]) -> dict[str, Any]:
    """Counts equal and tied answers; returns the first difference of each other one, and whether none is wrong."""
    differences = []
    for kind, ours in found.items():
        for number, (own, theirs) in enumerate(zip(ours, expected[kind], strict=False)):
            place = next((i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), None)
            if place is not None:
                gap = expected["gaps"][kind][number][place]
                differences.append({"kind": kind, "prompt": number, "token": place, "gap": gap})
    ties = [each for each in differences if each["gap"] < TIES[each["kind"]]]
    total = sum(map(len, found.values()))
    return {
        "answers": total,
        "equal": total - len(differences),
        "ties": len(ties),
        "differences": differences,
        "right": len(ties) == len(differences),
    }


def gap(logprob: TokenLogprob) -> float:
    """Gap between the two likeliest tokens of a position."""
    (_, first), (_, second) = logprob.top
    return first - second


def margins(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, offset: Tensor
) -> Tensor:
    """Distance of each sampled row to another outcome, as a share of the probability, [B].

    The least distance of the random number to the bounds of its token's interval, and of top-p to the cumulative sums
    at its cut; top_k and min_p are ignored.
    """
    probs = torch.softmax(logits.double() / temperature[:, None], -1)
    mass = reference.sampling.filter_probs(probs, top_k, top_p.double(), min_p.double()).cumsum(-1)
    total, wanted = mass[:, -1:], reference.sampling.philox(seed, offset).double()[:, None]
    to_tokens = (mass / total - wanted).abs().amin(-1)
    ranked = probs.sort(dim=-1, descending=True).values.cumsum(-1)
    to_filter = (ranked - top_p[:, None].double()).abs().amin(-1)
    return torch.where(top_p < 1, torch.minimum(to_tokens, to_filter), to_tokens)


def expected_answers() -> dict[str, Any]:
    """Contents of the file: token ids, and the gap of each."""
    # No captured steps: their sampling cannot be observed.
    with env.GRAPHS.set_to("0"), LLM("tiny", dtype="float32", device="cpu", progress=False) as llm:
        found: dict[str, Any] = dict(answers(llm))
        reported = [replace(params("greedy", number, NUM_TOKENS), logprobs=2) for number in range(len(PROMPTS))]
        outputs = [each.outputs[0] for each in llm.generate(PROMPTS, reported)]
        greedy = [[gap(each) for each in output.logprobs or ()] for output in outputs]
        sampled = [_sampled_gaps(llm, number, found["sampled"][number]) for number in range(len(PROMPTS))]
    assert [list(output.token_ids) for output in outputs] == found["greedy"]
    gaps = {"greedy": greedy, "sampled": sampled}
    found["gaps"] = {kind: [[float(f"{gap:.2g}") for gap in row] for row in rows] for kind, rows in gaps.items()}
    return found


def _sampled_gaps(llm: LLM, number: int, expected: list[int]) -> list[float]:
    """The margin of each sampled token of one prompt, generated alone."""
    op, found = OPS["sample"], []
    run = op.implementation("cpu").run

    def noting(*args: Any) -> Any:
        found.extend(margins(*args[:7]).tolist())
        return run(*args)

    with op.bound_to(torch.device("cpu"), noting):
        (output,) = llm.generate(PROMPTS[number : number + 1], params("sampled", number, NUM_TOKENS))
    assert list(output.outputs[0].token_ids) == expected
    assert len(found) == NUM_TOKENS
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(expected_answers()) + "\n", encoding="utf-8")
