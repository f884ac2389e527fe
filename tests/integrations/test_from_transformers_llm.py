"""LLM(transformers model) takes arguments, sampling settings, tokenizer and name as from a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import fastllama
from fastllama import LLM, SamplingParams
from fastllama.io.hub import resolve_model
from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.drafting.draft_model import DraftModel
from tests.integrations.models import IDS, VOCAB, llama
from tests.integrations.test_from_transformers import answers, endless, greedy, running
from tests.io import tokenizer_folders as folders

CHAT = [{"role": "user", "content": "Hello, who was there?"}]


def opened(name: str) -> Any:
    """transformers' tokenizer of a folder of a kind."""
    return AutoTokenizer.from_pretrained(folders.folder(name))


@pytest.fixture(scope="module")
def chatml() -> Any:
    return opened("smollm2")


def test_text_goes_in_and_out_by_transformers_own_tokenizer(chatml: Any) -> None:
    theirs = llama(vocab_size=len(chatml))
    prompts = ["once upon a time", "the cat 😀\n  saw 1999"]
    expected = [greedy(theirs, chatml(prompt)["input_ids"], eos_token_id=len(chatml)) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True, skip_special_tokens=False)
    ours = fastllama.from_transformers(theirs, chatml)
    assert isinstance(ours.tokenizer, Tokenizer)
    for llm in (running(ours), running(theirs, tokenizer=chatml), running(theirs, tokenizer=ours.tokenizer)):
        with llm:
            outputs = llm.generate(prompts, params)
            assert [[*output.outputs[0].token_ids] for output in outputs] == expected
            texts = [chatml.decode(tokens, clean_up_tokenization_spaces=False) for tokens in expected]
            assert [output.outputs[0].text for output in outputs] == texts


def test_chat_asks_as_apply_chat_template_does(chatml: Any) -> None:
    with running(fastllama.from_transformers(llama(vocab_size=len(chatml)), chatml)) as llm:
        asked = chatml.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        output = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=2))
        assert [*output.prompt_token_ids] == chatml(asked, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_of_transformers_beside_any_model(chatml: Any, tmp_path: Path) -> None:
    theirs = llama(vocab_size=len(chatml))
    theirs.save_pretrained(tmp_path)
    with running(tmp_path, tokenizer=chatml) as llm:
        assert llm.encode("once upon a time") == chatml("once upon a time")["input_ids"]
    with running(fastllama.load_model(tmp_path), tokenizer=chatml) as llm:
        assert llm.encode("once upon a time") == chatml("once upon a time")["input_ids"]


def test_a_tokenizer_that_is_given_counts_before_the_models(chatml: Any) -> None:
    llama3 = opened("llama3")
    ours = fastllama.from_transformers(llama(vocab_size=max(len(chatml), len(llama3))), chatml)
    text = "There was 1234567 once"
    assert llama3(text)["input_ids"] != chatml(text)["input_ids"]
    with running(ours, tokenizer=llama3) as llm:
        assert llm.encode(text) == llama3(text)["input_ids"]
    with running(ours) as llm:
        assert llm.encode(text) == chatml(text)["input_ids"]


def test_without_a_tokenizer_only_ids_go_in_and_out() -> None:
    theirs = llama()
    with running(theirs) as llm:
        assert llm.tokenizer is None
        assert answers(llm) == endless(theirs)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 40, "repetition_penalty": 1.1}, {"top_k": 40, "repetition_penalty": 1.1}),
        ({"do_sample": False, "max_new_tokens": 9}, {"max_tokens": 9}),
    ],
    ids=str,
)
def test_sampling_settings_are_those_of_the_saved_folder(
    settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    theirs = llama()
    theirs.generation_config = GenerationConfig(**settings)
    theirs.save_pretrained(tmp_path)
    with running(tmp_path) as of_folder, running(theirs) as of_model:
        assert of_model.sampling_defaults == of_folder.sampling_defaults
        assert of_model.sampling_defaults.items() >= expected.items()
        assert of_model.default_params == of_folder.default_params
        assert of_model.config.eos_token_ids == of_folder.config.eos_token_ids


def test_without_a_generation_config_the_configuration_counts(caplog: pytest.LogCaptureFixture) -> None:
    theirs = llama()
    theirs.generation_config = None
    theirs.config.temperature, theirs.config.num_beams = 0.25, 4
    with caplog.at_level(logging.WARNING), running(theirs) as llm:
        assert llm.sampling_defaults == {"temperature": 0.25}
        assert llm.config.eos_token_ids == (2,)
    assert "generation_config sets num_beams: no counterpart here" in caplog.text


def test_settings_that_are_illegal_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    ours = fastllama.from_transformers(llama())
    ours.sampling_settings, ours.name_or_path = {"top_p": 3.0, "top_k": 5}, "hub/name"
    with caplog.at_level(logging.WARNING), running(ours) as llm:
        assert llm.sampling_defaults == {"top_k": 5}
    assert "hub/name: top_p is 3.0" in caplog.text


def test_stop_strings_without_a_tokenizer_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = llama()
    theirs.generation_config = GenerationConfig(stop_strings=["end"], max_new_tokens=3)
    theirs.save_pretrained(tmp_path)
    for model in (theirs, fastllama.from_transformers(theirs), tmp_path):
        caplog.clear()
        with running(model) as llm:
            assert llm.sampling_defaults == {"max_tokens": 3}
            assert len(llm.generate([[5, 9]])[0].outputs[0].token_ids) == 3
        assert "stop is ['end'], which needs a tokenizer, and there is none; the setting is ignored" in caplog.text


def test_stop_strings_beside_a_tokenizer_count(chatml: Any, caplog: pytest.LogCaptureFixture) -> None:
    theirs = llama(vocab_size=len(chatml))
    theirs.generation_config = GenerationConfig(stop_strings=["end"])
    with running(theirs, tokenizer=chatml) as llm:
        assert llm.default_params.stop == ("end",)
    assert "is ignored" not in caplog.text


@pytest.mark.parametrize(("name", "piece"), [("bos_token", "</s>"), ("eos_token", "<unk>")])
def test_chat_asks_with_special_tokens_that_were_changed(name: str, piece: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    setattr(tokenizer, name, piece)
    talk = [*CHAT, {"role": "assistant", "content": "Yo"}, *CHAT]
    asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    with running(llama(vocab_size=len(tokenizer)), tokenizer=tokenizer) as llm:
        output = llm.chat(talk, SamplingParams(temperature=0, max_tokens=1))
    assert piece in asked
    assert [*output.prompt_token_ids] == tokenizer(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("quantization", ["int4", "int8", "w8a8"])
def test_quantizing_leaves_transformers_model_as_it_is(quantization: str, tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        before = theirs(IDS).logits
        with running(theirs, quantization=quantization) as llm, running(tmp_path, quantization=quantization) as folder:
            assert llm.quantization == quantization
            assert answers(llm) == answers(folder)
        assert torch.equal(theirs(IDS).logits, before)
    with running(theirs) as llm:
        assert llm.quantization is None
        assert answers(llm) == endless(theirs)


def test_a_model_of_transformers_drafts() -> None:
    theirs, draft = llama(), llama(num_hidden_layers=1)
    with running(theirs, speculation=draft, num_draft_tokens=2) as llm:
        assert answers(llm) == endless(theirs)
        assert llm.engine.num_drafts[0] > 0
        assert llm.engine.speculation is not None
        assert isinstance(llm.engine.speculation.drafter, DraftModel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' beside a loaded model, which has its own; legal: 'auto'"),
        ({"device": "cpu"}, "device is 'cpu' beside a loaded model, which has its own; legal: 'auto'"),
        ({"adapter": "somewhere"}, "adapter is 'somewhere' beside a loaded model"),
    ],
)
def test_what_a_loaded_model_has_is_not_given(options: dict[str, Any], message: str) -> None:
    theirs = llama()
    places = [parameter.data_ptr() for parameter in theirs.parameters()]
    with pytest.raises(ValueError, match=message):
        LLM(theirs, progress=False, **options)
    assert [parameter.data_ptr() for parameter in theirs.parameters()] == places


@pytest.mark.parametrize(("name", "words"), [("org/Llama-2-7b-chat", "Llama 2's"), ("org/Llama-2-7b", "plain text")])
def test_the_name_selects_the_chat_format_where_there_is_no_template(name: str, words: str) -> None:
    tokenizer = opened("llama2_json_of_its_own")
    theirs = llama(vocab_size=len(tokenizer))
    theirs.name_or_path = name
    with running(theirs, tokenizer=tokenizer) as llm:
        assert words in llm.chat_format.description


def test_a_name_is_no_path_to_a_model() -> None:
    """A model made from a configuration alone has an empty name."""
    theirs = llama()
    assert theirs.name_or_path == ""
    assert fastllama.from_transformers(theirs).name_or_path is None


def test_the_vocabularies_are_compared(caplog: pytest.LogCaptureFixture, chatml: Any) -> None:
    assert len(chatml) > VOCAB
    with caplog.at_level(logging.WARNING), running(llama(), tokenizer=chatml):
        pass
    assert f"the model embeddings up to {VOCAB - 1}" in caplog.text
