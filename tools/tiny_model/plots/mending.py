"""Plots about wrongs put right: a quarrel made up, a broken thing owned up to, a contest given up to help."""

from __future__ import annotations

from .. import words
from ..scenes import closing, identify, opening, sadness, sky
from ..tell import Story, Teller, article, capital

# the thing, what both want to do with it, how they share it in the end
PRIZES = (
    ("swing", "swing first", "one pushed while the other was swinging"),
    ("sled", "sit in front", "they took turns and rode down the hill together"),
    ("little boat", "be the captain", "one was the captain in the morning, the other after lunch"),
    ("big pear", "eat it", "they cut it into two halves"),
    ("wooden horse", "ride it", "they took turns, ten minutes each"),
    ("paint box", "use the red paint", "they painted one big picture together"),
    ("drum", "play it", "one played the drum while the other sang"),
    ("telescope", "look at the moon", "they looked one after the other"),
)  # fmt: skip
APOLOGIES = (
    ("a small bunch of flowers", "held out a small bunch of flowers"),
    ("a drawing of the two of them", "held out a drawing of the two of them"),
    ("half of a cookie", "held out half of a cookie"),
    ("a letter with one word in it", "gave over a letter with one word in it"),
)  # fmt: skip


def quarrel(t: Teller) -> Story:
    """Two friends quarrel over one thing, are lonely, hear a word of advice, make up and share."""
    hero, friend = (t.child(), t.child()) if t.chance(0.5) else (t.animal(), t.animal())
    elder, (_, at) = t.elder(hero), t.place()
    prize, wish, share = t.pick(PRIZES)
    token, offered = t.pick(APOLOGIES)
    opening(t, hero)
    t.say(
        f"{hero.Pos} best friend was {friend.title}. They did everything together.",
        f"{hero.Sub} and {friend.title} were best friends and met every day.",
    )
    t.fact(
        f"{friend.name} was {hero.name}'s best friend.",
        f"Who was {hero.name}'s best friend?",
        f"Who was {friend.name}?",
    )
    t.say(
        f"{capital(t.day())}, {at}, they found a {prize}.", f"{capital(t.day())}, the two friends found a {prize} {at}."
    )
    sky(t)
    t.fact(f"They found a {prize} {at}.", "What did the friends find?", f"Where did they find the {prize}?")
    t.speech(hero.name, f"I want to {wish}!", f"I saw it first, so I will {wish}!")
    t.reply(friend.name, f"No, I want to {wish}!", "That is not fair!", "You always get everything!")
    t.fact(f"Both wanted to {wish}.", "Why did they quarrel?", f"What did {hero.name} and {friend.name} both want?")
    t.say(
        f"They pulled and pushed until {friend.name} fell down and began to cry.",
        f"They shouted so loudly that the birds flew away, and {friend.name} ran home.",
        f"Then {hero.name} said something mean, and {friend.name} walked away without a word.",
    )
    t.say(
        f"Now {hero.name} had the {prize}, but it was no fun alone.",
        f"Now the {prize} belonged to {hero.name}, but {hero.sub} did not enjoy it.",
    )
    sadness(t, hero, f"{friend.name} was not there")
    t.say(
        f"At home {hero.sub} told {elder.name} what had happened.",
        f"In the evening {elder.name} asked what was wrong, and {hero.sub} told everything.",
    )
    advice = t.pick(
        (
            "Say you are sorry, and mean it",
            "A friend is more than a toy",
            "Somebody has to take the first step",
            "Think about what you would like to hear",
        )
    )
    t.speech(elder.name, f"{advice}.")
    t.fact(f"{capital(elder.name)} gave the advice.", f"Who gave {hero.name} advice?", f"Whom did {hero.name} tell?")
    t.say(
        f"The next morning {hero.name} went to {friend.name} and {offered}.",
        f"So {hero.name} {offered} when {friend.name} opened the door the next morning.",
    )
    t.fact(f"{hero.name} brought {token}.", f"What did {hero.name} bring to {friend.name}?", "How did they make up?")
    t.speech(
        hero.name,
        "I am sorry. I was wrong.",
        f"Please forgive me, {friend.name}.",
        "I do not want to fight with you any more.",
        verb="said",
    )
    t.reply(friend.name, "I am sorry, too.", "I missed you so much!", "Let us be friends again.")
    t.say(f"They went back to the {prize}, and this time {share}.", f"From then on they shared the {prize}: {share}.")
    t.fact(f"In the end {share}.", f"How did they share the {prize}?", "What happened in the end?")
    closing(
        t, hero, "sharing is more fun than winning", "a friend is worth more than a toy", "saying sorry takes courage"
    )
    return t.finish("quarrel", f"two friends who quarreled over a {prize}", hero)


MISHAPS = (
    ("was throwing a ball indoors", "the ball flew across the room"),
    ("was dancing on the table", "an elbow hit the shelf"),
    ("was running through the house", "a foot caught on the rug"),
    ("was reaching for the cookies", "the shelf began to shake"), ("was chasing a fly", "the chair fell over"),
    ("was playing knight with a long spoon", "the spoon slipped out of the hand"),
)  # fmt: skip
HIDING = (
    "under the bed",
    "behind the curtain",
    "in the woodshed",
    "at the bottom of a drawer",
    "in an old boot",
    "under the stairs",
)
REPAIRS = (
    ("glued the pieces together", "You can still see the cracks, but I like it even more now"),
    ("earned a new one by selling apples", "The new one is even prettier"),
    ("helped in the house for a whole week", "Now we are even"),
    ("made a new one out of clay", "I will keep it forever"),
)  # fmt: skip


def broken(t: Teller) -> Story:
    """Something dear is broken and hidden; the truth is told in the end, forgiven, and the damage made good."""
    hero = t.child() if t.chance(0.65) else t.animal()
    owner, fragile, color = t.elder(hero), t.pick(words.FRAGILE), t.pick(words.COLORS)
    doing, accident = t.pick(MISHAPS)
    hidden, (repair, comment) = t.pick(HIDING), t.pick(REPAIRS)
    opening(t, hero)
    t.say(
        f"In the house there was {article(f'{color} {fragile}')} that {owner.name} loved very much.",
        f"{capital(owner.name)} had {article(f'{color} {fragile}')} and was very proud of it.",
    )
    t.fact(f"The {fragile} belonged to {owner.name}.", f"Whose {fragile} was it?", f"Who loved the {fragile}?")
    t.say(
        f"{capital(t.day())}, {hero.name} was alone and {doing}. Suddenly {accident}. Crash!",
        f"{capital(t.day())}, when nobody was looking, {hero.name} {doing}, and {accident}.",
    )
    t.say(f"The {fragile} fell down and lay on the floor in pieces.", f"The {fragile} fell to the floor and broke.")
    t.fact(f"{hero.name} {doing}.", f"What was {hero.name} doing?", f"How did the {fragile} break?")
    t.fact(f"The {color} {fragile} was broken.", "What was broken?", f"What did {hero.name} break?")
    sadness(t, hero, f"the {fragile} was broken")
    t.say(f"Quickly {hero.sub} hid the pieces {hidden}.", f"{hero.Sub} picked up the pieces and hid them {hidden}.")
    t.fact(f"{hero.name} hid the pieces {hidden}.", f"Where did {hero.name} hide the pieces?", "Where were the pieces?")
    t.speech(owner.name, f"Where is my {fragile}?", f"Has anybody seen my {fragile}?")
    lied = t.chance(0.5)
    if lied:
        t.reply(hero.name, "Maybe the cat took it.", "I do not know.", "The wind must have blown it away.")
        t.fact(f"No, {hero.name} lied first.", f"Did {hero.name} tell the truth at once?")
    else:
        t.say(f"{hero.name} said nothing and looked at the floor.", f"{hero.name} pretended not to hear.")
        t.fact(f"{hero.name} said nothing at first.", f"Did {hero.name} tell the truth at once?")
    t.say(
        f"That night {hero.sub} could not sleep. The {'lie' if lied else 'secret'} felt like a stone.",
        f"But at supper {hero.sub} could not eat. {hero.Pos} stomach hurt because of the "
        f"{'lie' if lied else 'secret'}.",
    )
    t.say(
        f"At last {hero.name} brought the pieces and told the truth.",
        f"In the end {hero.sub} fetched the pieces and told {owner.name} everything.",
    )
    t.speech(hero.name, f"I broke your {fragile}, and I am sorry.", f"It was me. I broke the {fragile}.", verb="said")
    t.fact(f"{hero.name} told the truth.", f"What did {hero.name} do in the end?", "How did the truth come out?")
    t.reply(
        owner.name,
        "I am sad, but I am glad that you told me.",
        "Telling the truth was brave.",
        "A thing can be mended. Trust is harder to mend.",
    )
    t.say(
        f"To make it good, {hero.name} {repair}.",
        f"{capital(owner.name)} forgave {hero.obj}, and {hero.name} {repair}.",
    )
    t.fact(f"{hero.name} {repair}.", f"How did {hero.name} make it good?")
    t.speech(owner.name, f"{comment}.")
    closing(
        t,
        hero,
        "the truth is lighter than a lie",
        "it is better to tell the truth at once",
        "everybody makes mistakes, but they can be put right",
    )
    return t.finish("broken", f"{article(hero.kind)} who broke {article(f'{color} {fragile}')}", hero)


# contest, its prize, the rival's accident, what the hero does about it
CONTESTS = (
    (
        "a running race",
        "a silver cup",
        "slipped on a stone and hurt a knee",
        "helped {name} up and walked with {obj} to the finish",
    ),
    ("a boat race", "a golden bell", "fell into the cold water", "turned around and pulled {name} out of the water"),
    ("a kite contest", "a blue ribbon", "lost the kite in a tall tree", "climbed the tree and brought the kite back"),
    ("a pie contest", "a golden spoon", "dropped all the apples into the mud", "gave {name} half of the apples"),
    ("a singing contest", "a silver flute", "forgot the words of the song", "stood beside {name} and sang along"),
    ("a sled race", "a striped scarf", "crashed into a fence", "stopped and pulled {name} out of the snow"),
)


def contest(t: Teller) -> Story:
    """A boasting rival comes to grief; the hero stops to help and so loses, and is honoured all the same."""
    hero, rival = (t.child(), t.child()) if t.chance(0.5) else (t.animal(), t.animal())
    event, prize, accident, deed = t.pick(CONTESTS)
    if event == "a sled race":
        t.season = "winter"
        t.weather = t.pick(("snowy", "cold", "icy"))
    elif t.season == "winter":
        t.season = "summer"
        t.weather = t.pick(words.SEASONS["summer"])
    judge, winner, deed = t.worker(), t.worker(), deed.format(name=rival.name, obj=rival.obj)
    event_name = event.split(" ", 1)[1]
    opening(t, hero)
    t.say(
        f"Every year there was {event}, and the prize was {prize}.",
        f"Soon there would be {event}. Whoever won would get {prize}.",
    )
    t.fact(f"The prize was {prize}.", "What was the prize?", "What could one win?")
    days = t.pick(("two weeks", "ten days", "a whole month"))
    t.say(f"{hero.name} practiced for {days}.", f"For {days} {hero.name} got up early to practice.")
    t.fact(f"{hero.name} practiced for {days}.", f"How long did {hero.name} practice?")
    t.say(f"{rival.title} only laughed.", f"But {rival.title} was sure to win.")
    t.speech(rival.name, "Nobody is better than me!", "You will never beat me!", "I do not even have to practice.")
    t.fact(f"{rival.name} was {article(rival.kind)}.", f"Who was {rival.name}?")
    t.say(f"The great day came, {article(t.weather)} {t.season} day.")
    sky(t)
    t.say(
        f"{judge.title} gave the sign, and the {event_name} began.",
        f"At ten o'clock {judge.title} rang a bell, and it began.",
    )
    t.fact(f"{judge.title} gave the sign.", f"Who started the {event_name}?")
    t.say(
        f"At first everything went well for {rival.name}, but then {rival.sub} {accident}.",
        f"{rival.name} was in front when {rival.sub} {accident}.",
    )
    t.fact(f"{rival.name} {accident}.", f"What happened to {rival.name}?")
    t.speech(rival.name, "Help!", "Can anybody help me?", "Please, somebody help me!")
    t.say(
        f"{hero.name} could have won now. But {hero.sub} {deed}.",
        f"{hero.name} thought of {prize}, but only for a moment. Then {hero.sub} {deed}.",
    )
    t.fact(
        f"{hero.name} {deed}.", f"What did {hero.name} do for {rival.name}?", f"How did {hero.name} help {rival.name}?"
    )
    t.say(f"So {winner.title} won {prize}.", f"In the meantime {winner.title} won the {event_name}.")
    t.fact(f"{winner.title} won.", f"Who won the {event_name}?", f"Who got {prize}?", f"Did {hero.name} win?")
    t.speech(
        rival.name, "Why did you help me?", "I was mean to you, and you helped me.", "I am sorry that I laughed at you."
    )
    t.reply(hero.name, "Because you needed help.", "Winning is not everything.", "You would do the same for me.")
    t.say(
        f"Everybody clapped, and {judge.name} said that {hero.name} was the real winner.",
        f"Then {winner.name} came and said that {hero.name} should hold the prize, too.",
        f"{rival.name} and {hero.name} became friends that day.",
    )
    if t.sentences[-1].startswith(rival.name):
        t.fact(f"{rival.name} and {hero.name} became friends.", f"What became of {rival.name} and {hero.name}?")
    identify(t, judge)
    closing(
        t,
        hero,
        "helping is better than winning",
        "a prize gets old, but a friend stays",
        "those who help are never last",
    )
    return t.finish("contest", f"{article(hero.kind)} in {event}", hero)
