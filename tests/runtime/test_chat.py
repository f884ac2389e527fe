"""LLM.chat: the checkpoint's own chat format, where its answers end, and what is said where there is none."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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


def test_a_checkpoint_without_a_template_is_asked_in_plain_text_and_that_is_said_once(
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
