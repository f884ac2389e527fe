"""What options of vLLM, transformers, OpenAI's API and llama.cpp are called here; what to do where there is none."""

from __future__ import annotations

from collections.abc import Collection

from fastllama.errors import similar

_LLM = {
    "model_path": "model",
    "model_id": "model",
    "model_name": "model",
    "pretrained_model_name_or_path": "model",
    "tokenizer_path": "tokenizer",
    "lora_path": "adapter",
    "lora_modules": "adapter",
    "peft_model": "adapter",
    "chat_template": "chat_format",
    "torch_dtype": "dtype",
    "compute_dtype": "dtype",
    "device_map": "device",
    "n_gpu_layers": "device",
    "quantization_config": "quantization",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "n_ctx": "max_model_len",
    "num_ctx": "max_model_len",
    "max_seq_len": "max_model_len",
    "max_length": "max_model_len",
    "context_length": "max_model_len",
    "max_position_embeddings": "max_model_len",
    "gpu_memory_utilization": "kv_cache_tokens",
    "kv_cache_memory_bytes": "kv_cache_tokens",
    "num_gpu_blocks_override": "kv_cache_tokens",
    "mem_fraction_static": "kv_cache_tokens",
    "max_total_tokens": "kv_cache_tokens",
    "swap_space": "host_cache_tokens",
    "kv_offloading_size": "host_cache_tokens",
    "cache_dtype": "kv_cache_dtype",
    "type_k": "kv_cache_dtype",
    "type_v": "kv_cache_dtype",
    "block_size": "page_size",
    "max_batch_size": "max_num_seqs",
    "max_running_requests": "max_num_seqs",
    "n_parallel": "max_num_seqs",
    "max_prefill_tokens": "max_num_batched_tokens",
    "n_batch": "max_num_batched_tokens",
    "random_seed": "seed",
    "enable_deterministic_inference": "deterministic",
    "speculative_config": "speculation",
    "speculative_model": "speculation",
    "assistant_model": "speculation",
    "draft_model": "speculation",
    "num_speculative_tokens": "num_draft_tokens",
    "num_assistant_tokens": "num_draft_tokens",
    "use_tqdm": "progress",
}
_SAMPLING_PARAMS = {
    "num_return_sequences": "n",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_gen_len": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "penalty_repeat": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "sequence_bias": "logit_bias",
    "suppress_tokens": "logit_bias",
    "allowed_tokens": "allowed_token_ids",
    "bad_words_ids": "bad_words",
    "logits_processor": "logits_processors",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "stopping_criteria": "stop",
    "eos_token_id": "stop_token_ids",
    "include_stop": "include_stop_str_in_output",
    "top_logprobs": "logprobs",
    "n_probs": "logprobs",
    "output_scores": "logprobs",
    "truncation": "truncate_prompt_tokens",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}
_CALLS = {
    "sampling_params": "params",
    "generation_config": "params",
    "prompt": "prompts",
    "inputs": "prompts",
    "input_ids": "prompts",
    "conversation": "messages",
}
_PLACES = {"LLM": _LLM, "SamplingParams": _SAMPLING_PARAMS, "generate, chat and stream": _CALLS}

_BEAMS = "there is no beam search: fastllama.patch a model of transformers, whose generate has it"
_ONE_DEVICE = "fastllama runs on one device"
_STRUCTURE = "structured output is a callable in logits_processors"
_ATTENTION = "there is one attention, of kernels that FASTLLAMA_BACKEND chooses"
_TRUNCATION = "top_k, top_p and min_p cut the distribution; other ways are callables in logits_processors"
_PREFIXES = "the prefix cache is always on"
_GRAPHS = "decode steps are captured unless FASTLLAMA_GRAPHS=0"
_ABSENT = {
    "tensor_parallel_size": _ONE_DEVICE,
    "pipeline_parallel_size": _ONE_DEVICE,
    "data_parallel_size": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "distributed_executor_backend": _ONE_DEVICE,
    "cpu_offload_gb": "weights lie on one device as a whole; quantization makes them smaller",
    "attn_implementation": _ATTENTION,
    "attention_backend": _ATTENTION,
    "flash_attn": _ATTENTION,
    "use_cache": "keys and values are always cached",
    "enforce_eager": _GRAPHS,
    "max_seq_len_to_capture": _GRAPHS,
    "cuda_graph_sizes": _GRAPHS,
    "compilation_config": _GRAPHS,
    "disable_cuda_graph": _GRAPHS,
    "enable_prefix_caching": _PREFIXES,
    "disable_radix_cache": _PREFIXES,
    "cache_prompt": _PREFIXES,
    "enable_chunked_prefill": "long prompts are always read in chunks of max_num_batched_tokens",
    "trust_remote_code": "no code of a checkpoint is ever run",
    "enable_lora": "an adapter is merged into the weights by LLM(adapter=...)",
    "disable_log_stats": 'the logger "fastllama" says what is chosen',
    "do_sample": "temperature=0 takes the likeliest token, above 0 samples",
    "detokenize": "texts are made wherever there is a tokenizer",
    "spaces_between_special_tokens": "special tokens are shown without spaces between, or not: skip_special_tokens",
    "prompt_token_ids": "pass the ids in place of the text, as the prompt",
    "best_of": "n samples are returned, and cumulative_logprob ranks them",
    "use_beam_search": _BEAMS,
    "num_beams": _BEAMS,
    "beam_width": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "response_format": _STRUCTURE,
    "structured_outputs": _STRUCTURE,
    "guided_decoding": _STRUCTURE,
    "guided_json": _STRUCTURE,
    "guided_regex": _STRUCTURE,
    "guided_choice": _STRUCTURE,
    "guided_grammar": _STRUCTURE,
    "grammar": _STRUCTURE,
    "json_schema": _STRUCTURE,
    "regex": _STRUCTURE,
    "ebnf": _STRUCTURE,
    "top_n_sigma": _TRUNCATION,
    "top_a": _TRUNCATION,
    "top_h": _TRUNCATION,
    "typical_p": _TRUNCATION,
    "tfs_z": _TRUNCATION,
    "epsilon_cutoff": _TRUNCATION,
    "eta_cutoff": _TRUNCATION,
    "xtc_probability": _TRUNCATION,
    "mirostat": _TRUNCATION,
    "mirostat_tau": _TRUNCATION,
    "mirostat_eta": _TRUNCATION,
    "no_repeat_ngram_size": "n-grams are banned by a callable in logits_processors",
    "dry_multiplier": "n-grams are banned by a callable in logits_processors",
    "priority": "requests are served in the order of their arrival",
    "stream": "LLM.stream yields a text in pieces, AsyncEngine.add_request the deltas of many requests",
    "streamer": "LLM.stream yields a text in pieces, AsyncEngine.add_request the deltas of many requests",
    "echo": "RequestOutput.prompt is the prompt, and outputs[i].text what follows it",
    "lora_request": "an adapter is merged into the weights by LLM(adapter=...)",
}


def names_here(word: str) -> list[str]:
    """What an option of another program is called here, once for each place that has it."""
    return [names[word] for names in _PLACES.values() if word in names]


def instead(word: str) -> str | None:
    """A sentence about an option of another program that has no counterpart here; None for any other word."""
    return _ABSENT.get(word)


def peer_hint(word: str, legal: Collection[str]) -> str | None:
    """What to say about an unknown option where `legal` are known, as `errors.reject_unknown` asks for it.

    The name that another program's option has here, a sentence where it has none, or the most similar legal name; at
    last whose option it is, if it is one in another place.
    """
    for ours in names_here(word):
        if ours in legal:
            return f"did you mean {ours!r}?"
    if sentence := instead(word):
        return f"{sentence}."
    if question := similar(word, legal):
        return question
    for place, names in _PLACES.items():
        if word in names or word in names.values():
            return f"it is {names.get(word, word)!r} of {place}."
    return None
