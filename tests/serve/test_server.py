"""The server that runs the application: its load, its printed lines, and the facts of the model that it serves."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

import fastllama
from fastllama import LLM
from fastllama.serve.keys import Keyring
from fastllama.serve.options import ServerOptions
from fastllama.serve.server import SWITCH_SECONDS, serve, served_model
from fastllama.serve.service import ServiceLimits

TINY = Path(fastllama.__file__).parent / "assets" / "tiny"


def options(**given: object) -> ServerOptions:
    return ServerOptions(Keyring.open(None, None), port=0, **given)  # type: ignore[arg-type]


def test_a_load_that_fails_ends_the_server_with_what_it_raised() -> None:
    lines: list[str] = []
    intervals: list[float] = []
    before = sys.getswitchinterval()

    def load() -> LLM:
        intervals.append(sys.getswitchinterval())
        url = lines[0].split(" is bound")[0]
        assert httpx.get(f"{url}/ready", trust_env=False, timeout=60).json()["error"]["code"] == "loading"
        raise ValueError("planted in the load")

    with pytest.raises(ValueError, match="planted in the load"):
        serve(options(), load, model="tiny", say=lines.append)
    assert len(lines) == 1
    assert intervals == pytest.approx([SWITCH_SECONDS])
    assert sys.getswitchinterval() == pytest.approx(before)


def test_a_model_is_named_as_it_was_asked_for_and_known_by_what_changes_its_answers() -> None:
    with LLM("tiny", kv_cache_tokens=1024, max_num_seqs=3) as llm:
        by_name = served_model(llm, "tiny", options(max_n=2))
        assert (by_name.names, by_name.any_name, by_name.max_n) == (("tiny",), True, 2)
        given = served_model(llm, "tiny", options(names=("a", "b")))
        assert (given.names, given.any_name, given.max_n) == (("a", "b"), False, 3)
        assert served_model(llm, str(TINY.parent), options()).names == ("assets",)  # a path shows where files lie
        assert served_model(llm, "owner/name", options()).names == ("owner/name",)
        assert by_name.max_model_len == llm.max_model_len
        assert by_name.fingerprint == given.fingerprint
        assert by_name.fingerprint != served_model(llm, "tiny", options(traits=("int8",))).fingerprint


def test_a_model_without_a_tokenizer_is_not_served() -> None:
    with LLM("tiny", kv_cache_tokens=1024) as llm:
        llm.tokenizer = llm.prompts.tokenizer = None
        with pytest.raises(ValueError, match="tokenizer"):
            served_model(llm, "tiny", options())


def test_limits_are_those_of_the_options() -> None:
    limits = ServiceLimits(request_seconds=1, body_bytes=2)
    assert options(limits=limits).limits is limits
    assert options().hosts == {"localhost", "127.0.0.1", "[::1]"}
    assert options(host="::1").hosts == {"localhost", "127.0.0.1", "[::1]"}
    assert options(host="127.0.0.2").hosts == {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}
    assert ServerOptions(Keyring.open("secret", None), host="0.0.0.0").hosts is None
