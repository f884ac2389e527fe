"""The plots: each a function from a teller to a finished story, whose ending follows from what happened in it."""

from __future__ import annotations

from . import mending, quests, rescues, swaps, trail

TRAINED = (
    rescues.lost, rescues.stuck, rescues.fear,
    quests.gift, quests.delivery, quests.harvest,
    mending.quarrel, mending.broken, mending.contest,
    swaps.swap,
)  # fmt: skip
HELD_OUT = trail.trail
