"""Matmul shapes of the presets, and of a toy model whose sizes all differ."""

from __future__ import annotations

import pytest

from fastllama.catalogue.sizes import LLAMA_2, TOY, LlamaSizes, config_of
from fastllama.layers.config import PRESETS


@pytest.mark.parametrize("name", [*PRESETS, "toy"])
def test_matmuls_are_those_of_the_configuration(name: str) -> None:
    sizes, config = LlamaSizes.of(name), config_of(name)
    assert sizes.qkv == (config.qkv_size, config.hidden_size)
    assert sizes.gate_up == (2 * config.intermediate_size, config.hidden_size)
    assert sizes.down == (config.hidden_size, config.intermediate_size)


def test_names() -> None:
    assert [sizes.short for sizes in LLAMA_2] == ["7B", "70B", "13B"]
    assert TOY.short == "TOY"
    with pytest.raises(ValueError, match="preset is 'llama'"):
        LlamaSizes.of("llama")
