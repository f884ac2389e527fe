"""LLM's methods: an unknown name, or another thing than they take, is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_llm import SHORT, talking


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda llm: llm.generate([5], stop="x"),
            "LLM.generate got an unknown option 'stop'; it is 'stop' of Sampling",
        ),
        (lambda llm: llm.chat([], prompts=3), "LLM.chat got an unknown option 'prompts'; it is 'prompts' of LLM.gen"),
        (lambda llm: llm.stream([5], sampling_params=SHORT), "LLM.stream got an unknown option 'sampling_params'; did"),
        (
            lambda llm: llm.start([5], max_tokens=3),
            "LLM.start got an unknown option 'max_tokens'; it is 'max_tokens' of",
        ),
        (
            lambda llm: llm.fork(None, seed=3),
            "LLM.fork got an unknown option 'seed'; it is 'seed' of LLM or 'seed' of Sampl",
        ),
        (
            lambda llm: llm.encode("x", add_bos=True),
            "LLM.encode got an unknown option 'add_bos'; legal options: prompt, ",
        ),
        (lambda llm: llm.follow("0"), "generation is '0'; legal: what LLM.start returns"),
        (lambda llm: llm.fork("0"), "generation is '0'; legal: what LLM.start returns"),
        (lambda llm: llm.abort(5), "request is 5; legal: a request's id, a string, or what LLM.start returns"),
        (lambda llm: llm.abort([1]), "request is [1]; legal: a request's id, a string, or what LLM.start returns"),
        (lambda llm: llm.generate([], add_special_tokens="no"), "add_special_tokens must be True or False, got 'no'"),
        (lambda llm: llm.start("x", add_special_tokens=1), "add_special_tokens must be True or False, got 1"),
        (lambda llm: llm.encode("x", add_special_tokens=None), "add_special_tokens must be True or False, got None"),
    ],
)
def test_a_call_with_something_else_states_what_is_legal(call: Callable[[Any], Any], message: str) -> None:
    with talking() as llm, pytest.raises(TypeError) as raised:
        call(llm)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("tags", ["keep", None, 3, np.array(["refuse", "escape"])])
def test_tags_are_checked_whatever_the_prompt(tags: Any) -> None:
    with talking() as llm:
        for call in (llm.stream, llm.start, llm.encode, llm.chat):
            with pytest.raises(ValueError, match=r"^tags is .*; legal values: 'refuse', 'escape'$"):
                call([{"role": "user", "content": "x"}] if call == llm.chat else "x", tags=tags)


def test_special_tokens_may_be_asked_for_with_numpys_true() -> None:
    with talking() as llm:
        for flag in (True, False):
            assert llm.encode("x", add_special_tokens=np.bool_(flag)) == llm.encode("x", add_special_tokens=flag)
        assert llm.encode("x") != llm.encode("x", add_special_tokens=False)
