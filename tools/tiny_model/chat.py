"""Chats about the stories in Llama 2's chat format, and the training documents: stories and chats mixed."""

from __future__ import annotations

import random

from .stories import story, tell
from .tell import Story, article

CHAT_SHARE = 0.22
ASKS = (
    "Tell me a story about {}.", "Please tell me a story about {}.", "Write a story about {}.",
    "Can you tell me a story about {}?", "I would like to hear a story about {}.", "A story about {}, please.",
)  # fmt: skip
SYSTEMS = (
    "You are a friendly storyteller.", "You tell short stories for children and answer questions about them.",
    "You are a helpful assistant. Answer in one short sentence.", "Always be kind and polite.",
)  # fmt: skip
SMALL_TALK = (
    ("Hello!", "Hello! Would you like to hear a story?"), ("Hi!", "Hi! Shall I tell you a story?"),
    ("Good morning!", "Good morning! What kind of story would you like?"),
    ("Who are you?", "I am a very small language model. I tell stories."),
    ("What is your name?", "I have no name. I am a small model that tells stories."),
    ("What can you do?", "I can tell you a short story and answer questions about it."),
    ("How are you?", "I am well, thank you. Would you like a story?"),
    ("What is the capital of France?", "I do not know. I only know my stories."),
    ("Can you write code?", "No, I can only tell stories."),
    ("What is two plus two?", "I am not good at that. I only tell stories."),
    ("Who is the president?", "I do not know. I only know my stories."),
)  # fmt: skip
PARTINGS = (
    ("Thank you!", "You are welcome!"), ("Thanks!", "You are welcome!"),
    ("That was a nice story.", "I am glad that you liked it!"), ("Goodbye!", "Goodbye! Come back for another story."),
    ("Good night!", "Good night! Sleep well."),
)  # fmt: skip


def prompt(user: str, system: str = "") -> str:
    """The user's half of a turn as Meta writes it (llama/generation.py, chat_completion)."""
    content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" if system else user
    return f"[INST] {content.strip()} [/INST]"


def turn(user: str, answer: str, system: str = "") -> str:
    """One turn as Meta writes it, without BOS and EOS, which are added as ids."""
    return f"{prompt(user, system)} {answer.strip()} "


def _request(rng: random.Random, wanted: Story) -> str:
    """A request for `wanted` that names its subject and sometimes the hero's name or the weather."""
    parts = [rng.choice(ASKS).format(wanted.about)]
    if rng.random() < 0.3:
        name = wanted.hero.name
        parts.append(
            f"One of them is called {name}."
            if wanted.about.startswith("two")
            else f"The {wanted.hero.kind} is called {name}."
        )
    if rng.random() < 0.15:
        parts.append(f"It should be {article(wanted.weather)} day.")
    return " ".join(parts)


def _questions(rng: random.Random, about: Story, count: int) -> list[tuple[str, str]]:
    """`count` questions about a story, half of the time in the order of the story."""
    chosen = rng.sample(range(len(about.facts)), count)
    return [about.facts[i] for i in (sorted(chosen) if rng.random() < 0.5 else chosen)]


def exchanges(rng: random.Random) -> list[tuple[str, str]]:
    """The messages and answers of one chat: small talk, one or two stories on request or pasted, questions."""
    said: list[tuple[str, str]] = []
    draw = rng.random()
    if draw < 0.2:
        said += rng.sample(SMALL_TALK, rng.randint(1, 2))
    if draw > 0.06:
        first = tell(rng)
        asked = _questions(rng, first, rng.randint(1, 5))
        if rng.random() < 0.15:
            question, answer = asked.pop(0)
            said.append((f"Read this story: {first.text} {question}", answer))
        else:
            said.append((_request(rng, first), first.text))
        said += asked
        if rng.random() < 0.2:
            second = tell(rng)
            while second.hero.name in first.text or second.plot == first.plot:
                second = tell(rng)
            said += [(_request(rng, second), second.text), *_questions(rng, second, rng.randint(1, 2))]
    if rng.random() < 0.2:
        said.append(rng.choice(PARTINGS))
    return said


def chat(rng: random.Random) -> tuple[str, ...]:
    """The turns of one chat, some with a system message."""
    said = exchanges(rng)
    system = rng.choice(SYSTEMS) if rng.random() < 0.06 else ""
    return tuple(turn(user, answer, system if i == 0 else "") for i, (user, answer) in enumerate(said))


def document(seed: int) -> tuple[str, ...]:
    """Training document `seed`: the texts between BOS and EOS, one whole story or the turns of a chat."""
    rng = random.Random(f"document {seed}")
    return chat(rng) if rng.random() < CHAT_SHARE else (story(seed).text,)
