"""Answers to conversations over HTTP: where their texts begin and end, and that logprobs' bytes spell these texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fastllama import LLM, SamplingParams
from tests.serve.asgi import Served, run, serving

STORY: list[dict[str, Any]] = [{"role": "user", "content": "Tell me a story"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module", params=["llama2", "plain"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tiny", chat_format=request.param, kv_cache_tokens=4096, max_num_seqs=4, progress=False) as llm:
        yield llm


async def answer(served: Served, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The one choice of a conversation, which is the same where it is streamed."""
    body = {"messages": messages, **GREEDY, **fields}
    (choice,) = (await served.post("/v1/chat/completions", body)).json()["choices"]
    streamed = (await served.post("/v1/chat/completions", body | {"stream": True})).text
    *events, done = streamed.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    entries = [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
    spelled = [(entry["token"], entry["bytes"]) for entry in entries]
    assert spelled == [(entry["token"], entry["bytes"]) for entry in (choice["logprobs"] or {"content": []})["content"]]
    found: dict[str, Any] = choice
    return found


def test_stop_strings_are_sought_in_the_text_that_is_shown(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            whole = (await answer(served, STORY))["message"]["content"]
            first = whole.split()[0]
            assert whole.startswith(first)
            for stop, text in ((" ", first), (f" {first}", whole), (first, ""), (whole[1:5], whole[:1])):
                assert (await answer(served, STORY, stop=stop))["message"]["content"] == text

    run(test())


def test_an_answer_is_joined_to_what_it_continues_without_a_second_space(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for content in ("In a", "In a ", "In a\n"):
                begun = [*STORY, {"role": "assistant", "content": content}]
                added = (await answer(served, begun))["message"]["content"]
                assert added.startswith(" ") == (content == "In a")
                assert added.lstrip() == added.removeprefix(" ")
            new = await answer(served, STORY)
            for content in ("", " ", " \n"):
                assert await answer(served, [*STORY, {"role": "assistant", "content": content}]) == new

    run(test())


@pytest.mark.parametrize("skips", [True, False])
def test_the_bytes_of_an_answer_s_tokens_join_to_its_content(llm: LLM, skips: bool) -> None:
    third = llm.chat(STORY, SamplingParams(**GREEDY)).outputs[0].token_ids[2]
    (eos,) = llm.config.eos_token_ids

    async def test() -> None:
        async with serving(llm) as served:
            begun = [*STORY, {"role": "assistant", "content": "In a"}]
            asked = {"logprobs": True, "top_logprobs": 1, "skip_special_tokens": skips}
            bias = {"logit_bias": {str(eos): 100}, "max_tokens": 3, "ignore_eos": True}
            broken = {"logit_bias": {"243": 30, "300": 29}, "frequency_penalty": 2, "max_tokens": 5}
            stop = {"stop_token_ids": [third]}
            assert len((await answer(served, STORY, **(asked | stop)))["logprobs"]["content"]) == 3
            for messages in (STORY, begun):
                for fields in ({}, bias, broken, stop, {"max_tokens": 200}):
                    choice = await answer(served, messages, **(asked | fields))
                    entries = choice["logprobs"]["content"]
                    data = b"".join(bytes(entry["bytes"]) for entry in entries)
                    assert data.decode("utf-8", "replace") == choice["message"]["content"]
                    assert all(entry["token"] for entry in entries)

    run(test())


def test_the_offsets_of_a_completion_count_broken_bytes(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            body = {"prompt": [1, 5], "logprobs": 0, "logit_bias": {"243": 30, "300": 29}, "frequency_penalty": 2}
            reply = (await served.post("/v1/completions", GREEDY | body | {"max_tokens": 4})).json()
            (choice,) = reply["choices"]
            assert (choice["text"], choice["logprobs"]["text_offset"]) == (" m\ufffd m\ufffd", [0, 2, 3, 5])

    run(test())
