"""The documents of the second stage: which tokens are given and which are learned, and how rows of them are packed."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from tools.tiny_model.stories import MAX_WORDS, MIN_WORDS
from tools.tiny_model.tokenizer import load_tokenizer
from tools.tiny_model.train import PromptPacker, learned_loss
from tools.tiny_model.tuning import Passage, passages, started, tuning_ids

TINY = Path(__file__).parents[2] / "fastllama" / "assets" / "tiny"
BROKEN = re.compile(r"  |\.\.|[,.?!:][.,?!]|\s[,.?!]")  # what a joint of two texts may not make


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer((TINY / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def tuned() -> list[list[Passage]]:
    return [passages(seed) for seed in range(1500)]


def test_rows_of_the_second_stage_begin_with_a_document():
    packer = PromptPacker(lambda seed: [1, *[seed + 3] * 10, 2])
    assert packer.batch(2, 15).tolist() == [[1, *[3] * 10, 2, 1, 4, 4, 4], [1, *[5] * 10, 2, 1, 6, 6, 6]]
    assert packer.next_seed == 4, "no document is used twice"


def test_no_loss_is_taken_on_what_is_given():
    logits = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    losses = -logits[0].log_softmax(-1)
    found = learned_loss(logits, torch.tensor([[~5, 5, ~0, 0]]))
    assert found.item() == pytest.approx(((losses[1, 5] + losses[3, 0]) / 2).item())


def test_tags_are_read_and_never_learned(tuned, tokenizer):
    tags = {tokenizer.piece_to_id(piece) for piece in ("▁[", "▁[/", "[", "]", "<", ">")}
    chats = 0
    for seed, one in enumerate(tuned):
        ids = tuning_ids(tokenizer, seed)
        assert not tags & set(ids), one
        spoken = [token for token in ids if token >= 0]
        assert spoken.count(1) == spoken.count(2) == len(one), "BOS and EOS of each passage are learned"
        chats += one[0].given.startswith("[INST]")
    assert chats / len(tuned) == pytest.approx(0.5, abs=0.05)


def test_passages_are_encoded_as_prompts_and_answers_are(tuned, tokenizer):
    """The given part has the ids of a prompt of its own, and both together those of the whole text."""
    for seed, (first, *_) in enumerate(tuned[:300]):
        ids = [token if token >= 0 else ~token for token in tuning_ids(tokenizer, seed)]
        given = [tokenizer.bos_id(), *tokenizer.encode(first.given)]
        assert ids[: len(given)] == given
        whole = ids[1 : ids.index(tokenizer.eos_id())]
        assert tokenizer.decode(whole) == first.given + first.learned
        if first.given.startswith("[INST]"):
            assert whole == tokenizer.encode(first.given + first.learned)


def test_an_odd_start_goes_on_as_a_story():
    rng = random.Random(0)
    for _ in range(300):
        passage = started(rng)
        assert passage.given
        assert re.search(r"[.!\"]$", passage.learned), passage
        assert not (found := BROKEN.search(passage.given[-1] + passage.learned)), (passage, found)
        assert len(passage.learned.split()) > 20


def test_answers_are_short_or_whole_stories(tuned):
    answers = {p.learned for one in tuned for p in one if p.given.startswith("[INST]")}
    assert all(re.fullmatch(r" \S.*[.!?\"] ", answer) for answer in answers)
    told = [answer for answer in answers if len(answer.split()) > 30]
    assert all(MIN_WORDS <= len(answer.split()) <= MAX_WORDS for answer in told)
    offers = {answer for answer in answers - set(told) if "stor" in answer}
    assert len(offers) > 50, "worded in many ways"
