"""Cascade attention: the keys and values of a shared prefix, such as a system prompt, are read once for the batch.

python examples/cascade.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fastllama.kernels import attention_decode, merge_state

ROWS = 64  # queries that share a read of a key head: with 256 the GPU kernel spills registers


def queries_together(batch: int, heads_per_key: int) -> int:
    """Sequences that share one read, a divisor of the batch: of 32, all with Llama-2-7B, 8 with the 70B."""
    return math.gcd(batch, max(ROWS // heads_per_key, 1))


def cascade(q: Tensor, k_pages: Tensor, v_pages: Tensor, prefix: Tensor, own: Tensor, own_lens: Tensor) -> Tensor:
    """Attention of q [B, Hq, D], the newest token of each sequence, over a shared prefix and over its own tokens.

    prefix: [n], ids of the shared pages, all full. own: [B, m], each sequence's own pages after the prefix; own_lens:
    [B], the tokens in them. For the prefix, the batch's queries are regrouped as the last tokens of a few sequences,
    without a causal mask: `attention_decode` splits the keys over the GPU (split-KV), `attention_prefill` has one
    program a head.
    """
    together = queries_together(q.shape[0], q.shape[1] // k_pages.shape[1])
    table = prefix.expand(q.shape[0] // together, -1)
    lengths = own_lens.new_full(table.shape[:1], prefix.numel() * k_pages.shape[2])
    shared, shared_lse = attention_decode(q, k_pages, v_pages, table, lengths, causal=False, return_lse=True)
    rest, rest_lse = attention_decode(q, k_pages, v_pages, own, own_lens, return_lse=True)
    return merge_state(shared, shared_lse, rest, rest_lse)[0]


def main() -> None:
    """Compare cascade with plain attention: 16 sequences that share a prefix of 1024 tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    batch, full, page = 16, 16, 64  # sequences, pages of the prefix, tokens of a page
    k_pages, v_pages = torch.randn(2, full + 2 * batch, 2, page, 64, dtype=dtype, device=device)
    q = torch.randn(batch, 8, 64, dtype=dtype, device=device)
    ids = torch.randperm(len(k_pages), dtype=torch.int32, device=device)
    prefix, own = ids[:full], ids[full:].view(batch, 2)
    own_lens = torch.randint(1, 2 * page + 1, (batch,), dtype=torch.int32, device=device)

    found = cascade(q, k_pages, v_pages, prefix, own, own_lens)
    whole = torch.cat((prefix.expand(batch, -1), own), dim=1)
    expected = attention_decode(q, k_pages, v_pages, whole, full * page + own_lens)
    difference, largest = (x.abs().max().item() for x in (found - expected, expected))
    print(f"largest difference {difference:.1e}, of values up to {largest:.2f}")
    own_tokens = int(own_lens.sum())
    read, plain = (times * full * page + own_tokens for times in (1, batch))
    print(f"keys and values of {read} tokens are read; by plain attention of {plain}")


if __name__ == "__main__":
    main()
