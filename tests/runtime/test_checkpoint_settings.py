"""LLM reads sampling settings from a checkpoint's folder, and refuses a tokenizer that does not fit it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fastllama import LLM, SamplingParams
from fastllama.io.companions import read_sampling_settings
from tests.io import tokenizer_samples as samples
from tests.io.checkpoints import random_llama, write_meta

CHAT = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "max_length": 4096,
    "eos_token_id": 2,
}  # Llama-2-7b-chat-hf


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A small model with the bundled tokenizer, and the generation_config.json that is given."""

    def make(**settings: Any) -> Path:
        path = tmp_path / "model"
        random_llama(vocab_size=2048).save_pretrained(path)
        shutil.copyfile(samples.TINY, path / "tokenizer.model")
        (path / "generation_config.json").write_text(json.dumps(settings))
        return path

    return make


def opened(path: Path, **options: Any) -> LLM:
    return LLM(path, kv_cache_tokens=256, progress=False, **options)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        (CHAT, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": None, "temperature": 0.7, "top_k": None}, {"temperature": 0.7}),
        (
            {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 9}, {"temperature": 0.0, "max_tokens": 9}),
        ({"do_sample": 0, "top_k": 5}, {"temperature": 0.0}),
        ({"stop_strings": ["###"]}, {"stop": ["###"]}),
    ],
)
def test_sampling_settings_are_the_defaults(folder, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    path = folder(**settings)
    assert read_sampling_settings(path) == (path / "generation_config.json", expected)
    with opened(path) as llm:
        assert llm.sampling_defaults == expected
        assert llm.default_params == SamplingParams(**expected)


def test_settings_hold_where_a_request_brings_no_parameters_and_only_there(folder) -> None:
    with opened(folder(do_sample=False, max_new_tokens=5)) as llm:
        first, again = llm.generate("Once"), llm.generate("Once", SamplingParams(temperature=0, max_tokens=5))
        assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids
        assert len("".join(llm.stream("Once"))) == len(first[0].outputs[0].text)
        (own,) = llm.generate("Once", SamplingParams(max_tokens=7, ignore_eos=True))
        assert len(own.outputs[0].token_ids) == 7


def test_settings_are_logged(folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastllama"), opened(folder(**CHAT)):
        pass
    assert "generation_config.json: temperature=0.6, top_p=0.9, unless a request has its own" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "generation_config.json: temperature is -1; legal: at least 0; the setting is ignored"),
        ({"top_k": "many"}, "top_k must be an integer, got 'many' of type str; the setting is ignored"),
        ({"max_new_tokens": 0, "top_p": 0.5}, "max_tokens is 0; legal: at least 1; the setting is ignored"),
    ],
)
def test_an_illegal_setting_is_ignored_by_name(folder, settings, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with opened(folder(**settings)) as llm:
        assert llm.sampling_defaults == {name: value for name, value in settings.items() if name == "top_p"}
    assert words in caplog.text


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0}, "num_beams, no_repeat_ngram_size"),
        ({"suppress_tokens": [5], "bad_words_ids": [[7]], "temperature": 0.5}, "suppress_tokens, bad_words_ids"),
        ({"num_beams": 1, "suppress_tokens": [], "min_length": 0, "max_length": 20, "guidance_scale": None}, None),
    ],
)
def test_what_has_no_counterpart_here_is_named(
    folder, settings: dict[str, Any], names: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(**settings)
    read_sampling_settings(path)
    expected = [f"{path / 'generation_config.json'} sets {names}: no counterpart here, ignored"]
    assert caplog.messages == (expected if names else [])


def test_settings_of_config_json_count_where_there_is_no_generation_config(folder) -> None:
    path = folder()
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.3, "top_p": 0.5}))
    theirs = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert (theirs.temperature, theirs.top_p) == (0.3, 0.5)
    with opened(path) as llm:
        assert llm.sampling_defaults == {"temperature": 0.3, "top_p": 0.5}


def test_a_context_of_millions_costs_only_the_positions_that_are_used(folder) -> None:
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**31 - 1}))
    with opened(path, max_model_len=32) as llm:
        assert llm.engine._runner.cos_sin.shape[0] == 32


def test_a_tokenizer_with_more_ids_than_embeddings_serves_prompts_that_need_none_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model"
    random_llama(vocab_size=2000).save_pretrained(path)
    shutil.copyfile(samples.TINY, path / "tokenizer.model")
    with opened(path) as llm:
        assert "ids up to 2047, the model embeddings up to 1999" in caplog.text
        llm.generate("a", SamplingParams(max_tokens=2))
        with pytest.raises(ValueError, match=r"prompt token 1 is 20\d\d; legal: integers from 0 to 1999"):
            llm.generate([1, 2010])


def test_the_tokenizer_of_metas_download_lies_one_folder_up(tmp_path: Path) -> None:
    path = write_meta(random_llama(vocab_size=2048), tmp_path / "llama-2-7b")
    with opened(path) as llm:
        assert llm.tokenizer is None
    shutil.copyfile(samples.TINY, tmp_path / "tokenizer.model")
    with opened(path) as llm:
        assert llm.tokenizer is not None
        assert llm.tokenizer.path == tmp_path / "tokenizer.model"


def test_a_hugging_face_folder_takes_no_strangers_tokenizer(folder) -> None:
    path = folder()
    (path / "tokenizer.model").rename(path.parent / "tokenizer.model")
    with opened(path) as llm:
        assert llm.tokenizer is None
