"""LangChain of the examples' time runs them as they are written, and today's runs the same."""

from __future__ import annotations

from tests.clients.conftest import HERE, Client, last_json


def test_the_first_example_of_the_documentation_runs_unchanged(client: Client) -> None:
    printed = client("then", HERE / "first_example.txt")
    assert printed.startswith("content=")
    assert len(printed) > len("content=''\n") + 10


def test_the_second_example_of_the_documentation_runs_unchanged(client: Client) -> None:
    printed = client("then", HERE / "second_example.txt")
    prompt, answer = printed.split("Finished chain.")
    assert "Why do I need to run machine learning models on-premise? [/INST]" in prompt
    assert len(answer.replace("\x1b[0m", "").strip()) > 10


def test_langchain_of_today_runs_the_same_and_streams_what_it_answers_whole(client: Client) -> None:
    got = last_json(client("now", HERE / "scripts" / "langchain_now.py"))
    assert len(got["first"]) > 10
    assert len(got["second"]) > 10
    assert got["first_usage"]["output_tokens"] > 4
    assert "".join(got["pieces"]) == got["whole"]
    assert len([piece for piece in got["pieces"] if piece]) > 4
    assert got["logprobs"] == got["likely_usage"]["output_tokens"]
    assert "".join(got["completion_pieces"]) == got["completion"]
    assert got["completion"]
