"""The bundled model writes no chat tags, whatever texts and chats outside its grammar it continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from fastllama import LLM, SamplingParams
from fastllama.io.chat import Message
from tools.tiny_model.chat import prompt
from tools.tiny_model.tuning import passages

TAUGHT = ("", " ", "\n", "Once upon a time", "The dog", "The dog\n", "He", "The", "A", "a")
TAUGHT_USERS = ("Good morning!", "Hi!", "Hello")
# None of these is in the recipe, tools/tiny_model; the first have leaked tags.
STARTS = (
    "Café", "-hello", "Hello", "Hello, world!", "Good morning", "Good morning!", "Hey there", "Thanks a lot",
    "See you tomorrow", "How do I cook rice?", "What is love?", "Why is the sky blue?", "Who was Napoleon?",
    "Is it raining?", "Paris", "Peter", "Alice", "Berlin is", "Dr. Smith", "My dear friend", "Dear diary,",
    "Chapter 1", "I am", "It was the best of times,", "To be or not to be", "Call me Ishmael.", "In the beginning",
    "The old man and the sea", "The quick brown fox", "Z", "robots", "spaceship", "quantum physics", "ice cream",
    "LLaMA", "Señor Núñez", "Straße", "naïve façade", "привет", "こんにちは", "你好,世界", "🦙", "😀😀", "1 2 3", "42",
    "2 + 2 =", "x = 3\ny =", "def main():", "import os\n", '{"a": 1}', "# Title\n\n", "* one\n* two\n",
    "https://example.org", "...", "!!!", "?", '"', "(", "--help", "&&", "@you", "50 %", "SHOUTING LOUDLY", "zzzz",
    "qwerty uiop", "\t\tx",
)  # fmt: skip
USERS = (
    "hey", "Yo!", "Good evening", "Nice to meet you.", "Bye", "Thanks a lot", "ok", "No", "Yes, please.",
    "Tell me a story.", "Tell me about robots.", "Tell me a story about a pirate.", "Sing a song", "What is love?",
    "Why is the sky blue?", "Who was Napoleon?", "Is it raining?", "How old are you?", "Are you a human?",
    "What is 3 + 4?", "Translate 'cat' into German.", "Write a poem about the sea.", "def main():", "x", "?", "...",
    "", "Café", "привет", "你好", "🦙", "qwerty uiop", "SHOUTING LOUDLY", "I am sad.", "My name is Peter.", "The dog",
    "Summarize the news of today in three sentences, please.", "Once upon a time", "What's the time in Tokyo?",
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=40)
SAMPLED = [SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny") as llm:
        yield llm


def leaks(llm: LLM, prompts: Sequence[str] | Sequence[list[Message]]) -> list[tuple[object, str]]:
    """Each continuation with a bracket of a tag; in all that the model has learned to write, there are no brackets."""
    asked = [(prompt, params) for prompt in prompts for params in (GREEDY, *SAMPLED)]
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    texts = [output.outputs[0].text for output in outputs]
    return [(prompt, text) for (prompt, _), text in zip(asked, texts, strict=True) if "[" in text or "<" in text]


def chats(*before: Message) -> list[list[Message]]:
    return [[*before, {"role": "user", "content": user}] for user in TAUGHT_USERS + USERS]


def test_texts_go_on_without_tags(llm: LLM) -> None:
    assert leaks(llm, TAUGHT + STARTS) == []


@pytest.mark.parametrize(
    "before",
    [
        (),
        ({"role": "system", "content": "You are a pirate. Talk like one."},),
        ({"role": "user", "content": "Hi there, you!"}, {"role": "assistant", "content": "Hello!"}),
    ],
    ids=["first", "below a system message", "later"],
)
def test_answers_hold_no_tags(llm: LLM, before: tuple[Message, ...]) -> None:
    assert leaks(llm, chats(*before)) == []


def test_the_prompts_are_held_out() -> None:
    given = {passage.given for seed in range(3000) for passage in passages(seed)}
    assert not given & set(STARTS)
    assert not given & {prompt(user) for user in USERS}
