"""Paged caches: each token at its slot, and NaN in unused slots."""

from __future__ import annotations

import pytest
import torch

from fastllama.catalogue.attention import attention_decode, paged
from fastllama.catalogue.maker import Maker

LENGTHS = (6, 3, 0, 15)


@pytest.mark.parametrize("pages_dtype", [None, torch.int8])
def test_slots_of_tokens_alone_hold_values(pages_dtype: torch.dtype | None) -> None:
    call = paged(Maker(torch.float32), LENGTHS, 2, 8, page=7, pages=9, pages_dtype=pages_dtype)
    held = torch.zeros(9, 7, dtype=torch.bool)
    for row, length in zip(call["page_table"].tolist(), LENGTHS, strict=True):
        for token in range(length):
            held[row[token // 7], token % 7] = True
    assert held.sum() == sum(LENGTHS)
    for side in "kv":
        values = call[f"{side}_pages"] if pages_dtype is None else call[f"{side}_scales"][..., None]
        assert torch.equal(~values.isnan().any(-1), held[:, None].expand(9, 2, 7))
    assert call["seq_lens"].tolist() == list(LENGTHS)
    assert call["page_table"].shape == (4, 3)


def test_pages_of_a_sequence_lie_anywhere() -> None:
    tables = [paged(Maker(torch.float32), LENGTHS, 2, 8, page=1)["page_table"] for _ in range(2)]
    assert not torch.equal(*tables)
    for table in tables:
        used = [page for row, length in zip(table.tolist(), LENGTHS, strict=True) for page in row[:length]]
        assert sorted(used) == list(range(sum(LENGTHS)))


def test_several_queries_of_a_sequence_are_its_last_tokens() -> None:
    call = attention_decode(Maker(torch.float32), LENGTHS, 6, 2, 8, queries=3)
    assert call["q"].shape == (12, 6, 8)
    assert call["scale"] == pytest.approx(8**-0.5)
