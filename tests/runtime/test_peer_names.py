"""Hints for options of other programs: their names here, or what to do without, and never a misleading name."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from fastllama import LLM, AsyncEngine, SamplingParams
from fastllama.runtime import peer_names
from fastllama.runtime.peer_names import peer_hint

OF_LLM = [name for name in inspect.signature(LLM).parameters if name != "unknown"]
OF_PARAMS = [field.name for field in dataclasses.fields(SamplingParams)]
ORDER = "the order is fixed: penalties, processors, temperature, top_k, top_p, min_p (docs/use/parameters.md)"
WINDOW = "penalties look at all tokens, those of the prompt too for repetition_penalty"
BANS = "a callable in logits_processors bans tokens in some places, logit_bias in all"
LENGTH = "max_model_len bounds prompt and answer together, truncate_prompt_tokens shortens a prompt"
SETTINGS = "the checkpoint's generation_config.json gives LLM.default_params; a request has SamplingParams"
OF_GENERATE = [name for name in inspect.signature(LLM.generate).parameters if name not in ("self", "unknown")]
OF_CHAT = [name for name in inspect.signature(LLM.chat).parameters if name not in ("self", "unknown")]
CALLABLES = {
    "LLM": LLM,
    "SamplingParams": SamplingParams,
    "LLM.generate": LLM.generate,
    "LLM.chat": LLM.chat,
    "LLM.start": LLM.start,
    "AsyncEngine.add_request": AsyncEngine.add_request,
}


def legal_in(place: str) -> set[str]:
    names = OF_PARAMS if place == "SamplingParams" else inspect.signature(CALLABLES[place]).parameters
    return {name for name in names if name not in ("self", "unknown")}


@pytest.mark.parametrize("place", CALLABLES)
def test_every_name_that_is_hinted_at_exists_and_no_own_name_is_anothers(place: str) -> None:
    names, legal = peer_names._PLACES.get(place, {}), legal_in(place)
    assert set(names.values()) | set(peer_names._OURS.get(place, "").split()) <= legal
    assert set(names) & legal == set()
    assert set(peer_names._ABSENT) & (legal | set(names)) == set()


def test_no_word_has_two_sentences() -> None:
    words = " ".join(peer_names._SENTENCES.values()).split()
    assert len(words) == len(set(words)) > 100


@pytest.mark.parametrize(
    "name", [*OF_LLM, *OF_PARAMS, "add_special_tokens", "messages", "tags", "request_id", "deadline"]
)
def test_a_name_of_ours_in_a_wrong_place_is_hinted_at_its_owner(name: str) -> None:
    hint = peer_hint(name, ["zzz"])
    assert hint is not None
    for each in hint.removeprefix("it is ").removesuffix(".").split(" or "):
        own, place = each.split(" of ")
        assert own == repr(name)
        assert name in legal_in(place)


@pytest.mark.parametrize(
    ("word", "legal", "hint"),
    [
        ("gpu_memory_utilization", OF_LLM, "did you mean 'kv_cache_tokens'?"),
        ("tensor_parallel_size", OF_LLM, "fastllama runs on one device."),
        ("block_size", OF_LLM, "did you mean 'page_size'?"),
        ("attn_implementation", OF_LLM, "there is one attention, of kernels that FASTLLAMA_BACKEND chooses."),
        ("torch_dtype", OF_LLM, "did you mean 'dtype'?"),
        ("enforce_eager", OF_LLM, "decode steps are captured unless FASTLLAMA_GRAPHS=0."),
        ("swap_space", OF_LLM, "did you mean 'host_cache_tokens'?"),
        ("n_ctx", OF_LLM, "did you mean 'max_model_len'?"),
        ("max_length", OF_LLM, "did you mean 'max_model_len'?"),
        ("max_length", OF_PARAMS, "did you mean 'max_tokens'?"),
        ("max_new_tokens", OF_PARAMS, "did you mean 'max_tokens'?"),
        ("max_new_tokens", OF_LLM, "it is 'max_tokens' of SamplingParams."),
        ("max_tokens", OF_LLM, "it is 'max_tokens' of SamplingParams."),
        ("page_size", OF_PARAMS, "it is 'page_size' of LLM."),
        ("do_sample", OF_PARAMS, "temperature=0 takes the likeliest token, above 0 samples."),
        ("best_of", OF_PARAMS, "n samples are returned, and cumulative_logprob ranks them."),
        ("eos_token_id", OF_PARAMS, "did you mean 'stop_token_ids'?"),
        ("response_format", OF_PARAMS, "structured output is a callable in logits_processors."),
        ("sampling_params", ["prompts", "params"], "did you mean 'params'?"),
        ("prompt_token_ids", ["prompts", "params"], "pass the ids in place of the text, as the prompt."),
        ("temprature", OF_PARAMS, "did you mean 'temperature'?"),
        ("maxtokens", OF_PARAMS, "did you mean 'max_tokens'?"),
        ("kv_cache_token", OF_LLM, "did you mean 'kv_cache_tokens'?"),
        ("seed", OF_GENERATE, "it is 'seed' of LLM or 'seed' of SamplingParams."),
        ("max_length", OF_GENERATE, "it is 'max_model_len' of LLM or 'max_tokens' of SamplingParams."),
        ("temperature_last", OF_PARAMS, f"{ORDER}."),
        ("repetition_penalty_range", OF_PARAMS, f"{WINDOW}."),
        ("encoder_repetition_penalty", OF_PARAMS, f"{WINDOW}."),
        ("presence_context_penalty", OF_PARAMS, f"{WINDOW}."),
        ("temperature_first", OF_PARAMS, None),
        ("add_special_tokens", OF_PARAMS, "it is 'add_special_tokens' of LLM.generate."),
        ("add_special_tokens", OF_CHAT, "it is 'add_special_tokens' of LLM.generate."),
        ("messages", OF_GENERATE, "it is 'messages' of LLM.chat."),
        ("prompts", OF_CHAT, "it is 'prompts' of LLM.generate."),
        ("prompt", OF_CHAT, "it is 'prompts' of LLM.generate."),
        ("tags", OF_LLM, "it is 'tags' of LLM.chat."),
        ("request_id", OF_GENERATE, "it is 'request_id' of LLM.start."),
        ("sampling_params", OF_CHAT, "did you mean 'params'?"),
        ("generation_config", OF_LLM, f"{SETTINGS}."),
        ("generation_config", OF_GENERATE, f"{SETTINGS}."),
        ("max_time", OF_PARAMS, "it is 'deadline' of AsyncEngine.add_request."),
        ("stop_sequence", OF_PARAMS, "did you mean 'stop'?"),
        ("stop_words_list", OF_PARAMS, "did you mean 'stop'?"),
        ("bad_words_list", OF_PARAMS, "did you mean 'bad_words'?"),
        ("sampling_seed", OF_PARAMS, "did you mean 'seed'?"),
        ("prompt_lookup_num_tokens", OF_PARAMS, "it is 'num_draft_tokens' of LLM."),
        ("speculative_num_draft_tokens", OF_LLM, "did you mean 'num_draft_tokens'?"),
        ("ctx_size", OF_LLM, "did you mean 'max_model_len'?"),
        ("cache_type_k", OF_LLM, "did you mean 'kv_cache_dtype'?"),
        ("cache_type_v", OF_LLM, "did you mean 'kv_cache_dtype'?"),
        ("n_threads", OF_LLM, "threads are torch's: torch.set_num_threads, or OMP_NUM_THREADS."),
        ("rope_scaling", OF_LLM, "it is read from the checkpoint's config.json."),
        ("revision", OF_LLM, "a revision is part of the name of a model of the Hub: owner/name@revision."),
        ("xtc_threshold", OF_PARAMS, f"{peer_names._TRUNCATION}."),
        ("dry_base", OF_PARAMS, "n-grams are banned by a callable in logits_processors."),
        ("dry_multiplier", OF_PARAMS, "n-grams are banned by a callable in logits_processors."),
        ("verbose", OF_LLM, None),
        *((word, OF_PARAMS, f"{BANS}.") for word in ("begin_suppress_tokens", "prefix_allowed_tokens_fn")),
        *((word, OF_LLM, f"{LENGTH}.") for word in ("max_input_length", "max_input_tokens")),
        ("zzz", OF_PARAMS, None),
    ],
)
def test_a_hint_is_the_name_here_or_what_to_do_without(word: str, legal: list[str], hint: str | None) -> None:
    assert peer_hint(word, legal) == hint


def test_constructor_and_dict_give_the_hint_and_the_legal_options() -> None:
    hint = r"^SamplingParams got an unknown option 'max_new_tokens'; did you mean 'max_tokens'\? Legal options: n, max_"
    with pytest.raises(TypeError, match=hint):
        SamplingParams(max_new_tokens=5)
    with pytest.raises(TypeError, match=hint):
        SamplingParams.from_dict({"temperature": 0, "max_new_tokens": 5})
    with pytest.raises(TypeError, match=r"^SamplingParams got an unknown option 'zzz'; legal options: n, max_tokens, "):
        SamplingParams(zzz=5)
