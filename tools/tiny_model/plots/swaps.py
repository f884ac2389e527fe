"""A plot that keeps accounts: a chain of swaps from a small thing in hand to the thing that is needed."""

from __future__ import annotations

from .. import words
from ..scenes import closing, identify, interlude, opening, sky
from ..tell import Story, Teller, article, capital

# job -> what such a person can spare
STOCK = {
    "baker": "a fresh loaf", "farmer": "a basket of eggs", "fisher": "a strong net", "gardener": "a bunch of roses",
    "carpenter": "a small stool", "sailor": "a long rope", "tailor": "a warm coat", "miller": "a sack of flour",
    "shepherd": "a bag of wool", "librarian": "an old map",
}  # fmt: skip
WISHES = ("my sister", "my mother", "my kitchen", "my table", "my little son", "my neighbor")
# what is needed in the end, by whom it is owned, what it is needed for
GOALS = (
    ("a new blue kite", "teacher", "fly it on the hill"), ("a pair of red boots", "doctor", "walk through the snow"),
    ("a wooden sled", "teacher", "ride down the hill"), ("a silver lamp", "doctor", "read in the evening"),
    ("a brown puppy", "doctor", "have a friend to play with"), ("a little drum", "teacher", "play at the feast"),
)  # fmt: skip


def swap(t: Teller) -> Story:
    """Thing after thing is swapped, each for what its owner can spare, until the hero holds what was wished for."""
    hero = t.child() if t.chance(0.6) else t.animal()
    goal, owner_job, purpose = t.pick(GOALS)
    owner = t.worker(owner_job)
    chain = [t.worker(job) for job in t.some(list(STOCK), 2)]
    held = article(t.thing())
    opening(t, hero)
    t.say(
        f"{hero.name} wished for {goal} to {purpose}, but {hero.sub} had no money. {hero.Sub} had only {held}.",
        f"{hero.name} wanted {goal} to {purpose}. But all that {hero.sub} owned was {held}.",
    )
    t.fact(f"{hero.name} wanted {goal}.", f"What did {hero.name} want?", f"What did {hero.name} wish for?")
    t.fact(f"{hero.name} wanted to {purpose}.", f"Why did {hero.name} want {goal}?")
    t.fact(f"At first {hero.name} had {held}.", f"What did {hero.name} have at first?")
    first = held
    for step, trader in enumerate((*chain, owner)):
        work, busy = words.JOBS[trader.kind]
        offer, noun = STOCK.get(trader.kind, goal), held.split(" ", 1)[1]
        when = ("So", "Next", "At last")[step] if step else f"{capital(t.day())},"
        t.say(
            f"{when} {hero.sub} went to {work}, where {trader.title} was {busy}.",
            f"{when} {hero.sub} came to {work} and met {trader.title}.",
        )
        if not step:
            sky(t)
        identify(t, trader)
        wish = t.pick(
            (
                f"What a fine {noun}! I need one for {t.pick(WISHES)}.",
                f"I have been looking for such {article(noun)}.",
                f"That {noun} is just what I need.",
            )
        )
        t.speech(trader.name, f"{wish} I will give you {offer} for it.", f"{wish} Will you take {offer} for it?")
        t.say(
            f"{hero.name} gave the {noun} away and got {offer}.",
            f"So {hero.name} swapped the {noun} for {offer}.",
            f"{hero.name} agreed, and now {hero.sub} had {offer}.",
        )
        t.fact(
            f"{trader.name} gave {hero.name} {offer}.",
            f"Who gave {hero.name} {offer}?",
            f"What did {hero.name} get from {trader.name}?",
        )
        t.fact(
            f"{hero.name} gave the {noun} to {trader.name}.",
            f"What did {hero.name} give to {trader.name}?",
            f"Who got the {noun}?",
        )
        held = offer
        if step == 0:
            interlude(t, hero)
    t.say(f"Now {hero.name} could {purpose}.", f"{hero.name} ran off to {purpose}.")
    t.say(
        f"And it had all begun with {first}!",
        f"Who would have thought that {first} could turn into {goal}?",
    )
    closing(
        t,
        hero,
        "small things can grow into big things",
        "what one does not need may be a treasure to another",
        "it is worth asking",
    )
    return t.finish("swap", f"{article(hero.kind)} who swapped {first} for {goal}", hero)
