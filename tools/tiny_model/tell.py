"""The teller: characters, seeded choices, and the few rules of English all share (articles, capitals, speech)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from . import words

T = TypeVar("T")
OBJECTIVE = {"she": "her", "he": "him", "they": "them"}
POSSESSIVE = {"she": "her", "he": "his", "they": "their"}
SPEECH_VERBS = {".": ("said",), "?": ("asked",), "!": ("said", "cried", "called")}
REPLY_VERBS = {".": ("said", "answered", "replied"), "?": ("asked",), "!": ("said", "answered", "cried")}


def article(phrase: str) -> str:
    """`phrase` with the indefinite article that its first letter needs."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capital(text: str) -> str:
    """`text` with its first letter raised, the rest as it is."""
    return text[0].upper() + text[1:]


def listed(items: Sequence[str]) -> str:
    """`items` as English lists them: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


@dataclass(frozen=True)
class Character:
    """A character of a story: `name` as sentences use it, `kind` (girl, fox, baker), `sub` the pronoun."""

    name: str
    kind: str
    sub: str
    trait: str = "kind"

    @property
    def obj(self) -> str:
        return OBJECTIVE[self.sub]

    @property
    def pos(self) -> str:
        return POSSESSIVE[self.sub]

    @property
    def Sub(self) -> str:
        return capital(self.sub)

    @property
    def Pos(self) -> str:
        return capital(self.pos)

    @property
    def title(self) -> str:
        """The name as a first mention gives it: "Rosa the baker", "Pip the fox", but only "Mia" for a child."""
        return self.name if self.is_child or " " in self.name else f"{self.name} the {self.kind}"

    @property
    def is_animal(self) -> bool:
        return self.kind in words.ANIMAL_HOMES

    @property
    def is_child(self) -> bool:
        return self.kind in ("girl", "boy")


@dataclass(frozen=True)
class Story:
    """A finished story: what it is `about` ("a fox who lost a ball"), and (question, answer) pairs true of it."""

    text: str
    plot: str
    about: str
    hero: Character
    weather: str
    facts: tuple[tuple[str, str], ...]


@dataclass
class Teller:
    """Writes one story: chooses with `rng`, and keeps its sentences, their facts and the names in use."""

    rng: random.Random
    sentences: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    season: str = ""
    weather: str = ""

    def __post_init__(self) -> None:
        self.season = self.pick(tuple(words.SEASONS))
        self.weather = self.pick(words.SEASONS[self.season])

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[int(self.rng.random() * len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different `options` in random order."""
        return self.rng.sample(list(options), count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, *options: str) -> None:
        """Adds one of `options` (each one or more whole sentences)."""
        self.sentences.append(self.pick(options))

    def maybe(self, probability: float, *options: str) -> None:
        """Adds one of `options`, or nothing."""
        if self.chance(probability):
            self.say(*options)

    def speech(self, who: str, *lines: str, verb: str = "") -> None:
        """Adds one of `lines` (ending in . ? or !) as words spoken by `who`."""
        line = self.pick(lines)
        verb = verb or self.pick(SPEECH_VERBS[line[-1]])
        self._quote(who, line, verb)

    def reply(self, who: str, *lines: str) -> None:
        """Adds one of `lines` as the reply of `who`."""
        line = self.pick(lines)
        self._quote(who, line, self.pick(REPLY_VERBS[line[-1]]))

    def _quote(self, who: str, line: str, verb: str) -> None:
        quoted = line[:-1] + "," if line[-1] == "." else line
        self.say(f'"{quoted}" {verb} {who}.', f'{capital(who)} {verb}, "{line}"')

    def fact(self, answer: str, *questions: str) -> None:
        """Notes that `answer` is the right answer to each of `questions`; one of them is kept."""
        self.facts.append((self.pick(questions), answer))

    def _name(self, names: Sequence[str]) -> str:
        name = self.pick([name for name in names if name not in self.taken])
        self.taken.add(name)
        return name

    def child(self) -> Character:
        kind, names, sub = self.pick((("girl", words.GIRLS, "she"), ("boy", words.BOYS, "he")))
        return Character(self._name(names), kind, sub, self.pick(words.TRAITS))

    def animal(self) -> Character:
        kind = self.pick([kind for kind in words.ANIMAL_HOMES if kind not in self.taken])
        self.taken.add(kind)
        return Character(self._name(words.ANIMAL_NAMES), kind, self.pick(("she", "he")), self.pick(words.TRAITS))

    def worker(self, job: str = "") -> Character:
        job = job or self.pick([job for job in words.JOBS if job not in self.taken])
        self.taken.add(job)
        names, sub = self.pick(((words.GIRLS, "she"), (words.BOYS, "he")))
        return Character(self._name(names), job, sub, self.pick(words.TRAITS))

    def hero(self) -> Character:
        draw = self.rng.random()
        return self.child() if draw < 0.5 else self.animal() if draw < 0.85 else self.worker()

    def friend(self) -> Character:
        return self.child() if self.chance(0.55) else self.animal()

    def elder(self, hero: Character) -> Character:
        """A relative of `hero`, named by the relation ("her grandmother")."""
        relation = self.pick(tuple(words.FAMILY))
        return Character(f"{hero.pos} {relation}", relation, words.FAMILY[relation])

    def thing(self) -> str:
        return f"{self.pick(words.COLORS)} {self.pick(words.THINGS)}"

    def place(self) -> tuple[str, str]:
        """A place ("the pond") and the phrase for being there ("by the pond"); each place occurs once a story."""
        place = self.pick([place for place in words.PLACES if place not in self.taken])
        self.taken.add(place)
        return place, f"{words.PLACES[place]} {place}"

    def day(self, time: str = "") -> str:
        """A phrase for the day the story happens on, in its season and weather ("one windy autumn morning")."""
        return f"one {self.weather} {self.season} {time or self.pick(words.TIMES)}"

    def finish(self, plot: str, about: str, hero: Character) -> Story:
        return Story(" ".join(self.sentences), plot, about, hero, self.weather, tuple(self.facts))
