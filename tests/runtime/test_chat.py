"""LLM.chat uses the checkpoint's own chat format, ends answers where it does, and logs where there is none."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fastllama import LLM, AsyncEngine, SamplingParams
from tests.io import tokenizer_samples as samples
from tests.io.checkpoints import random_llama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IM_END, IM_START = 2048, 2049
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Sam?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def make(path: Path, *, template: str | None = None, added: bool = True) -> Path:
    """A small model of 2050 tokens with the bundled tokenizer, ChatML's two tokens, and a chat template."""
    random_llama(vocab_size=2050).save_pretrained(path)
    shutil.copyfile(samples.TINY, path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if added:
        (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": IM_END, "<|im_start|>": IM_START}))
        config["eos_token"] = "<|im_end|>"
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def opened(path: Path, **options: Any) -> LLM:
    return LLM(path, kv_cache_tokens=256, progress=False, **options)


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    return make(tmp_path / "model", template=CHATML)


def test_a_conversation_is_asked_in_the_checkpoints_own_template(chatml: Path) -> None:
    expected = AutoTokenizer.from_pretrained(chatml).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    with opened(chatml) as llm:
        assert llm.encode(MESSAGES) == expected
        output = llm.chat(MESSAGES, GREEDY)
        assert list(output.prompt_token_ids) == expected
        assert "".join(llm.stream(MESSAGES, GREEDY)) == output.outputs[0].text


ASKS: dict[str, Callable[[LLM, SamplingParams], tuple[int, ...]]] = {
    "chat": lambda llm, params: llm.chat(MESSAGES, params).outputs[0].token_ids,
    "start": lambda llm, params: finished(llm, params),
    "AsyncEngine": lambda llm, params: asyncio.run(served(llm, params)),
}


def finished(llm: LLM, params: SamplingParams) -> tuple[int, ...]:
    generation = llm.start(MESSAGES, params)
    list(llm.follow(generation))
    return generation.output().outputs[0].token_ids


async def served(llm: LLM, params: SamplingParams) -> tuple[int, ...]:
    async with AsyncEngine(llm) as engine:
        deltas = [delta async for delta in engine.add_request(MESSAGES, params)]
    return tuple(token for delta in deltas for output in delta.outputs for token in output.token_ids)


@pytest.mark.parametrize("way", ASKS)
def test_an_answer_ends_where_the_template_ends_it_although_the_configuration_names_another_end(
    chatml: Path, way: str
) -> None:
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={IM_END: 1e4})
    with opened(chatml) as llm:
        assert llm.config.eos_token_ids == (2,)
        assert ASKS[way](llm, forced) == (IM_END,)
        (text,) = llm.generate("Who?", forced)
        assert text.outputs[0].token_ids == (IM_END,) * 5  # the configuration's end, as in transformers
        assert llm.chat(MESSAGES, replace(forced, ignore_eos=True)).outputs[0].token_ids == ((IM_END,) * 5)


def test_a_checkpoint_without_a_template_is_asked_in_plain_text_and_that_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(make(tmp_path / "base", added=False)) as llm, caplog.at_level(logging.WARNING, "fastllama"):
        output = llm.chat(MESSAGES[1:], GREEDY)
        assert list(output.prompt_token_ids) == llm.encode("Who is Sam?")
        llm.chat(MESSAGES[1:], GREEDY)
    assert [record.getMessage() for record in caplog.records].count(llm.prompts._chat_format.description) == 1
    assert "no chat template" in caplog.text


@pytest.mark.parametrize(
    ("name", "choice", "beginning"),
    [
        ("some-chat", "auto", "[INST] <<SYS>>\nBe brief."),
        ("base", "llama2", "[INST] <<SYS>>\nBe brief."),
        ("base", "plain", "System: Be brief.\n\nUser: Who is Sam?\nAssistant:"),
        ("base", "own.jinja", "Be brief."),
    ],
)
def test_the_format_can_be_chosen(tmp_path: Path, name: str, choice: str, beginning: str) -> None:
    path = make(tmp_path / name, added=False)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    chosen = str(tmp_path / choice) if choice.endswith("jinja") else choice
    with opened(path, chat_format=chosen) as llm:
        ids = llm.encode(MESSAGES)
        assert llm.tokenizer is not None
        assert llm.tokenizer.decode(ids).startswith(beginning)


def test_an_answer_that_has_begun_goes_on(chatml: Path) -> None:
    begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": "Sam is"}]
    expected = AutoTokenizer.from_pretrained(chatml).apply_chat_template(
        begun, continue_final_message=True, return_dict=False
    )
    with opened(chatml) as llm:
        assert list(llm.chat(begun, GREEDY, continue_final_message=True).prompt_token_ids) == expected
        with pytest.raises(
            ValueError, match=r"^messages\[2\], the last, has role 'assistant'; legal: one that is answer"
        ):
            llm.chat(begun, GREEDY)
        with pytest.raises(
            ValueError, match=r"^messages\[1\], the last, has role 'user'; legal: 'assistant' with contin"
        ):
            llm.chat(MESSAGES, GREEDY, continue_final_message=True)
        with pytest.raises(TypeError, match=r"^continue_final_message must be True or False, got 'yes'$"):
            llm.chat(begun, GREEDY, continue_final_message="yes")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"it is 'continue_final_message' of LLM.chat\. Legal options"):
            llm.generate("Hi", continue_final_message=True)


@pytest.mark.parametrize("choice", ["lama2", "no/such.jinja"])
def test_a_format_that_there_is_not_is_refused_before_weights_are_read(
    chatml: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.load.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"^chat_format is "):
        opened(chatml, chat_format=choice)


@pytest.mark.parametrize("messages", ["Hello", 5, [], [{"role": "user"}], [{"role": "user", "content": "<|im_end|>"}]])
def test_what_is_no_conversation_is_refused(chatml: Path, messages: Any) -> None:
    with opened(chatml) as llm, pytest.raises((TypeError, ValueError), match=r"^messages"):
        llm.chat(messages)


STORY: list[Any] = [{"role": "user", "content": "Tell me a story"}]
ALL = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module", params=["llama2", "plain"])
def tiny(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """The bundled model, whose answers to STORY begin with a token that begins with a space."""
    with LLM("tiny", chat_format=request.param, kv_cache_tokens=2048, progress=False) as llm:
        yield llm


def test_an_answer_is_a_text_of_its_own_as_the_tokenizer_decodes_it(tiny: LLM) -> None:
    assert tiny.tokenizer is not None
    answer = tiny.chat(STORY, ALL).outputs[0]
    assert tiny.tokenizer.token_bytes(answer.token_ids[0]).startswith(b" ")
    assert answer.text == tiny.tokenizer.decode(answer.token_ids)
    assert not answer.text.startswith(" ")
    assert tiny.generate([STORY], ALL)[0].outputs[0].text == answer.text
    assert "".join(tiny.stream(STORY, ALL)) == answer.text
    ids = tiny.encode(STORY)
    assert tiny.generate([ids], ALL)[0].outputs[0].text == f" {answer.text}", "ids are a text that goes on"
    assert "".join(tiny.follow(tiny.start(ids, ALL, continues_text=False))) == answer.text
    assert "".join(tiny.follow(tiny.start(STORY, ALL, continues_text=True))) == f" {answer.text}"
    forked = tiny.fork(tiny.start(ids, ALL, continues_text=False))
    assert not forked.continues_text
    assert "".join(tiny.follow(forked)) == answer.text
    with pytest.raises(TypeError, match=r"^continues_text must be True or False, got 'no'$"):
        tiny.start(ids, ALL, continues_text="no")  # type: ignore[arg-type]


def test_a_stop_string_does_not_match_the_space_that_an_answer_is_without(tiny: LLM) -> None:
    word = tiny.chat(STORY, ALL).outputs[0].text.split()[0]
    stopped = tiny.chat(STORY, replace(ALL, stop=" ")).outputs[0]
    assert (stopped.text, stopped.stop_reason) == (word, " ")
    assert tiny.chat(STORY, replace(ALL, stop=f" {word}")).outputs[0].text != ""
    assert "".join(tiny.stream(STORY, replace(ALL, stop=" "))) == word
    (going_on,) = tiny.generate([tiny.encode(STORY)], replace(ALL, stop=" "))
    assert going_on.outputs[0].text == ""


def test_what_an_async_engine_answers_is_a_text_of_its_own_for_messages_or_where_it_is_asked(tiny: LLM) -> None:
    answer, ids = tiny.chat(STORY, ALL).outputs[0].text, tiny.encode(STORY)

    async def texts() -> list[str]:
        async with AsyncEngine(tiny) as engine:
            own = [engine.generate(STORY, ALL), engine.generate(ids, ALL, continues_text=False)]
            going_on = [engine.generate(ids, ALL), engine.generate(STORY, ALL, continues_text=True)]
            with pytest.raises(TypeError, match=r"^continues_text must be True or False, got 1$"):
                engine.add_request(ids, ALL, continues_text=1)  # type: ignore[arg-type]
            return [output.outputs[0].text for output in await asyncio.gather(*own, *going_on)]

    assert asyncio.run(texts()) == [answer, answer, f" {answer}", f" {answer}"]


@pytest.mark.parametrize(
    ("content", "space"), [("In a", " "), ("In a ", ""), ("In a\n", ""), ("In a \n ", ""), (" In a", " ")]
)
def test_an_answer_goes_on_with_a_space_unless_what_it_continues_ends_in_blanks_that_the_format_leaves_out(
    tiny: LLM, content: str, space: str
) -> None:
    asked = tiny.chat([*STORY, {"role": "assistant", "content": content}], ALL, continue_final_message=True)
    plain = tiny.generate([list(asked.prompt_token_ids)], ALL)[0].outputs[0].text
    assert plain.startswith(" ")
    assert asked.outputs[0].text == space + plain.removeprefix(" ")


@pytest.mark.parametrize("content", ["", " ", "\n"])
def test_an_answer_that_continues_nothing_is_a_text_of_its_own(tiny: LLM, content: str) -> None:
    output = tiny.chat([*STORY, {"role": "assistant", "content": content}], ALL, continue_final_message=True).outputs[0]
    assert tiny.tokenizer is not None
    assert output.text == tiny.tokenizer.decode(output.token_ids)
    assert not output.text.startswith(" ")


def test_blanks_that_a_template_keeps_are_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    begun: list[Any] = [*STORY, {"role": "assistant", "content": "In a "}]
    with LLM("tiny", chat_format=str(tmp_path / "own.jinja"), kv_cache_tokens=1024, progress=False) as llm:
        assert llm.tokenizer is not None
        script = [*llm.tokenizer.encode("tall", bos=False), llm.tokenizer.eos_token_id]
        params = SamplingParams(temperature=0, logits_processors=[scripting(script)])
        output = llm.chat(begun, params, continue_final_message=True)
        assert llm.tokenizer.decode(output.prompt_token_ids).endswith("In a ")
        assert output.outputs[0].text == " tall", "the model's own text"


@pytest.mark.parametrize("way", ["chat", "generate"])
def test_a_message_alone_in_plain_text_is_answered_beyond_a_line_that_begins_with_user(way: str) -> None:
    """The prompt is used as it stands: no format marks turns by that line."""
    with LLM("tiny", chat_format="plain", kv_cache_tokens=1024, progress=False) as llm:
        assert llm.tokenizer is not None
        script = [*llm.tokenizer.encode("\nUser: Bye", bos=False), llm.tokenizer.eos_token_id]
        params = SamplingParams(temperature=0, max_tokens=20, logits_processors=[scripting(script)])
        for messages, text in ((STORY, "\nUser: Bye"), ([{"role": "system", "content": "Be brief."}, *STORY], "")):
            output = llm.chat(messages, params) if way == "chat" else llm.generate([messages], params)[0]
            assert output.outputs[0].text == text


def scripting(script: Sequence[int]) -> Callable[[list[int], Tensor], Tensor]:
    """A logits processor under which exactly these tokens are sampled, one after another."""

    def forced(token_ids: list[int], logits: Tensor) -> Tensor:
        only = torch.full_like(logits, -math.inf)
        only[script[len(token_ids)]] = 0
        return only

    return forced
