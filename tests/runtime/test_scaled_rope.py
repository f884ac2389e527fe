"""Scaled rotary embeddings from a folder on: logits and tokens are transformers', near the start and far out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastllama import LLM, SamplingParams
from tests.io.checkpoints import random_llama

transformers.utils.logging.disable_progress_bar()

TRAINED = 64
FOLDERS: dict[str, dict[str, Any]] = {
    "linear, of a configured base": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn, of a configured base": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, of a configured end (Yarn-Llama-2-64k)": {
        "max_position_embeddings": 256,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": TRAINED,
            "finetuned": True,
        },
    },
    "yarn, DeepSeek's settings": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": TRAINED,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
}


@pytest.mark.parametrize("rope", FOLDERS.values(), ids=FOLDERS)
def test_logits_and_tokens_are_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = random_llama(max_position_embeddings=TRAINED, num_attention_heads=4, kv_heads=2)
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)  # attention that is sharp, so that positions count
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    file.write_text(json.dumps(config | rope))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in (5, 240)]
    params = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    with LLM(tmp_path, dtype="float32", kv_cache_tokens=1024, progress=False) as llm:
        assert llm.max_model_len == 4 * TRAINED
        results = llm.generate(prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=41, pad_token_id=0)
        assert list(result.outputs[0].token_ids) == out[0, len(prompt) :].tolist()
        expected = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert result.prompt_logprobs is not None
        found = torch.tensor([entry.logprob for entry in result.prompt_logprobs if entry is not None])
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-4)
