"""Plots about trouble that somebody helps out of: a thing lost and found, an animal stuck, a fear overcome."""

from __future__ import annotations

from .. import words
from ..scenes import closing, identify, interlude, opening, presented, sadness, sky, thanks
from ..tell import Story, Teller, article, capital


def lost(t: Teller) -> Story:
    """A treasured thing is lost, looked for in the wrong spots, and found where the helper's clue leads."""
    hero, helper, thing = t.hero(), t.friend(), t.thing()
    noun = thing.split()[-1]
    giver = t.elder(hero)
    (place, at), (spot, *wrong) = t.place(), t.some(words.SPOTS, 3)
    opening(t, hero)
    t.say(
        f"{hero.Pos} dearest treasure was {article(thing)} that {giver.name} had given {hero.obj}.",
        f"{capital(giver.name)} had given {hero.obj} {article(thing)}, and {hero.sub} carried it everywhere.",
        f"{hero.Sub} owned {article(thing)}, a present from {giver.name}.",
    )
    t.fact(
        f"The {noun} was a present from {giver.name}.",
        f"Who gave {hero.name} the {noun}?",
        f"Where did the {noun} come from?",
    )
    day = t.day()
    t.say(
        f"{capital(day)}, {hero.name} was playing {at} when {hero.sub} saw that the {noun} was gone.",
        f"{capital(day)}, {hero.name} walked home from {place} and noticed that the {noun} was gone.",
        f"But {day}, somewhere {at}, {hero.name} lost it.",
    )
    sky(t)
    t.fact(
        f"{hero.name} lost the {thing} {at}.", f"What did {hero.name} lose?", f"Where did {hero.name} lose the {noun}?"
    )
    sadness(t, hero, f"the {noun} was gone")
    interlude(t, hero)
    for where, found in zip(wrong[: 1 + t.chance(0.6)], t.some(words.NOTHINGS, 2), strict=False):
        t.say(
            f"{hero.Sub} looked {where}, but there was only {found}.",
            f"{hero.Sub} searched {where} and found {found}, but no {noun}.",
            f"Was it {where}? No, there was nothing but {found}.",
        )
        t.fact(f"{hero.name} found only {found} there.", f"What did {hero.name} find {where}?")
    t.say(
        f"Just then {hero.sub} met {presented(t, helper)}.",
        f"Then {helper.title} came by.",
        f"On the way {hero.sub} met {presented(t, helper)}.",
    )
    identify(t, helper)
    t.speech(helper.name, "What is the matter?", f"Why do you look so sad, {hero.name}?", "What are you looking for?")
    t.reply(hero.name, f"I have lost my {thing}.", f"My {thing} is gone!", f"I cannot find my {noun} anywhere.")
    reason, clue = t.pick(
        (
            (f"a magpie had carried the {noun} away", "I saw a magpie with something in its beak"),
            (f"a puppy had run off with the {noun}", "I saw a puppy run past with something in its mouth"),
            (f"the {noun} had fallen out of a pocket", "I heard something fall when you walked by"),
            (f"a gust of wind had blown the {noun} away", "I saw the wind blow something along the path"),
        )
    )
    t.speech(helper.name, f"{clue}. Let us look {spot}.", f"{clue}. It may be {spot}.", f"{clue}. Follow me!")
    t.say(
        f"They went there together, and {spot} lay the {thing}!",
        f"Together they looked {spot}, and there was the {noun}.",
        f"{helper.name} led the way, and {spot} they found the {thing}.",
    )
    t.fact(f"They found the {noun} {spot}.", f"Where was the {noun}?", f"Where did they find the {noun}?")
    t.fact(f"{helper.name} helped {hero.name} find the {noun}.", f"Who found the {noun}?", f"Who helped {hero.name}?")
    t.say(f"It turned out that {reason}.", f"Now they understood that {reason}.")
    t.fact(f"{capital(reason)}.", f"How did the {noun} get lost?", "What had happened?")
    thanks(t, hero, helper)
    keep = t.pick(("in a deep pocket", "on a string around the neck", "in a box beside the bed"))
    if t.chance(0.4):
        t.say(f"From then on, {hero.name} kept the {noun} {keep}.")
        t.fact(f"{hero.name} kept the {noun} {keep}.", f"Where did {hero.name} keep the {noun} after that?")
    else:
        closing(
            t,
            hero,
            "four eyes see more than two",
            "it is wise to ask for help",
            "a friend is worth more than any treasure",
        )
    return t.finish("lost", f"{article(hero.kind)} who lost {article(thing)}", hero)


# where the animal is stuck, the tool that helps, who has it, why bare hands fail, how the rescue goes
TRAPS = (
    ("at the top of a tall tree", "a ladder", "carpenter", "the lowest branch was too high", "climbed up step by step"),
    ("at the bottom of a dry well", "a long rope", "sailor", "the well was too deep", "let a basket down on the rope"),
    (
        "in the middle of a muddy ditch",
        "a strong board",
        "carpenter",
        "the mud was too soft to walk on",
        "laid the board across the mud",
    ),
    (
        "on a rock in the river",
        "a small boat",
        "fisher",
        "the water was too fast to swim in",
        "rowed slowly to the rock",
    ),
    ("on the roof of the mill", "a tall ladder", "miller", "the wall was too smooth", "climbed up very carefully"),
    (
        "in a tangle of thorns",
        "a pair of scissors",
        "tailor",
        "the thorns were too sharp",
        "cut the branches one by one",
    ),
    ("in a deep hole", "a shovel", "gardener", "the hole was too narrow", "dug a path down into the hole"),
    ("behind a locked gate", "a heavy key", "farmer", "the bars were too close together", "turned the key in the lock"),
)


def stuck(t: Teller) -> Story:
    """A small animal is stuck; bare hands fail for a reason, the right tool from the right person works."""
    spot, tool, job, why, how = t.pick(TRAPS)
    hero = t.child() if t.chance(0.5) else t.animal()
    helper, small, (_, at) = t.worker(job), t.pick(words.SMALL_ANIMALS), t.place()
    opening(t, hero)
    t.say(
        f"{capital(t.day())}, {hero.sub} was walking {at} when {hero.sub} heard a thin cry.",
        f"{capital(t.day())}, while {hero.sub} was resting {at}, {hero.sub} heard somebody cry.",
    )
    sky(t)
    t.say(
        f"It was {article(small)}, stuck {spot}.",
        f"{capital(article(small))} was stuck {spot}!",
        f"There, {spot}, sat {article(small)}.",
    )
    t.fact(f"The {small} was stuck {spot}.", f"Where was the {small}?", "Who needed help?")
    t.speech(f"the {small}", "Help me, please!", "I cannot get out!", "I want to go home!")
    t.reply(hero.name, "Do not be afraid. I will help you.", "Wait, I am coming!", "Hold on! I will get you out.")
    t.say(
        f"{hero.name} tried at once, but {why}.",
        f"First {hero.name} tried with bare hands, but {why}."
        if hero.is_child
        else f"First {hero.name} tried alone, but {why}.",
        f"{hero.Sub} tried three times, but {why}.",
    )
    t.fact(f"It was hard because {why}.", f"Why could {hero.name} not help at first?", "Why was it hard?")
    work, busy = words.JOBS[job]
    t.say(
        f"So {hero.sub} ran to {work}, where {helper.title} was {busy}.",
        f"Then {hero.sub} remembered {helper.title} and ran to {work}.",
        f"At {work} {hero.sub} found {presented(t, helper)}.",
    )
    identify(t, helper)
    t.speech(
        hero.name,
        f"{capital(article(small))} is stuck {spot}! Do you have {tool}?",
        f"Please lend me {tool}. {capital(article(small))} is stuck {spot}!",
    )
    t.reply(
        helper.name, f"Here is {tool}. I will come with you.", f"Take {tool}, and hurry!", "Of course. Let us hurry!"
    )
    t.fact(f"{helper.name} was at {work}.", f"Where did {hero.name} find {helper.name}?")
    t.say(f"They hurried back with {tool}.", f"Soon they were back with {tool}.")
    t.fact(
        f"{helper.name} brought {tool}.",
        f"What did {helper.name} bring?",
        f"Who had {tool}?",
        f"How did {helper.name} help?",
    )
    t.say(
        f"{hero.name} {how}, and a moment later the {small} was free.",
        f"While {helper.name} held on tight, {hero.name} {how}. At last the {small} was safe.",
    )
    t.fact(f"{hero.name} {how}.", f"How did {hero.name} save the {small}?", f"What did {hero.name} do with {tool}?")
    if t.chance(0.6):
        t.say(
            f"The {small} ran straight to its mother.",
            f"The mother of the {small} came running and thanked them both.",
            f"The {small} licked {hero.pos} nose."
            if small in ("kitten", "puppy", "lamb")
            else f"The {small} danced for joy.",
        )
    thanks(t, hero, helper)
    closing(
        t, hero, "the right tool makes hard work easy", "nobody is too small to be helped", "two can do what one cannot"
    )
    return t.finish("stuck", f"{article(hero.kind)} who saved {article(small)}", hero)


# the fear, what must be done in spite of it, what the frightening thing turns out to be
FEARS = (
    ("the dark", "go down into the dark cellar", "the scary shape was only an old coat on a hook"),
    ("the dark", "walk through the forest at night", "the two yellow eyes belonged to a friendly owl"),
    ("thunder", "run across the field in a storm", "thunder is only a loud noise far away"),
    ("deep water", "cross the river in a little boat", "the water carried the boat as gently as a hand"),
    ("high places", "climb the tall tower", "the view from the top was beautiful"),
    ("big dogs", "walk past the big dog at the gate", "the dog only wanted to play"),
    ("speaking to strangers", "ask a stranger for help", "the stranger had a kind face and a warm voice"),
)
TRICKS = (
    ("count slowly to ten", "counted slowly to ten"), ("sing a little song", "sang a little song"),
    ("take three deep breaths", "took three deep breaths"), ("think of something funny", "thought of something funny"),
    ("take one small step at a time", "took one small step at a time"),
)  # fmt: skip


def fear(t: Teller) -> Story:
    """A hero is afraid, is taught a trick, must do the very thing for somebody, and finds out the truth."""
    hero, friend = (t.child() if t.chance(0.6) else t.animal()), t.friend()
    relation = t.pick(tuple(words.SIBLINGS))
    fright, deed, truth = t.pick(FEARS)
    trick, used = t.pick(TRICKS)
    opening(t, hero)
    t.say(
        f"There was only one problem: {hero.name} was afraid of {fright}.",
        f"But {hero.sub} had a secret. {hero.Sub} was afraid of {fright}.",
        f"{hero.Sub} was not afraid of many things, but {hero.sub} was afraid of {fright}.",
    )
    t.fact(
        f"{hero.name} was afraid of {fright}.", f"What was {hero.name} afraid of?", f"What was {hero.name}'s problem?"
    )
    t.say(
        f"{hero.Sub} told only one friend, {friend.title}.",
        f"One day {hero.sub} talked about it with {presented(t, friend)}.",
        f"{hero.Pos} best friend was {friend.title}, and one day {hero.sub} told {friend.obj} everything.",
    )
    t.speech(
        friend.name,
        f"When I am afraid, I {trick}.",
        f"It is not bad to be afraid. Just {trick}.",
        f"Next time, {trick}. It works for me!",
    )
    t.fact(
        f"{friend.name} told {hero.name} to {trick}.",
        f"What did {friend.name} say?",
        f"What was {friend.name}'s advice?",
    )
    trouble = t.pick(
        (
            "was ill and needed a doctor",
            "had not come home",
            "had hurt a foot and could not walk",
            "was crying and nobody else was near",
        )
    )
    if fright == "thunder":
        t.season, t.weather = "autumn", "stormy"
    t.say(
        f"Then, {t.day('evening')}, something happened. {hero.Pos} little {relation} {trouble}.",
        f"Then came the day when {hero.pos} little {relation} {trouble}.",
    )
    sky(t)
    t.say(f"To help, {hero.name} had to {deed}.", f"Somebody had to {deed}, and there was only {hero.name}.")
    t.fact(f"{hero.name} had to {deed}.", f"What did {hero.name} have to do?")
    t.fact(f"{hero.Pos} little {relation} {trouble}.", "Who needed help?", f"Why did {hero.name} have to be brave?")
    t.say(
        f"{hero.Pos} knees were shaking.",
        f"{hero.Pos} heart was beating like a drum.",
        f"For a moment {hero.sub} wanted to run away.",
    )
    t.say(
        f"Then {hero.sub} remembered what {friend.name} had said and {used}.",
        f"But {hero.sub} thought of {friend.name}, {used} and went on.",
    )
    t.fact(
        f"{hero.name} {used}.",
        f"What did {hero.name} do when {hero.sub} was afraid?",
        f"How did {hero.name} become brave?",
    )
    t.say(
        f"And do you know what? {capital(truth)}.",
        f"Soon {hero.sub} found out that {truth}.",
        f"Then {hero.sub} had to laugh, because {truth}.",
    )
    t.fact(f"{hero.name} found out that {truth}.", f"What did {hero.name} find out?", "What was the truth?")
    t.say(
        f"A little later {hero.pos} {relation} was safe.",
        f"{hero.name} came in time, and soon {hero.pos} {relation} was well again.",
        f"{hero.Pos} {relation} hugged {hero.obj} for a long time.",
    )
    t.speech(f"{hero.pos} {relation}", "You are so brave!", "I knew you would come.", "Were you not afraid?")
    t.reply(hero.name, "I was afraid, but I did it anyway.", f"{friend.name} taught me how.", "Only a little.")
    closing(
        t,
        hero,
        "being brave means going on while you are afraid",
        "most fears grow small when you look at them",
        "a good friend makes you brave",
    )
    return t.finish("fear", f"{article(hero.kind)} who was afraid of {fright}", hero)
