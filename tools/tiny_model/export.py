"""Writes the model folder that transformers and fastllama open: weights, configs, tokenizer. Replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from .config import TinyConfig

# Llama 2's chat format (meta-llama/llama, llama/generation.py) in Jinja, for transformers' apply_chat_template.
CHAT_TEMPLATE = (
    "{% set system = '' %}"
    "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}"
    "{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}"
    "{% else %}"
    "{{ ' ' + message.content | trim + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)


def model_config(config: TinyConfig) -> dict[str, object]:
    """config.json: the keys of a Llama checkpoint, without transformers' own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(config: TinyConfig) -> dict[str, object]:
    """tokenizer_config.json; `legacy` adds the dummy space to text after a BOS, as Meta's encode does."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model(folder: Path, config: TinyConfig, model: LlamaForCausalLM, tokenizer_model: bytes) -> None:
    """Writes weights (bf16, Hugging Face's names, tied head left out), configs and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable by its owner only
    write_json(folder / "config.json", model_config(config))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", tokenizer_config(config))
    (folder / "tokenizer.model").write_bytes(tokenizer_model)


def replace_folder(new: Path, target: Path) -> None:
    """Replaces the folder `target` by `new` in one step; readers see the old one or the new one, never a mixture."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)
