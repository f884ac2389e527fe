"""Seeded stories: one seed always gives the same story, in training, in the held-out texts and in the chats."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .plots import HELD_OUT, TRAINED
from .tell import Story, Teller

MIN_WORDS, MAX_WORDS = 80, 250


def tell(rng: random.Random, plots: Sequence[Callable[[Teller], Story]] = TRAINED) -> Story:
    """A story of one of `plots`, 80 to 250 words long; one of another length is discarded and generated again."""
    while True:
        story = plots[int(rng.random() * len(plots))](Teller(rng))
        if MIN_WORDS <= len(story.text.split()) <= MAX_WORDS:
            return story


def story(seed: int) -> Story:
    """The story of `seed`, from the plots that training sees."""
    return tell(random.Random(f"story {seed}"))


def held_out_story(seed: int) -> Story:
    """The story of `seed` from the plot that training never sees."""
    return tell(random.Random(f"held-out {seed}"), (HELD_OUT,))
