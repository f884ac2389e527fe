"""Equivalents here of options of vLLM, transformers, OpenAI's API and llama.cpp, for error hints."""

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
    "quantize": "quantization",
    "torchao_config": "quantization",
    "bnb_4bit_compute_dtype": "dtype",
    "quantization_config": "quantization",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "n_ctx": "max_model_len",
    "ctx_size": "max_model_len",
    "session_len": "max_model_len",
    "num_ctx": "max_model_len",
    "max_seq_len": "max_model_len",
    "max_length": "max_model_len",
    "context_length": "max_model_len",
    "max_position_embeddings": "max_model_len",
    "gpu_memory_utilization": "kv_cache_tokens",
    "kv_cache_memory_bytes": "kv_cache_tokens",
    "num_gpu_blocks_override": "kv_cache_tokens",
    "mem_fraction_static": "kv_cache_tokens",
    "free_gpu_memory_fraction": "kv_cache_tokens",
    "cuda_memory_fraction": "kv_cache_tokens",
    "cache_max_entry_count": "kv_cache_tokens",
    "max_total_tokens": "kv_cache_tokens",
    "swap_space": "host_cache_tokens",
    "kv_offloading_size": "host_cache_tokens",
    "cache_dtype": "kv_cache_dtype",
    "cache_type_k": "kv_cache_dtype",
    "cache_type_v": "kv_cache_dtype",
    "type_k": "kv_cache_dtype",
    "type_v": "kv_cache_dtype",
    "block_size": "page_size",
    "max_batch_size": "max_num_seqs",
    "max_running_requests": "max_num_seqs",
    "n_parallel": "max_num_seqs",
    "max_prefill_tokens": "max_num_batched_tokens",
    "max_batch_prefill_tokens": "max_num_batched_tokens",
    "chunked_prefill_size": "max_num_batched_tokens",
    "n_batch": "max_num_batched_tokens",
    "n_ubatch": "max_num_batched_tokens",
    "random_seed": "seed",
    "enable_deterministic_inference": "deterministic",
    "speculative_config": "speculation",
    "speculative_model": "speculation",
    "speculative_algorithm": "speculation",
    "speculative_draft_model_path": "speculation",
    "assistant_model": "speculation",
    "draft_model": "speculation",
    "num_speculative_tokens": "num_draft_tokens",
    "num_assistant_tokens": "num_draft_tokens",
    "prompt_lookup_num_tokens": "num_draft_tokens",
    "speculative_num_draft_tokens": "num_draft_tokens",
    "speculative_num_steps": "num_draft_tokens",
    "draft_max": "num_draft_tokens",
    "n_draft": "num_draft_tokens",
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
    "penalty_present": "presence_penalty",
    "penalty_freq": "frequency_penalty",
    "sequence_bias": "logit_bias",
    "suppress_tokens": "logit_bias",
    "allowed_tokens": "allowed_token_ids",
    "bad_words_ids": "bad_words",
    "bad_words_list": "bad_words",
    "logits_processor": "logits_processors",
    "random_seed": "seed",
    "sampling_seed": "seed",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "stop_words_list": "stop",
    "stopping_criteria": "stop",
    "eos_token_id": "stop_token_ids",
    "end_id": "stop_token_ids",
    "include_stop": "include_stop_str_in_output",
    "no_stop_trim": "include_stop_str_in_output",
    "top_logprobs": "logprobs",
    "n_probs": "logprobs",
    "return_logprob": "logprobs",
    "top_n_tokens": "logprobs",
    "output_scores": "logprobs",
    "decoder_input_details": "prompt_logprobs",
    "truncate": "truncate_prompt_tokens",
    "truncation": "truncate_prompt_tokens",
}
_GENERATE = {
    "sampling_params": "params",
    "gen_config": "params",
    "prompt": "prompts",
    "inputs": "prompts",
    "input_ids": "prompts",
    "text": "prompts",
}
_CHAT = {"conversation": "messages", "sampling_params": "params"}
_ADD_REQUEST = {"max_time": "deadline", "timeout": "deadline"}
_PLACES = {
    "LLM": _LLM,
    "SamplingParams": _SAMPLING_PARAMS,
    "LLM.generate": _GENERATE,
    "LLM.chat": _CHAT,
    "LLM.start": {},
    "AsyncEngine.add_request": _ADD_REQUEST,
}
# Our names that no other program uses for an option, so that they are in none of those tables.
_OURS = {
    "LLM": "host_cache_tokens max_num_batched_tokens deterministic tokenizer",
    "SamplingParams": "top_k top_p min_p ignore_eos skip_special_tokens",
    "LLM.generate": "add_special_tokens",
    "LLM.chat": "tags continue_final_message",
    "LLM.start": "request_id continues_text",
}

_BEAMS = "there is no beam search: fastllama.patch a model of transformers, whose generate has it"
_ONE_DEVICE = "fastllama runs on one device"
_STRUCTURE = "structured output is a callable in logits_processors"
_ATTENTION = "there is one attention, of kernels that FASTLLAMA_BACKEND chooses"
_TRUNCATION = "top_k, top_p and min_p cut the distribution; other ways are callables in logits_processors"
_PREFIXES = "the prefix cache is always on"
_GRAPHS = "decode steps are captured unless FASTLLAMA_GRAPHS=0"
_SENTENCES = {
    _ONE_DEVICE: (
        "tensor_parallel_size pipeline_parallel_size data_parallel_size tp_size distributed_executor_backend "
        "tp dp_size num_shard sharded tensor_split main_gpu split_mode max_memory enable_expert_parallel"
    ),
    "all weights are on one device; quantization makes them smaller": "cpu_offload_gb",
    _ATTENTION: "attn_implementation attention_backend flash_attn use_flash_attention_2 offload_kqv",
    "keys and values are always cached": "use_cache",
    _GRAPHS: (
        "enforce_eager max_seq_len_to_capture cuda_graph_sizes compilation_config disable_cuda_graph "
        "cuda_graph_max_bs enable_torch_compile"
    ),
    _PREFIXES: "enable_prefix_caching disable_radix_cache cache_prompt",
    "long prompts are always computed in chunks of max_num_batched_tokens": "enable_chunked_prefill",
    "no code from a checkpoint is ever run": "trust_remote_code",
    "an adapter is merged into the weights by LLM(adapter=...)": (
        "enable_lora lora_request adapter_id max_loras max_lora_rank lora"
    ),
    'the logger "fastllama" reports what is chosen': "disable_log_stats",
    "temperature=0 takes the likeliest token, above 0 samples": "do_sample",
    "texts are decoded whenever there is a tokenizer": "detokenize",
    "special tokens are shown without spaces between, or not: skip_special_tokens": "spaces_between_special_tokens",
    "pass the ids in place of the text, as the prompt": "prompt_token_ids",
    "n samples are returned, and cumulative_logprob ranks them": "best_of",
    _BEAMS: (
        "use_beam_search num_beams beam_width length_penalty early_stopping num_beam_groups diversity_penalty "
        "max_beam_width constraints force_words_ids beam_search_diversity_rate"
    ),
    _STRUCTURE: (
        "response_format structured_outputs guided_decoding guided_json guided_regex guided_choice "
        "guided_grammar grammar json_schema regex ebnf guided_whitespace_pattern grammar_file choice "
        "json_object structured_outputs_config guided_decoding_backend"
    ),
    _TRUNCATION: (
        "top_n_sigma top_a top_h typical_p tfs_z epsilon_cutoff eta_cutoff xtc_probability mirostat "
        "mirostat_tau mirostat_eta typical top_nsigma tfs xtc_threshold mirostat_lr mirostat_ent min_keep "
        "penalty_alpha top_p_decay top_p_min"
    ),
    "n-grams are banned by a callable in logits_processors": (
        "no_repeat_ngram_size dry_multiplier dry_base dry_allowed_length dry_sequence_breakers "
        "dry_penalty_last_n encoder_no_repeat_ngram_size"
    ),
    "requests are served in the order of their arrival": "priority",
    "LLM.stream yields a text in pieces, AsyncEngine.add_request the deltas of many requests": (
        "stream streamer stream_options streaming_callback output_kind"
    ),
    "RequestOutput.prompt is the prompt, and outputs[i].text what follows it": "echo return_full_text",
    "temperature is one number for a whole answer; another is a callable in logits_processors": (
        "dynatemp_range dynatemp_exponent"
    ),
    "the order is fixed: penalties, processors, temperature, top_k, top_p, min_p (docs/use/parameters.md)": (
        "temperature_last samplers sampler_order sampler_seq"
    ),
    "penalties look at all tokens, those of the prompt too for repetition_penalty": (
        "repetition_penalty_range repeat_last_n penalty_last_n last_n_tokens_size encoder_repetition_penalty "
        "presence_context_penalty penalize_nl"
    ),
    "a callable in logits_processors bans tokens in some places, logit_bias in all": (
        "begin_suppress_tokens forced_bos_token_id forced_eos_token_id prefix_allowed_tokens_fn "
        "exponential_decay_length_penalty"
    ),
    "there is no classifier-free guidance but by a callable in logits_processors": "guidance_scale negative_prompt_ids",
    "max_model_len bounds prompt and answer together, truncate_prompt_tokens shortens a prompt": (
        "max_input_length max_input_tokens"
    ),
    "threads are torch's: torch.set_num_threads, or OMP_NUM_THREADS": "n_threads n_threads_batch num_threads",
    "it is read from the checkpoint's config.json": (
        "rope_scaling rope_theta rope_freq_base rope_freq_scale hf_overrides sliding_window"
    ),
    "a revision is part of the name of a model of the Hub: owner/name@revision": (
        "revision code_revision tokenizer_revision"
    ),
    "Hub files are stored in the folder that HF_HOME names": "download_dir cache_dir",
    "HF_HUB_OFFLINE=1 disables downloads from the Hub": "local_files_only",
    "HF_TOKEN, or the Hub's own login, is used": "hf_token use_auth_token",
    "the format of a checkpoint is detected from its files": "load_format use_safetensors config_format",
    "the checkpoint's generation_config.json gives LLM.default_params; a request has SamplingParams": (
        "generation_config override_generation_config use_model_defaults"
    ),
    "prompts are not padded: pass the ids alone": "attention_mask pad_token_id padding",
    "text from a chat template with more goes to LLM.generate with add_special_tokens=False": (
        "add_generation_prompt chat_template_kwargs tools tool_choice"
    ),
    "stop takes strings, without patterns": "stop_regex",
}
_ABSENT = {word: sentence for sentence, words in _SENTENCES.items() for word in words.split()}


def names_here(word: str) -> list[str]:
    """Returns our names for another program's option, one for each API that has it."""
    return [names[word] for names in _PLACES.values() if word in names]


def instead(word: str) -> str | None:
    """Returns a sentence about another program's option that has no counterpart here; None for other words."""
    return _ABSENT.get(word)


def peer_hint(word: str, legal: Collection[str]) -> str | None:
    """Returns a hint for an unknown option where `legal` are known, as used by `errors.reject_unknown`.

    The hint is our name of another program's option, a sentence if there is none, the API that has the option, or the
    most similar legal name.
    """
    for ours in names_here(word):
        if ours in legal:
            return f"did you mean {ours!r}?"
    if sentence := instead(word):
        return f"{sentence}."
    owners = []
    for place, names in _PLACES.items():
        if word in names or word in names.values() or word in _OURS.get(place, "").split():
            owners.append(f"{names.get(word, word)!r} of {place}")
    if owners:
        return f"it is {' or '.join(owners)}."
    return similar(word, legal)
