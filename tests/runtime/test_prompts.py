"""Prompts in every container: their token ids, refusals and their wording, and truncation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import LLM, SamplingParams
from fastllama.layers.config import LlamaConfig
from fastllama.runtime.prompts import Prepared, PromptEncoder, as_list, length_of, token_ids
from tests.io import tokenizer_samples as samples
from tests.io.checkpoints import random_llama
from tests.runtime.models import ours, running

IDS = [5, 6, 7]
ONE = SamplingParams(temperature=0, max_tokens=1)
GREEDY = SamplingParams(temperature=0)
LEGAL = "legal: a text, token ids, or the messages of a chat"


def encoder(max_model_len: int = 64) -> PromptEncoder:
    config = LlamaConfig.from_hf(random_llama(vocab_size=2048).config.to_dict())
    return PromptEncoder(samples.tokenizer("tiny"), config, max_model_len, "llama2", None)


ONE_PROMPT: dict[str, Callable[[], Any]] = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(5, 8),
    "generator": lambda: (i for i in IDS),
    "numpy array": lambda: np.array(IDS),
    "numpy array of 16 bits, backwards": lambda: np.array(IDS[::-1], np.uint16)[::-1],
    "tensor": lambda: torch.tensor(IDS),
    "int32 tensor": lambda: torch.tensor(IDS, dtype=torch.int32),
    "numpy scalars": lambda: [np.int64(i) for i in IDS],
    "tensors without dimensions": lambda: [torch.tensor(i) for i in IDS],
    "mapping of ids": lambda: {"prompt_token_ids": IDS},
    "mapping of an array": lambda: {"prompt_token_ids": np.array(IDS)},
}


@pytest.mark.parametrize("kind", ONE_PROMPT)
def test_token_ids_in_any_container(kind: str) -> None:
    make = ONE_PROMPT[kind]
    ids = encoder().encode(make())
    assert ids == IDS
    assert all(type(i) is int for i in ids)
    assert list(map(encoder().encode, as_list(make()))) == [IDS]


BATCHES: dict[str, Callable[[], Any]] = {
    "lists": lambda: [[5, 6], [7, 8]],
    "array": lambda: np.array([[5, 6], [7, 8]]),
    "tensor": lambda: torch.tensor([[5, 6], [7, 8]]),
    "rows": lambda: list(torch.tensor([[5, 6], [7, 8]])),
    "arrays": lambda: (np.array(row) for row in ([5, 6], [7, 8])),
    "mappings": lambda: [{"prompt_token_ids": (5, 6)}, {"prompt_token_ids": torch.tensor([7, 8])}],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_several_prompts_in_any_container(kind: str) -> None:
    assert list(map(encoder().encode, as_list(BATCHES[kind]()))) == [[5, 6], [7, 8]]


def test_a_batch_runs_as_its_rows() -> None:
    with running(ours()) as llm:
        outputs = llm.generate(np.array([[5, 6, 7], [8, 9, 10]]), ONE)
        rows = llm.generate([[5, 6, 7], [8, 9, 10]], ONE)
    assert [output.prompt_token_ids for output in outputs] == [(5, 6, 7), (8, 9, 10)]
    assert [output.outputs for output in outputs] == [output.outputs for output in rows]


def test_texts_in_mappings() -> None:
    prepared = encoder().prepare({"prompt": "Hello"}, ONE)
    assert prepared == Prepared(tuple(samples.tokenizer("tiny").encode("Hello")), ONE, "Hello")
    assert as_list({"prompt": "Hello"}) == [{"prompt": "Hello"}]
    assert as_list("Hello") == ["Hello"]
    assert as_list(text for text in ("A", "B")) == ["A", "B"]


WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, f"prompt is None; {LEGAL}"),
    "number": (5, f"prompt is 5; {LEGAL}"),
    "bytes": (b"ab", rf"prompt is b'ab'; {LEGAL}"),
    "array without dimensions": (np.array(5), f"prompt is 5; {LEGAL}"),
    "tensor without dimensions": (torch.tensor(5), f"prompt is 5; {LEGAL}"),
    "mapping of another entry": ({"text": "a"}, rf"prompt is {{'text': 'a'}}; {LEGAL}, also as {{'prompt': text}} or "),
    "mapping of two": ({"prompt": "a", "prompt_token_ids": IDS}, rf"prompt is .*; {LEGAL}, also as "),
    "message alone": ({"role": "user", "content": "a"}, r"prompt is .*; messages are a list$"),
    "mapping in a mapping": ({"prompt": {"prompt": "a"}}, f"prompt is {{'prompt': 'a'}}; {LEGAL}"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_prompt_is_refused_in_a_sentence(kind: str) -> None:
    prompt, message = WRONG[kind]
    with pytest.raises(TypeError, match=f"^{message}"):
        encoder().encode(prompt)
    with pytest.raises(TypeError, match=f"^{message}"):
        encoder().prepare(prompt, ONE)
    with running(ours(), tokenizer=samples.tokenizer("tiny")) as llm:
        for use in (llm.start, llm.stream):
            with pytest.raises(TypeError, match=f"^{message}"):
                use(prompt)


@pytest.mark.parametrize(
    ("values", "place", "shown"),
    [
        ([5, 1.0], 1, "1.0"),
        ([5, True], 1, "True"),
        ([5, np.True_], 1, "np.True_"),
        ([5, np.float32(1)], 1, r"np.float32\(1.0\)"),
        ([5, torch.tensor(1.5)], 1, r"tensor\(1.5000\)"),
        ([5, torch.tensor(True)], 1, r"tensor\(True\)"),
        ([5, np.array(1.5)], 1, r"array\(1.5\)"),
        ([5, np.array([6])], 1, r"array\(\[6\]\)"),
        ([5, "6"], 1, "'6'"),
        (np.array([5.0, 6.0]), 0, "5.0"),
        (torch.tensor([True, False]), 0, "True"),
        ([[5, 6]], 0, r"\[5, 6\]"),
        pytest.param([5, 10**5000], 1, "an integer of 5001 digits", id="huge"),
    ],
)
def test_what_is_no_token_id_is_named_by_its_place(values: Any, place: int, shown: str) -> None:
    assert len(token_ids(values)) > place
    with running(ours(), tokenizer=samples.tokenizer("tiny")) as llm:
        with pytest.raises(ValueError, match=rf"^prompt token {place} is {shown}; legal: integers from 0 to 96$"):
            llm.start(values)
        assert not llm.engine.has_work


@pytest.mark.parametrize(
    "prompts",
    [np.array(5), torch.tensor(5), [torch.tensor(1.5)], [5.0], {5: 6}, [[5], None], pytest.param(10**5000, id="huge")],
)
def test_what_holds_no_prompts_is_refused(prompts: Any) -> None:
    with running(ours()) as llm, pytest.raises(TypeError, match=r"^prompts? is .*; legal: a text"):
        llm.generate(prompts)


def test_text_of_a_chat_template_needs_no_more_special_tokens() -> None:
    tokenizer = samples.tokenizer("tiny")
    text = "<s>[INST] Hello [/INST]"
    with running(ours(vocab_size=2048), tokenizer=tokenizer, chat_format="llama2") as llm:
        (output,) = llm.generate(text, ONE, add_special_tokens=False)
        assert list(output.prompt_token_ids) == tokenizer.encode_template(text)
        assert output.prompt_token_ids.count(1) == 1
        assert llm.encode(text, add_special_tokens=False) == list(output.prompt_token_ids)
        started = llm.start({"prompt": text}, ONE, add_special_tokens=False)
        assert started.output().prompt_token_ids == output.prompt_token_ids
        llm.abort(started)
        assert llm.encode(text) == [1, *tokenizer.encode(text, bos=False)]
        assert llm.encode(text)[1] != 1, "as text it is no BOS"


@pytest.mark.parametrize(
    ("kept", "max_tokens", "expected"),
    [(2, 1, 2), (99, 1, 10), (10, 1, 10), (1, 1, 1), (-1, 8, 8), (-1, 1, 10), (-1, None, 10), (-1, 99, 1)],
)
@pytest.mark.parametrize("kind", ["ids", "text"])
def test_the_last_tokens_of_a_prompt_are_kept(kind: str, kept: int, max_tokens: int | None, expected: int) -> None:
    """-1: as many as leave room for max_tokens."""
    text = "Once upon a time there was a b c"
    ids = samples.tokenizer("tiny").encode(text)
    assert len(ids) == 10
    prompt = ids if kind == "ids" else text
    params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=kept)
    found = encoder(max_model_len=16).prepare(prompt, params)
    assert list(found.token_ids) == ids[-expected:]
    assert found.params is params


def test_a_text_that_cannot_fit_is_refused_unread_unless_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, read = encoder(max_model_len=32), []
    tokenizer = encoders.needed_tokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(len(text)) or encode(text))
    text = "once upon a time " * 100
    for prompt in (text, {"prompt": text}):
        with pytest.raises(ValueError, match=r"^the prompt has 1700 characters, which are \d+ tokens or more; legal: "):
            encoders.prepare(prompt, ONE)
    assert read == []
    kept = encoders.prepare(text, SamplingParams(truncate_prompt_tokens=9))
    assert read == [1700]
    assert list(kept.token_ids) == encode(text)[-9:]


def test_tags_in_messages_are_refused_or_escaped() -> None:
    messages: Any = [{"role": "user", "content": "a [/INST] b"}]
    with running(ours(vocab_size=2048), tokenizer=samples.tokenizer("tiny"), chat_format="llama2") as llm:
        for use in (llm.chat, llm.start, llm.stream, llm.encode):
            with pytest.raises(ValueError, match=r"tags='escape'|tags=.escape"):
                use(messages)
        ids = llm.encode(messages, tags="escape")
        assert ids == llm.chat_format.encode(messages, tags="escape")
        assert list(llm.chat(messages, ONE, tags="escape").prompt_token_ids) == ids
        started = llm.start(messages, ONE, tags="escape")
        assert list(started.output().prompt_token_ids) == ids
        llm.abort(started)
        assert not llm.engine.has_work, "nothing of what was refused was queued"


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        ("abc", 3),
        ({"prompt": "abc"}, 3),
        (IDS, 3),
        (np.array(IDS), 3),
        (np.array(5), 0),
        ((i for i in IDS), 0),
        ([{"role": "user", "content": "ab"}, {"role": "assistant"}], 2),
    ],
)
def test_the_length_of_a_prompt_is_known_before_it_is_read(prompt: Any, length: int) -> None:
    assert length_of(prompt) == length


def test_the_answer_to_a_chat_ends_by_its_format() -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    prepared = encoder().prepare(messages, GREEDY)
    assert prepared.params == encoder().ending_answers(GREEDY, messages)
    assert prepared.text is None


@pytest.mark.parametrize(
    "prompts",
    [
        b"ab",
        bytearray(b"ab"),
        memoryview(b"ab"),
        [b"ab"],
        [bytearray(b"ab")],
        {"prompt_token_ids": "ab"},
        {"prompt": [1]},
    ],
)
def test_bytes_are_neither_a_text_nor_ids(prompts: Any) -> None:
    with LLM("tiny", progress=False, kv_cache_tokens=512) as llm, pytest.raises(TypeError, match=r"; legal: "):
        llm.generate(prompts)


def test_messages_among_prompts_take_the_advice_of_their_refusal() -> None:
    messages = [{"role": "user", "content": "what does [INST] mean?"}]
    with LLM("tiny", progress=False, kv_cache_tokens=512) as llm:
        with pytest.raises(ValueError, match=r"pass tags='escape'$"):
            llm.generate([messages])
        (output,) = llm.generate([messages], SamplingParams(max_tokens=2, temperature=0), tags="escape")
        assert output.outputs == llm.chat(messages, SamplingParams(max_tokens=2, temperature=0), tags="escape").outputs
