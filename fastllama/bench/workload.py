"""The prompts of the runtime's benchmark."""

from __future__ import annotations

import random

SHORTEST, LONGEST = 8, 400  # tokens of a prompt
SEQUENCES = 256  # maximum batch size

Prompts = list[list[int]]


def prompts_of(count: int, vocab_size: int, longest: int, generator: random.Random) -> Prompts:
    """Random token ids, of log-uniform lengths from SHORTEST to `longest`."""
    lengths = [round(SHORTEST * (longest / SHORTEST) ** generator.random()) for _ in range(count)]
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
