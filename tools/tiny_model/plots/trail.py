"""The plot that training never sees: food vanishes, and a trail leads to the hungry one who took it."""

from __future__ import annotations

from .. import words
from ..scenes import closing, identify, opening, presented, sadness, sky
from ..tell import Story, Teller, article, capital

TRAILS = (
    "a line of crumbs",
    "small wet prints",
    "a row of gray feathers",
    "drops of honey",
    "prints in the snow",
    "bits of wool on the thorns",
)


def trail(t: Teller) -> Story:
    """A theft, a wrong suspect, a trail, a culprit with a reason, and an arrangement that suits both."""
    hero, friend, thief, (place, at) = t.child(), t.child(), t.animal(), t.place()
    treat, spot, mark = t.pick(words.TREATS), t.pick(words.SPOTS), t.pick(TRAILS)
    if mark == "prints in the snow":
        t.season, t.weather = "winter", "snowy"
    chore, done = t.pick(words.CHORES)
    opening(t, hero)
    t.say(
        f"Every evening {hero.sub} put {treat} on the window for breakfast.",
        f"Before going to bed, {hero.sub} always put {treat} beside the door.",
    )
    t.say(f"But {t.day()}, the food was gone.", f"{capital(t.day())}, somebody had taken it.")
    t.say("The next day it happened again.", "And the day after that, the food was gone again.")
    sadness(t, hero, "somebody was taking the food")
    t.say(f"First {hero.sub} thought of {friend.title}.", f"{hero.Sub} asked {presented(t, friend)}.")
    t.speech(hero.name, "Did you take my breakfast?", "Do you know who is taking my food?", verb="asked")
    t.speech(
        friend.name, "No, but I will help you to find out.", "It was not me! Let us look for the truth.", verb="said"
    )
    identify(t, friend)
    sky(t)
    t.say(
        f"Behind the house they found {mark}, and they followed it to {place}.",
        f"Together they looked around, and there was {mark}. It led them to {place}.",
    )
    t.say(
        f"There, {spot}, sat {article(thief.kind)} with three hungry babies.",
        f"{capital(spot)}, {at}, lay {article(thief.kind)} with four little ones.",
    )
    t.speech(
        f"the {thief.kind}",
        f"Forgive me. I am {thief.name}, and my babies had nothing to eat.",
        f"I am sorry. My name is {thief.name}, and my children were hungry.",
        verb="whispered",
    )
    t.say(f"{hero.name} was not angry any more.", f"Then {hero.name} felt sorry for the little family.")
    t.speech(
        hero.name,
        f"You do not have to steal. If you {chore}, you will get something every day.",
        f"Come to us, {chore}, and you will always have enough.",
        verb="said",
    )
    t.say(
        f"So {thief.name} {done} every morning, and nobody was hungry.",
        f"From then on, {thief.name} came every day, {done} and got {treat}.",
    )
    closing(
        t,
        hero,
        "it is wise to ask before being angry",
        "a full plate is made to be shared",
        "there is a reason behind most things",
    )
    return t.finish("trail", f"{article(hero.kind)} who followed {mark}", hero)
