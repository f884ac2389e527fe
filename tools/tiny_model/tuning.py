"""Documents of the second stage: texts and chats that start unlike any story.

The first stage learns chats as text, including the user's words and their tags. So a start unlike any story looks to it
like a user's message, and it continues with the tag that ends one. Here the given text, an odd start or a user's words
between tags, has no loss: the model reads tags and never writes them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

from .chat import ASKS, PARTINGS, SMALL_TALK, SYSTEMS, exchanges, prompt
from .foreign import NAMES, WORDS, foreign
from .stories import tell
from .tell import Story, article

CHAT_SHARE, FOREIGN_CHAT_SHARE, START_SHARE = 0.35, 0.15, 0.3  # the rest are stories as they are
OFFERS = (
    "Shall I tell you a story?", "Would you like to hear a story?", "What kind of story would you like?",
    "I can tell you a story, if you like.",
)  # fmt: skip
GREETINGS = (
    "Hi", "Hello", "hello", "Good day", "Good afternoon", "Hi there", "Hello there", "hi", "Greetings", "Howdy",
    "Hello again", "Welcome", "What's up", "Hello, little model", "Good to see you", "Pleased to meet you",
)  # fmt: skip
GREETED = ("Hello! {}", "Hi! {}", "Hello, and welcome! {}", "It is nice to meet you. {}")
THANKS = (
    "Thank you so much",
    "Thanks for the story",
    "Many thanks",
    "thank you",
    "thanks",
    "Great",
    "Well done",
    "Nice",
)
THANKED = ("You are welcome!", "You are welcome! {}", "I am glad that you liked it!")
LEAVINGS = ("Goodbye", "Good night", "See you soon", "bye bye", "Farewell", "I have to go", "That is all", "Stop")
LEFT = ("Goodbye! Come back for another story.", "Goodbye! Sleep well.", "Goodbye!")
MOODS = ("I am tired", "I feel lonely", "I am happy", "I am bored", "I am hungry", "Today was a bad day", "I love you")
COMFORT = ("A story may help. {}", "I understand. {}", "Thank you for telling me. {}")
WISHES = (
    "Yes", "Yes, I would", "Sure", "Of course", "Please do", "Go on", "Tell me one", "A story, please",
    "Tell me another story", "Tell me a long story", "Tell me a bedtime story", "I want a story",
    "Tell a story about {}", "Tell me a story with {} in it", "Write a short story about {}",
    "A funny story about {}",
)  # fmt: skip
QUESTIONS = (
    "What is {}?", "What are {}?", "Who is {}?", "Where is {}?", "How does {} work?", "Why do people like {}?",
    "When was {} invented?", "How many kinds of {} are there?", "What do you think of {}?", "Do you like {}?",
    "Do you know {}?", "Have you heard of {}?", "Explain {}", "Tell me about {}", "Write a song about {}",
    "Write a poem on {}", "Tell me a joke about {}", "How do I make {}?", "Give me three facts about {}",
    "Describe {}", "Translate {} into French", "How much is {}?", "Can you draw {}?", "Is {} good for me?",
    "Summarize {}", "Spell {}", "What is the meaning of {}?", "I like {}", "I want {}",
    "We talked about {} at school", "List all {}", "{}",
)  # fmt: skip
UNKNOWN = (
    "I do not know. I only know my stories.", "I know nothing about that. {}", "I am sorry, I do not know. {}",
    "That is too hard for me. I can only tell stories.", "I am only a small model that tells stories. {}",
)  # fmt: skip
UNCLEAR = ("I did not understand that. {}", "I am sorry, I do not understand. {}", "I only know stories. {}")


@dataclass(frozen=True)
class Passage:
    """The text between BOS and EOS: a given part, and its continuation, which is learned."""

    given: str
    learned: str


def _introduced(rng: random.Random, told: Story) -> Passage:
    """A story after a first sentence that names its hero or its subject."""
    hero = told.hero
    openings = [
        (f"The {hero.kind}", f" was called {hero.name}, and {hero.sub} was very {hero.trait}."),
        (f"The {hero.trait} {hero.kind}", f" was called {hero.name}."),
        (f"The {rng.choice(('little', 'young', 'old', 'big'))} {hero.kind}", f" was called {hero.name}."),
        (f"{article(hero.kind)}".capitalize(), f" called {hero.name} was {hero.trait}."),
        (hero.name, f" was {article(hero.trait)} {hero.kind}."),
        (f"My friend {hero.name}", f" is {article(hero.trait)} {hero.kind}."),
        ("There was", f" {article(hero.trait)} {hero.kind} named {hero.name}."),
        ("This", f" is a story about {told.about}."),
        ("The story", f" is about {told.about}."),
        ("I", f" will tell you a story about {told.about}."),
        (f"A story about {told.about}", f", who was called {hero.name}." if " who " not in told.about else "."),
    ]
    given, rest = rng.choice(openings)
    return Passage(given, f"{rest} {told.text}")


def _cut(rng: random.Random, told: Story) -> Passage:
    """A story from a random word on; some of the next words are given, sometimes up to the middle of a word."""
    starts = [0, *(i + 1 for i, letter in enumerate(told.text) if letter == " ")]
    first = rng.randrange(len(starts) * 3 // 4)
    last = first + rng.randint(1, 8)
    end = starts[last] - 1 if rng.random() < 0.8 else starts[last] - 1 - rng.randint(0, 3)
    return Passage(told.text[starts[first] : max(end, starts[first] + 1)], told.text[max(end, starts[first] + 1) :])


def _led(rng: random.Random, told: Story) -> Passage:
    """A foreign start followed by a story, joined as the start's end allows."""
    kind = rng.random()
    if kind < 0.25:  # as a user would ask, without tags
        start = rng.choice(QUESTIONS).format(rng.choice(WORDS + NAMES))
    else:
        start = foreign(rng) if kind < 0.97 else rng.choice((" ", "\n", "\t"))
    if start[-1].isspace():
        return Passage(start, told.text)
    if start[-1] in ".!?":
        return Passage(start, f" {told.text}")
    if start[-1] in ",:":
        return Passage(start, f" here is a story about {told.about}. {told.text}")
    joint = rng.choice((" is a story about {}. ", " is a story about {}. ", ", a story about {}. ", ". ", "! "))
    return Passage(start, f"{joint.format(told.about)}{told.text}")


def started(rng: random.Random) -> Passage:
    """A story with an odd start."""
    return rng.choice((_introduced, _cut, _led, _led))(rng, tell(rng))


def _offer(rng: random.Random, answers: tuple[str, ...]) -> str:
    return rng.choice(answers).format(rng.choice(OFFERS))


def _remark(rng: random.Random) -> tuple[str, str]:
    """A user's remark unrelated to stories, and the answer."""
    thing = rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(NAMES) if rng.random() < 0.5 else foreign(rng)
    kind = rng.random()
    if kind < 0.15:
        said, answer = rng.choice(GREETINGS), _offer(rng, GREETED)
    elif kind < 0.22:
        said, answer = rng.choice(THANKS), _offer(rng, THANKED)
    elif kind < 0.29:
        said, answer = rng.choice(LEAVINGS), _offer(rng, LEFT)
    elif kind < 0.35:
        said, answer = rng.choice(MOODS), _offer(rng, COMFORT)
    elif kind < 0.45:
        said, answer = rng.choice(WISHES).format(thing), tell(rng).text
    elif kind < 0.7:
        return rng.choice(QUESTIONS).format(thing), _offer(rng, UNKNOWN)
    elif kind < 0.9:
        return foreign(rng), _offer(rng, UNCLEAR)
    else:
        return rng.choice(SMALL_TALK + PARTINGS)
    return said + rng.choice(("", ".", "!", "!")), answer


def foreign_chat(rng: random.Random) -> list[Passage]:
    """A chat of remarks unrelated to stories, sometimes with a requested story in between."""
    turns = [_remark(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        told = tell(rng)
        asked = [rng.choice(told.facts)] if rng.random() < 0.5 else []
        turns[1:1] = [(rng.choice(ASKS).format(told.about), told.text), *asked]
    return _passages(rng, turns, 0.15)


def _passages(rng: random.Random, turns: list[tuple[str, str]], system_share: float) -> list[Passage]:
    system = ""
    if rng.random() < system_share:
        system = rng.choice(SYSTEMS) if rng.random() < 0.5 else foreign(rng)
    return [Passage(prompt(user, "" if i else system), f" {answer} ") for i, (user, answer) in enumerate(turns)]


def passages(seed: int) -> list[Passage]:
    """Document `seed` of the second stage."""
    rng = random.Random(f"tuning {seed}")
    draw = rng.random()
    if draw < CHAT_SHARE:
        return _passages(rng, exchanges(rng), 0.06)
    if draw < CHAT_SHARE + FOREIGN_CHAT_SHARE:
        return foreign_chat(rng)
    return [started(rng) if draw < CHAT_SHARE + FOREIGN_CHAT_SHARE + START_SHARE else Passage("", tell(rng).text)]


def tuning_ids(tokenizer: SentencePieceProcessor, seed: int) -> list[int]:
    """The ids of document `seed`; those without loss are stored as their complement, `~id`.

    The given part and its continuation are encoded separately, so that tokens end where a prompt's do.
    """
    ids = []
    for passage in passages(seed):
        ids += [tokenizer.bos_id(), *(~token for token in tokenizer.encode(passage.given))]
        ids += _following(tokenizer, passage.learned) if passage.given else tokenizer.encode(passage.learned)
        ids.append(tokenizer.eos_id())
    return ids


def _following(tokenizer: SentencePieceProcessor, text: str) -> list[int]:
    """The ids of a text that follows another: without the space that SentencePiece adds to a first one."""
    return tokenizer.encode(f"\n{text}")[2:]
