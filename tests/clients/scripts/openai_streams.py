"""openai 3.x: 48 streams at once, by its two clients and on both endpoints, beside the same answers not streamed."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

PLACES = ("forest", "river", "castle", "garden", "school", "ship", "hill", "market", "farm", "lake", "road", "tower")
HEROES = ("fox", "girl", "king", "bird")
PROMPTS = [f"Once upon a time there was a {hero} in a {place}." for place in PLACES for hero in HEROES]
COMMON: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 32}

client = openai.OpenAI(api_key="random-string")


def chat(prompt: str) -> str:
    answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **COMMON)
    return answer.choices[0].message.content


def streamed_chat(prompt: str) -> str:
    chunks = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], stream=True, **COMMON)
    pieces = [chunk.choices[0] for chunk in chunks]
    assert pieces[-1].finish_reason in ("stop", "length")
    return "".join(piece.delta.content or "" for piece in pieces)


def completion(prompt: str) -> str:
    return client.completions.create(prompt=prompt, **COMMON).choices[0].text


async def streamed_chat_async(client: openai.AsyncOpenAI, prompt: str) -> tuple[str, int]:
    messages: Any = [{"role": "user", "content": prompt}]
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [each async for each in await client.chat.completions.create(messages=messages, **options, **COMMON)]
    assert chunks[-1].choices == []
    return "".join(each.choices[0].delta.content or "" for each in chunks[:-1]), chunks[-1].usage.completion_tokens


async def streamed_completion_async(client: openai.AsyncOpenAI, prompt: str) -> str:
    chunks = [each async for each in await client.completions.create(prompt=prompt, stream=True, **COMMON)]
    return "".join(each.choices[0].text for each in chunks)


async def many() -> tuple[Any, Any]:
    async with openai.AsyncOpenAI(api_key="random-string") as client:
        chats = await asyncio.gather(*(streamed_chat_async(client, prompt) for prompt in PROMPTS))
        return chats, await asyncio.gather(*(streamed_completion_async(client, prompt) for prompt in PROMPTS))


with ThreadPoolExecutor(4) as pool:
    whole_chats, whole_completions = list(pool.map(chat, PROMPTS)), list(pool.map(completion, PROMPTS))
with ThreadPoolExecutor(len(PROMPTS)) as pool:
    threaded_chats = list(pool.map(streamed_chat, PROMPTS))
async_chats, async_completions = asyncio.run(many())
print(
    json.dumps(
        {
            "whole_chats": whole_chats,
            "whole_completions": whole_completions,
            "threaded_chats": threaded_chats,
            "async_chats": [text for text, _ in async_chats],
            "async_tokens": [count for _, count in async_chats],
            "async_completions": async_completions,
        }
    )
)
