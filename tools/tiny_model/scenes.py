"""Scenes that many plots share: how a story opens, how a helper is met, how a favour is earned, how a story closes."""

from __future__ import annotations

from . import words
from .tell import Character, Teller, article, capital


def opening(t: Teller, hero: Character) -> None:
    """Who `hero` is and where the home stands; notes facts about both."""
    home = words.ANIMAL_HOMES[hero.kind] if hero.is_animal else t.pick(words.HOUSES)
    spot, likes = t.pick(words.HOME_SPOTS), t.pick(words.LIKES)
    kind = f"{hero.trait} {t.pick(('little', 'young'))} {hero.kind}" if hero.is_animal else f"{hero.trait} {hero.kind}"
    called = t.pick(("named", "called"))
    t.say(
        f"Once upon a time there was {article(kind)} {called} {hero.name}. {hero.Sub} lived in {home} {spot}.",
        f"{hero.name} was {article(kind)} who lived in {home} {spot}.",
        f"In {home} {spot} lived {article(kind)} {called} {hero.name}.",
        f"There once was {article(kind)} {called} {hero.name}, and {hero.sub} lived in {home} {spot}.",
        f"{capital(spot)}, in {home}, lived {hero.name}, {article(kind)}.",
    )
    t.fact(f"{hero.name} lived in {home} {spot}.", f"Where did {hero.name} live?", f"Where was {hero.name}'s home?")
    t.fact(f"{hero.name} was {article(kind)}.", f"Who was {hero.name}?", f"What do we know about {hero.name}?")
    if hero.is_child and t.chance(0.4):
        age = t.pick(words.AGES)
        t.say(f"{hero.Sub} was {age} years old.", f"{hero.Sub} had just turned {age}.")
        t.fact(f"{hero.name} was {age} years old.", f"How old was {hero.name}?")
    if t.chance(0.6):
        t.say(
            f"{hero.Sub} loved to {likes}.",
            f"More than anything, {hero.sub} liked to {likes}.",
            f"Every evening {hero.sub} liked to {likes}.",
        )
        t.fact(f"{hero.name} liked to {likes}.", f"What did {hero.name} like to do?")


def sky(t: Teller) -> None:
    """What the weather of the day looks like, sometimes."""
    t.maybe(0.5, words.SIGNS[t.weather])


def presented(t: Teller, who: Character) -> str:
    """`who` at first sight, for the end of a sentence: "Mia, a kind girl", "an otter named Pip", "Rosa the baker"."""
    if who.kind in words.JOBS:
        return t.pick((f"{who.name} the {who.kind}", f"{who.name}, the {who.trait} {who.kind}"))
    return t.pick(
        (
            f"{article(who.kind)} {t.pick(('named', 'called'))} {who.name}",
            f"{who.name}, {article(f'{who.trait} {who.kind}')}",
        )
    )


def identify(t: Teller, who: Character) -> None:
    """Notes who `who` was."""
    one = f"the {who.kind}" if who.kind in words.JOBS else article(who.kind)
    t.fact(f"{who.name} was {one}.", f"Who was {who.name}?")


def sadness(t: Teller, hero: Character, reason: str) -> None:
    """`hero` feels bad because of `reason`, a clause ("the ball was gone")."""
    feeling, sign = t.pick(
        (
            ("sad", f"tears ran down {hero.pos} cheeks"),
            ("worried", f"{hero.pos} heart beat fast"),
            ("upset", f"{hero.sub} sat down on the ground"),
            ("unhappy", f"{hero.sub} could not even smile"),
            ("miserable", f"{hero.pos} eyes filled with tears"),
        )
    )
    t.say(
        f"{hero.name} was so {feeling} that {sign}.",
        f"{hero.name} felt {feeling}, and {sign}.",
        f"Because {reason}, {hero.name} was very {feeling}.",
    )
    t.fact(
        f"{hero.name} was {feeling} because {reason}.",
        f"Why was {hero.name} {feeling}?",
        f"How did {hero.name} feel, and why?",
    )


def trade(t: Teller, hero: Character, helper: Character, goods: str) -> None:
    """`hero` asks `helper` for `goods` ("a rope") and earns it by a small job; ends with `hero` holding it."""
    chore, done = t.pick(words.CHORES)
    t.speech(hero.name, f"Please, may I have {goods}?", f"Could you give me {goods}?", f"Do you have {goods} for me?")
    if t.chance(0.7):
        t.reply(
            helper.name,
            f"Yes, if you {chore} first.",
            f"Gladly, but first you must {chore}.",
            f"If you {chore} for me, you may have {goods}.",
        )
        t.say(
            f"So {hero.name} {done}, and {helper.name} gave {hero.obj} {goods}.",
            f"{hero.name} {done} as fast as {hero.sub} could. Then {helper.name} handed {hero.obj} {goods}.",
            f"{hero.name} did not complain. {hero.Sub} {done}, and soon {hero.sub} had {goods}.",
        )
        t.fact(
            f"{hero.name} {done} for {helper.name}.",
            f"What did {hero.name} do for {helper.name}?",
            f"How did {hero.name} earn {goods}?",
        )
    else:
        t.reply(helper.name, "Of course you may!", "Take it, and good luck.", "For you, always!")
        t.say(
            f"{helper.name} gave {hero.obj} {goods} with a smile.",
            f"And {helper.name} put {goods} into {hero.pos} hands.",
        )
    t.fact(
        f"{helper.name} gave {hero.name} {goods}.",
        f"Who gave {hero.name} {goods}?",
        f"Where did {hero.name} get {goods}?",
    )


def thanks(t: Teller, hero: Character, helper: Character) -> None:
    """`hero` thanks `helper`, in words or with something to eat."""
    if t.chance(0.5):
        t.speech(
            hero.name,
            f"Thank you, {helper.name}!",
            f"You are a true friend, {helper.name}.",
            f"I will never forget this, {helper.name}.",
        )
    else:
        treat = t.pick(words.TREATS)
        t.say(
            f"To say thank you, {hero.name} shared {treat} with {helper.name}.",
            f"{hero.name} thanked {helper.name} and gave {helper.obj} {treat}.",
        )
        t.fact(f"{hero.name} thanked {helper.name} with {treat}.", f"How did {hero.name} thank {helper.name}?")


def closing(t: Teller, hero: Character, *lessons: str) -> None:
    """The last words: what `hero` learned (one of `lessons`, whole clauses) or how the day ended."""
    lesson = t.pick(lessons)
    draw = t.rng.random()
    if draw < 0.5:
        t.say(
            f"From that day on, {hero.name} knew that {lesson}.",
            f"And so {hero.name} learned that {lesson}.",
            f"{hero.name} never forgot that {lesson}.",
        )
        t.fact(
            f"{hero.name} learned that {lesson}.", f"What did {hero.name} learn?", "What is the lesson of the story?"
        )
    elif draw < 0.8:
        t.say(
            f"That night {hero.name} fell asleep with a smile.",
            f"{hero.name} went home tired but very happy.",
            f"When the stars came out, {hero.name} was still smiling.",
            f"It had been a long day, and {hero.name} slept well.",
        )
        t.fact(f"At the end, {hero.name} was happy.", f"How did {hero.name} feel at the end?", "Is it a happy ending?")
    else:
        t.say(
            "And everyone was happy.",
            "It was the best day of the whole year.",
            "They talked about that day for a long time.",
        )


def interlude(t: Teller, hero: Character) -> None:
    """Sometimes, a small scene off the path of the plot: a passer-by at work, a snack that is counted, a rest."""
    draw = t.rng.random()
    if draw < 0.2:
        passer = t.worker()
        _, busy = words.JOBS[passer.kind]
        t.say(
            f"On the way {hero.name} saw {passer.title}, who was {busy}.",
            f"{passer.title} was {busy} and waved to {hero.name}.",
        )
        t.fact(f"{passer.name} was {busy}.", f"What was {passer.name} doing?")
        identify(t, passer)
    elif draw < 0.4:
        numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight")
        snack = t.pick(("apples", "cookies", "plums", "nuts", "cherries"))
        had = 3 + int(t.rng.random() * 5)
        eaten = 1 + int(t.rng.random() * (had - 2))
        count, ate, left = numbers[had - 1], numbers[eaten - 1], numbers[had - eaten - 1]
        remain = "was" if left == "one" else "were"
        t.say(
            f"{hero.name} had {count} {snack} in a bag and ate {ate} of them, so {left} {remain} left.",
            f"{hero.name} had brought {count} {snack}. {hero.Sub} ate {ate}, and then there {remain} {left}.",
        )
        t.fact(f"{hero.name} had {count} {snack}.", f"How many {snack} did {hero.name} have at first?")
        t.fact(f"There {remain} {left} left.", f"How many {snack} were left?")
    elif draw < 0.5:
        animal = t.pick(
            ("a heron", "two swans", "a red butterfly", "a green lizard", "a family of geese", "a sleepy cow")
        )
        t.say(f"{hero.name} stopped for a moment to watch {animal}.", f"Far away {hero.name} could see {animal}.")
        t.fact(f"{hero.name} saw {animal}.", f"Which animal did {hero.name} see?")
