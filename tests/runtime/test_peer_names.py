"""What is said about options of other programs: their names here, or what to do without; never a name that misleads."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from fastllama import LLM, SamplingParams
from fastllama.runtime import peer_names
from fastllama.runtime.peer_names import peer_hint

OF_LLM = [name for name in inspect.signature(LLM).parameters if name != "unknown"]
OF_PARAMS = [field.name for field in dataclasses.fields(SamplingParams)]
OF_CALLS = {
    name
    for call in (LLM.generate, LLM.chat, LLM.stream, LLM.start)
    for name in inspect.signature(call).parameters
    if name not in ("self", "unknown")
}


@pytest.mark.parametrize(
    ("names", "legal"),
    [
        (peer_names._LLM, set(OF_LLM)),
        (peer_names._SAMPLING_PARAMS, set(OF_PARAMS)),
        (peer_names._CALLS, OF_CALLS),
    ],
    ids=["LLM", "SamplingParams", "calls"],
)
def test_every_name_that_is_hinted_at_exists_and_no_own_name_is_anothers(
    names: dict[str, str], legal: set[str]
) -> None:
    assert set(names.values()) <= legal
    alike = {"prompt"}  # of LLM.stream, where LLM.generate has prompts
    assert {theirs for theirs, ours in names.items() if theirs in legal - alike and theirs != ours} == set()
    assert set(peer_names._ABSENT) & (legal | set(names)) == set()


@pytest.mark.parametrize(
    ("word", "legal", "said"),
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
        ("verbose", OF_LLM, None),
        ("zzz", OF_PARAMS, None),
    ],
)
def test_a_hint_is_the_name_here_or_what_to_do_without(word: str, legal: list[str], said: str | None) -> None:
    assert peer_hint(word, legal) == said


def test_constructor_and_dict_give_the_hint_and_the_legal_options() -> None:
    said = r"^SamplingParams got an unknown option 'max_new_tokens'; did you mean 'max_tokens'\? Legal options: n, max_"
    with pytest.raises(TypeError, match=said):
        SamplingParams(max_new_tokens=5)
    with pytest.raises(TypeError, match=said):
        SamplingParams.from_dict({"temperature": 0, "max_new_tokens": 5})
    with pytest.raises(TypeError, match=r"^SamplingParams got an unknown option 'zzz'; legal options: n, max_tokens, "):
        SamplingParams(zzz=5)
