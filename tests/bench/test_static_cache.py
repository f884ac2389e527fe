"""transformers' StaticCache, driven as it is measured, gives the tokens of its `generate`."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from fastllama.bench import models, static_cache

TINY = models.shape("tiny", 64)


def test_the_tokens_are_those_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    torch.manual_seed(0)
    model = static_cache.load(TINY, torch.device("cpu"))
    assert (model.dtype, model.num_parameters()) == (torch.bfloat16, 5 * 786_944 + 256 + 2048 * 256)
    model.float()  # no ties
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    prompts = [[generator.randrange(3, 2048) for _ in range(40)] for _ in range(3)]
    monkeypatch.setattr(static_cache, "PREFILLED", 45)  # prompts in chunks of 15 tokens
    step = static_cache.decoder(model, model.forward, prompts, 64)
    found = torch.tensor([step() for _ in range(6)])
    ids = torch.tensor(prompts)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": 2048, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 41:]
    assert found.shape == (6, 3, 1)
    assert len(expected.unique()) > 6
    assert torch.equal(found[:, :, 0].T, expected)


def test_positions_are_passed_where_the_cache_does_not_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 wants each token's position, over the chunks of the prompts and the steps after them."""
    told: list[list[int]] = []

    class Model:
        device = torch.device("cpu")
        config = transformers.LlamaConfig(**TINY.to_hf())

        def forward(self, ids: torch.Tensor, *, cache_position: torch.Tensor, **options: Any) -> Any:
            assert isinstance(options["past_key_values"], transformers.StaticCache)
            told.append(cache_position.tolist())
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 2048))

        __call__ = forward

    monkeypatch.setattr(static_cache, "PREFILLED", 6)
    model = Model()
    step = static_cache.decoder(model, model.forward, [[5] * 7] * 2, 64)
    assert step() == step() == [[0], [0]]
    assert told == [[0, 1, 2], [3, 4, 5], [6], [7], [8]]
