"""Plots about a goal reached by steps: a gift made, an errand run past an obstacle, a seed grown to a harvest."""

from __future__ import annotations

from .. import words
from ..scenes import closing, identify, interlude, opening, presented, sky, thanks, trade
from ..tell import Story, Teller, article, capital, listed

# gift, what it is made of: (material, who has it), how it is made
GIFTS = (
    (
        "honey cake",
        (("a bag of flour", "miller"), ("a jar of honey", "farmer"), ("six eggs", "farmer")),
        "mixed everything in a bowl and baked it until it was golden",
    ),
    (
        "warm scarf",
        (("a ball of wool", "shepherd"), ("a pair of needles", "tailor"), ("some blue thread", "tailor")),
        "knitted all evening by the fire",
    ),
    (
        "toy boat",
        (("a piece of wood", "carpenter"), ("a bit of white cloth", "tailor"), ("some strong string", "sailor")),
        "cut, glued and tied until it could float",
    ),
    (
        "pot of soup",
        (("three carrots", "gardener"), ("a fat fish", "fisher"), ("a loaf of bread", "baker")),
        "washed and cut everything and cooked it slowly",
    ),
    (
        "bird house",
        (("a short board", "carpenter"), ("a box of nails", "carpenter"), ("a pot of green paint", "sailor")),
        "sawed and hammered until it stood straight",
    ),
    (
        "picture book",
        (("some thick paper", "teacher"), ("a pot of glue", "librarian"), ("a leather string", "tailor")),
        "drew a new picture on every page and glued them together",
    ),
)
OCCASIONS = ("birthday", "name day")


def gift(t: Teller) -> Story:
    """A present is made from what two helpers give, and given."""
    hero = t.child() if t.chance(0.6) else t.animal()
    friend = t.elder(hero) if t.chance(0.5) else t.friend()
    gift, materials, making = t.pick(GIFTS)
    occasion = t.pick(OCCASIONS)
    opening(t, hero)
    t.say(
        f"It was almost the {occasion} of {friend.title}, and {hero.name} wanted to make {article(gift)}.",
        f"Soon it would be the {occasion} of {friend.title}. {hero.name} decided to make {article(gift)} for "
        f"{friend.obj}.",
    )
    t.fact(f"{hero.name} wanted to make {article(gift)}.", f"What did {hero.name} want to make?")
    t.fact(f"It was for {friend.name}.", f"Who was the {gift} for?")
    needs = t.some(materials, 2)
    t.say(
        f"{hero.Sub} needed {listed([goods for goods, _ in needs])}, but there was nothing at home.",
        f"But for that {hero.sub} needed {listed([goods for goods, _ in needs])}.",
    )
    t.fact(f"{hero.name} needed {listed([goods for goods, _ in needs])}.", f"What did {hero.name} need?")
    helpers = {job: t.worker(job) for job in dict.fromkeys(job for _, job in needs)}
    for step, (goods, job) in enumerate(needs):
        helper = helpers[job]
        work, busy = words.JOBS[job]
        if step and len(helpers) == 1:
            t.say(
                f"{helper.name} had {goods}, too, and gave it all without a word.",
                f"And because {helper.name} was generous, {hero.sub} got {goods} as well.",
            )
            t.fact(f"{helper.name} gave {hero.name} {goods}.", f"Who gave {hero.name} {goods}?")
            continue
        when = "Then" if step else f"{capital(t.day())},"
        if t.chance(0.5):
            t.say(f"{when} {hero.sub} walked to {work}, where {helper.title} was {busy}.")
            t.fact(f"{helper.name} was {busy}.", f"What was {helper.name} doing?")
        else:
            t.say(
                f"{when} {hero.sub} went to see {helper.title} at {work}.",
                f"{when} {hero.sub} ran to {work} and knocked at the door of {helper.title}.",
            )
            t.fact(f"{hero.name} met {helper.name} at {work}.", f"Where did {hero.name} meet {helper.name}?")
        if not step:
            sky(t)
        identify(t, helper)
        trade(t, hero, helper, goods)
    interlude(t, hero)
    t.say(f"At home {hero.name} {making}.", f"Then {hero.name} set to work. {hero.Sub} {making}.")
    t.fact(f"{hero.name} {making}.", f"How did {hero.name} make the {gift}?")
    t.say(
        f"When the great day came, {friend.name} opened the box and could not believe {friend.pos} eyes.",
        f"On the {occasion}, {hero.name} put the {gift} on the table with a red ribbon.",
    )
    t.speech(
        friend.name,
        "Did you make this all by yourself?",
        f"What a beautiful {gift}!",
        "This is the best present of all!",
    )
    t.reply(
        hero.name,
        f"Not alone. {capital(listed([helper.name for helper in helpers.values()]))} helped me.",
        "I made it just for you.",
    )
    closing(
        t,
        hero,
        "a present made by hand is the best present",
        "work is easy when it is done with love",
        "it is lovely to give",
    )
    return t.finish("gift", f"{article(hero.kind)} who made {article(gift)}", hero)


# what is carried, the word for it, why it is needed
ERRANDS = (
    ("a bottle of medicine", "bottle", "was ill in bed"), ("a basket of bread", "bread", "had nothing left to eat"),
    ("a letter", "letter", "was waiting for news"), ("a warm blanket", "blanket", "was freezing"),
    ("a lamp", "lamp", "had no light in the house"), ("a sack of apples", "apples", "wanted to bake a pie"),
)  # fmt: skip
# what blocks the way, what small kindness meets which animal, how that animal pays it back
BARRIERS = (
    ("the bridge was broken", "otter", "pulled a boat across the river", "pushed a floating log to the bank"),
    (
        "the path was lost in the fog",
        "owl",
        "flew ahead and called from tree to tree",
        "showed the way with loud calls",
    ),
    ("a fallen tree lay across the road", "badger", "dug a tunnel under the tree", "opened a way under the trunk"),
    (
        "the gate was locked from inside",
        "mouse",
        "slipped under the gate and pushed the bolt",
        "crept through a crack and opened the lock",
    ),
    (
        "deep mud covered the road",
        "goat",
        "carried everything across on a strong back",
        "found a dry path over the stones",
    ),
)
KINDNESSES = (
    ("was caught in a net", "cut the net"), ("was looking for something to eat", "shared a piece of bread"),
    ("had a thorn in one foot", "pulled out the thorn"), ("was shivering with cold", "lent it a scarf"),
    ("had fallen on its back", "set it on its feet"),
)  # fmt: skip


def delivery(t: Teller) -> Story:
    """An errand: a kindness on the way is paid back where the road is blocked."""
    hero, receiver = (t.child() if t.chance(0.6) else t.animal()), t.friend()
    barrier, kind, *helps = t.pick([row for row in BARRIERS if row[1] not in t.taken])
    goods, carried, need = t.pick(ERRANDS)
    if barrier.endswith("fog"):
        t.season, t.weather = "autumn", "foggy"
    elif barrier.startswith("deep mud"):
        t.season, t.weather = "spring", "rainy"
    trouble, kindness = t.pick(KINDNESSES)
    sender, help_given = t.elder(hero), t.pick(helps)
    place, at = t.place()
    opening(t, hero)
    t.say(
        f"{capital(t.day())}, {sender.name} gave {hero.obj} {goods} for {receiver.title}, who lived beyond {place} "
        f"and {need}.",
        f"{capital(t.day())}, {sender.name} called {hero.obj}. {receiver.title}, who lived beyond {place}, {need}, "
        f"and somebody had to bring {goods}.",
    )
    t.fact(
        f"{receiver.name} {need}.", f"Why did {receiver.name} need {goods}?", f"What was wrong with {receiver.name}?"
    )
    t.fact(f"{hero.name} carried {goods}.", f"What did {hero.name} carry?", f"What was in {hero.name}'s hands?")
    t.fact(f"{capital(sender.name)} sent {hero.name}.", f"Who sent {hero.name}?")
    t.speech(sender.name, "Be back before dark.", "Be careful, and do not stop too long.", "Can you do that for me?")
    t.reply(hero.name, "You can count on me!", "I will hurry.", "Of course I can.")
    sky(t)
    interlude(t, hero)
    t.say(
        f"On the way, {at}, {hero.sub} met {article(kind)} that {trouble}.",
        f"Not far from home, {at}, there was {article(kind)} that {trouble}.",
    )
    t.say(
        f"{hero.name} was in a hurry, but {hero.sub} stopped and {kindness}.",
        f"{hero.name} could not just walk by. {hero.Sub} {kindness}.",
    )
    t.speech(f"the {kind}", "I will not forget this.", "Thank you! Maybe I can help you one day.", verb="said")
    t.fact(f"{hero.name} {kindness}.", f"What did {hero.name} do for the {kind}?", f"How was {hero.name} kind?")
    t.fact(
        f"{hero.name} met the {kind} {at}.",
        f"Where did {hero.name} meet the {kind}?",
        f"Whom did {hero.name} meet on the way?",
    )
    t.say(f"But farther on, {barrier}.", f"Everything went well until {hero.sub} saw that {barrier}.")
    t.speech(hero.name, "What shall I do now?", "Now I will never get there!", f"But {receiver.name} is waiting!")
    t.say(
        f"Suddenly the {kind} was there again. It {help_given}.",
        f"Then somebody came running. It was the {kind}, and it {help_given}.",
    )
    t.fact(f"The {kind} {help_given}.", f"How did the {kind} help?", f"Who helped {hero.name}, and how?")
    t.fact(f"The trouble was that {barrier}.", f"Why could {hero.name} not go on?", "What was the problem on the road?")
    t.say(
        f"So {hero.name} came to {receiver.name} just in time with the {carried}.",
        f"Before the sun went down, {hero.name} knocked at the door and gave {receiver.name} the {carried}.",
    )
    t.speech(
        receiver.name, "How did you come so fast?", "You came just in time!", "Thank you, that is just what I needed."
    )
    if t.chance(0.5):
        t.speech(hero.name, f"The {kind} helped me.", f"I have a new friend, and it is {article(kind)}.", verb="said")
    closing(
        t,
        hero,
        "one kindness brings another",
        "even a small friend can be a great help",
        "it is always worth stopping to help",
    )
    return t.finish("delivery", f"{article(hero.kind)} who carried {goods} to a friend", hero)


CROPS = (
    ("pumpkin", "as big as a wheel", "a pot of pumpkin soup"),
    ("sunflower", "taller than the fence", "a bag of seeds for the birds"),
    ("strawberry", "sweet and red", "a strawberry cake"), ("bean", "long and green", "a big pot of beans"),
    ("melon", "round and heavy", "a cool bowl of melon"), ("tomato", "as round as a ball", "a tomato pie"),
)  # fmt: skip
PESTS = (
    ("no rain fell for three weeks", "carried water from the well every evening", "the leaves were green again"),
    ("the birds began to pick at the leaves", "made a scarecrow from an old coat", "the birds stayed away"),
    ("snails crept up in the night", "picked up the snails and carried them to the forest", "the snails were gone"),
    ("a cold night was coming", "covered the plant with straw", "the frost could not hurt it"),
    ("a storm bent the stem", "tied the stem to a stick", "the plant stood straight again"),
)


def harvest(t: Teller) -> Story:
    """A seed is planted, tended through one trouble with what a neighbour advises, and its crop is shared."""
    hero, neighbor = t.hero(), t.friend()
    giver = t.worker(t.pick([job for job in ("gardener", "farmer", "teacher") if job not in t.taken]))
    crop, size, meal = t.pick(CROPS)
    trouble, remedy, effect = t.pick(PESTS)
    spot = t.pick(
        ("behind the house", "beside the fence", "near the well", "in a sunny corner", "next to the old apple tree")
    )
    t.season = "spring"
    t.weather = t.pick(words.SEASONS["spring"])
    opening(t, hero)
    t.say(
        f"{capital(t.day())}, {giver.title} gave {hero.obj} a tiny {crop} seed.",
        f"{capital(t.day())}, {hero.name} got a {crop} seed from {presented(t, giver)}.",
    )
    t.fact(f"{giver.name} gave {hero.name} the seed.", "Who gave the seed?", f"Where did {hero.name} get the seed?")
    identify(t, giver)
    t.speech(
        giver.name,
        "Plant it and take good care of it.",
        "Be patient. Good things take time.",
        "It needs sun, water and time.",
    )
    t.say(f"{hero.name} planted it {spot} and watered it.", f"{hero.name} dug a hole {spot} and put the seed in.")
    t.fact(
        f"{hero.name} planted the seed {spot}.", f"Where did {hero.name} plant the seed?", f"Where did the {crop} grow?"
    )
    t.say(
        "For many days nothing happened.",
        "Every morning there was only brown earth.",
        f"{t.pick(('One week', 'Two weeks'))} went by, and nothing could be seen.",
    )
    t.say(f"{neighbor.title} looked over the fence.", f"{neighbor.title} came to see the garden.")
    t.speech(neighbor.name, "Nothing will ever grow there!", "Maybe the seed is asleep?", "Are you still waiting?")
    if t.chance(0.6):
        t.reply(hero.name, "Just wait and see.", "I will not give up.", "It only needs time.")
    t.say("Then, one morning, a green leaf came up.", "At last a little green stem came out of the ground!")
    t.say(f"But a week later {trouble}.", f"The plant grew and grew, but then {trouble}.")
    t.say(
        f"{hero.name} did not give up. {hero.Sub} {remedy}, and {effect}.",
        f"So {hero.name} {remedy}, and soon {effect}.",
    )
    t.fact(f"The trouble was that {trouble}.", "What went wrong?", "What was the trouble?")
    t.fact(f"{hero.name} {remedy}.", f"What did {hero.name} do about it?", f"How did {hero.name} save the plant?")
    t.say(f"In autumn there was a {crop}, {size}.", f"When autumn came, the {crop} was {size}.")
    t.fact(f"The {crop} was {size}.", f"What was the {crop} like?", "What grew from the seed?")
    t.say(
        f"{hero.name} made {meal} and invited {neighbor.name} and {giver.name}.",
        f"Out of it {hero.name} made {meal}, and {giver.name} and {neighbor.name} came to share it.",
    )
    t.fact(f"{hero.name} made {meal}.", f"What did {hero.name} make from the {crop}?")
    t.speech(
        neighbor.name,
        "I was wrong. It was worth waiting!",
        "May I have a seed, too?",
        f"You are the best gardener, {hero.name}!",
    )
    thanks(t, hero, giver)
    closing(
        t,
        hero,
        "good things take time",
        "those who care for a small thing will see it grow",
        "it is best not to give up too soon",
    )
    return t.finish("harvest", f"{article(hero.kind)} who grew {article(crop)}", hero)
