"""Evaluates the trained model: held-out perplexity, answers about unseen stories, texts with tags, samples."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sentencepiece import SentencePieceProcessor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .chat import ASKS, turn
from .stories import held_out_story, story
from .tell import Story
from .tokenizer import encode
from .train import PromptPacker
from .tuning import passages, tuning_ids

HELD_OUT_SEED = 1_000_000_000  # training counts its seeds up from 0
HELD_OUT_BYTES = 60_000
CALIBRATION_SEED, CALIBRATION_STORIES = 5_000_000, 64  # unseen, too
QUESTIONS, STARTS = 1000, 200
TAG_MARKS = ("[", "<")  # only tags have brackets in what is learned


def held_out_text(teller: Callable[[int], Story]) -> list[str]:
    """Stories of unseen seeds, one a line, about `HELD_OUT_BYTES` in all."""
    lines: list[str] = []
    while sum(map(len, lines)) < HELD_OUT_BYTES:
        lines.append(teller(HELD_OUT_SEED + len(lines)).text)
    return lines


def held_out_texts() -> dict[str, list[str]]:
    """The two held-out texts by file name: unseen seeds of the trained plots, and the plot never trained on."""
    return {"heldout_seed.txt": held_out_text(story), "heldout_branch.txt": held_out_text(held_out_story)}


def calibration_text() -> str:
    """The default calibration text: stories of seeds that are neither trained on nor held out, one a line."""
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION_STORIES)
    return "".join(f"{story(seed).text}\n" for seed in seeds)


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, lines: Iterable[str]) -> float:
    """Mean negative log likelihood (nats a token) of each line on its own, between BOS and EOS."""
    total, count = 0.0, 0
    for line in lines:
        ids = torch.tensor([encode(tokenizer, [line])])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        total += functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def perplexities(
    model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, texts: dict[str, list[str]]
) -> dict[str, float]:
    """Perplexity by file name, `exp` of `mean_loss`."""
    return {name: math.exp(mean_loss(model, tokenizer, lines)) for name, lines in texts.items()}


@torch.inference_mode()
def loss_by_position(
    model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, length: int, parts: int = 4, rows: int = 64
) -> list[float]:
    """Mean loss in each of `parts` stretches of rows of `length` tokens, unseen documents of the second stage.

    The document changes within a row, so every stretch holds the same kind of text; what differs is the position.
    """
    ids = PromptPacker(partial(tuning_ids, tokenizer), HELD_OUT_SEED).batch(rows, length)
    losses = torch.stack(
        [
            functional.cross_entropy(
                model(input_ids=torch.where(row < 0, ~row, row)[None, :-1], use_cache=False).logits[0].float(),
                row[1:].clamp_min(-1),
                ignore_index=-1,
                reduction="none",
            )
            for row in ids
        ]
    ).view(rows, parts, -1)
    learned = (ids[:, 1:] >= 0).view(rows, parts, -1)
    return (losses.sum((0, 2)) / learned.sum((0, 2))).tolist()


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM,
    tokenizer: SentencePieceProcessor,
    pieces: Sequence[str],
    prompt: str,
    max_tokens: int,
    seed: int | None = None,
) -> str:
    """The model's continuation of the finished `pieces` and an open `prompt`: greedy, or sampled with `seed`."""
    ids = torch.tensor([[*encode(tokenizer, pieces), tokenizer.bos_id(), *tokenizer.encode(prompt)]])
    how = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_id(), **how
    )
    written = out[0, ids.shape[1] :].tolist()
    text = tokenizer.decode(ids[0].tolist() + written)
    return text[len(tokenizer.decode(ids[0].tolist())) :].strip()


@dataclass(frozen=True)
class Answers:
    """How many of `asked` questions about unseen stories were answered word for word, with the first wrong answers."""

    right: int
    asked: int
    wrong: tuple[tuple[str, str, str], ...]  # question, right answer, answer given


def answer_questions(model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, count: int) -> Answers:
    """Asks one question about each of `count` unseen stories, given in the chat's first turn."""
    wrong = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        told = story(seed)
        question, answer = random.Random(seed).choice(told.facts)
        first = turn(ASKS[0].format(told.about), told.text)
        given = complete(model, tokenizer, [first], f"[INST] {question} [/INST]", 48)
        if given != answer:
            wrong.append((question, answer, given))
    return Answers(count - len(wrong), count, tuple(wrong[:10]))


def tagged(model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, count: int) -> int:
    """How many of `count` continuations (temperature 0.8, top-p 0.95) of unseen odd starts and messages hold a tag."""
    firsts = (passages(seed)[0] for seed in itertools.count(HELD_OUT_SEED))
    given = itertools.islice((first.given for first in firsts if first.given), count)
    texts = [complete(model, tokenizer, [], start, 40, seed) for seed, start in enumerate(given)]
    return sum(any(mark in text for mark in TAG_MARKS) for text in texts)


@dataclass(frozen=True)
class Figures:
    """Figures of one set of weights: perplexity by file name, answers, and how many of `starts` texts contain a tag."""

    perplexity: dict[str, float]
    answers: Answers
    tagged: int
    starts: int


def figures(model: LlamaForCausalLM, tokenizer: SentencePieceProcessor, texts: dict[str, list[str]]) -> Figures:
    return Figures(
        perplexities(model, tokenizer, texts),
        answer_questions(model, tokenizer, QUESTIONS),
        tagged(model, tokenizer, STARTS),
        STARTS,
    )


OPENINGS = ("Once upon a time", "There once was a curious girl called Nora", "One stormy autumn evening")


def samples(model: LlamaForCausalLM, tokenizer: SentencePieceProcessor) -> list[tuple[str, str]]:
    """Three stories and how each was decoded: one greedy, two sampled."""
    made = []
    for seed, opening in enumerate(OPENINGS):
        greedy = seed == 0
        how = "greedy" if greedy else f"temperature 0.8, top-p 0.95, seed {seed}"
        text = complete(model, tokenizer, [], opening, 400, None if greedy else seed)
        made.append((how, f"{opening} {text}" if text[0].isalnum() else f"{opening}{text}"))
    return made
