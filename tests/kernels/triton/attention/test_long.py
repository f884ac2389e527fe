"""attention_decode over 131072 tokens, in pages beyond the 65536th."""

from __future__ import annotations

import math

import pytest
import torch

from fastllama.kernels.launch import tuning
from fastllama.testing.monitor import CheckedRun
from tests.kernels.honest import public
from tests.kernels.ops.test_attention import assert_both_honest, packed, paged

LENGTH = 1 << 17  # tokens; each tile of keys takes the interpreter 4 ms
FAR = 1 << 16  # pages
HEAD_DIM = 8


@pytest.mark.interpreter
def test_every_split_of_a_long_context_counts(checked: CheckedRun) -> None:
    """Each token at an edge of the first and last splits weighs as much as all ordinary ones: none is lost or twice."""
    batch = packed([1, 1], [LENGTH, 1], "MQA", torch.float16, HEAD_DIM)
    split = tuning.decode(torch.device("cpu"), queries=5, head_dim=HEAD_DIM, itemsize=2).split
    edges = [0, split - 1, split, LENGTH - split - 1, LENGTH - split, LENGTH - 1]
    batch.q[..., 0], batch.k[..., 0] = 4.0, 0.0
    batch.k[edges] = 0.0
    batch.k[edges, :, 0] = math.log(LENGTH) * math.sqrt(HEAD_DIM) / 4.0
    near = paged(batch, 64)
    half = near.k_pages.shape[0] // 2
    pools = []
    for pages in (near.k_pages, near.v_pages):
        pool = torch.full((FAR + pages.shape[0], *pages.shape[1:]), math.nan, dtype=pages.dtype)
        pool[:half], pool[FAR + half :] = pages[:half], pages[half:]
        pools.append(pool)
    table = torch.where(near.page_table < half, near.page_table, near.page_table + FAR)
    found = public("attention_decode", "triton")(batch.q, *pools, table, near.seq_lens, return_lse=True)
    assert_both_honest(found, batch)
    assert checked.launches[0].grid[2] > LENGTH // split  # one split is past the last: it has no keys
