"""How much memory there is, and what a runtime of that size takes on at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllama.arithmetic import ceil_div
from fastllama.layers.batch import KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device import adjustments
from fastllama.runtime.options import EngineOptions

logger = logging.getLogger("fastllama")

KV_SHARE = {"cpu": 0.25, "cuda": 0.85}  # of the free memory; on a CPU the rest of the system needs some too
STEP_SHARE = 1 / 32  # of the free memory, for a step's activations, and as much for its logits

# A step's tokens. From 300 on an H100 computes longer than it reads weights (989 TFLOP/s over 3.35 TB/s, 16 bits), so
# fewer than 512 waste it. More only spread the step's fixed cost, and each running answer waits for the whole step:
# 8192 of a 7B are 110 TFLOP, 0.2 s there at 60 %; two cores of a CPU take 40 s for 2048 of a 1.1B.
LEAST_TOKENS = 512
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}

# Sequences. Decoding reads the weights once for all of them, which pays up to the same 300, on a CPU far less. Each is
# expected to reach a quarter of its limit, and no more than a quarter of Llama 2's 4096; where they grow longer, the
# newest is preempted and recomputed. The least is what a request may ask for samples of one prompt, which share it.
LEAST_SEQS = 16
MOST_SEQS = {"cpu": 64, "cuda": 256}
EXPECTED_TOKENS = 1024


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (on a CPU: without swapping, as far as the system tells).

    On a GPU what torch keeps of freed memory is given back first, after a quantisation as much as the weights were.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min([_system_bytes(), *container_bytes()])


def _system_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def container_bytes(root: Path = Path("/")) -> Iterator[int]:
    """What each Linux control group around this process, and so its container, still allows; nothing where none limits.

    root: where proc and sys lie. A file cache that nobody uses counts as free, as in MemAvailable.
    Source: Linux kernel documentation, admin-guide: cgroup-v1/memory and cgroup-v2.
    """
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            mount, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file "
        else:
            continue
        # A container sees its own group as the mount's root, whatever path the host gave it.
        for group in (Path(path), *Path(path).parents):
            folder = root / mount / group.relative_to("/")
            with suppress(OSError, ValueError):  # no such file, or "max"
                allowed = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
                yield allowed + sum(int(line.split()[1]) for line in stat if line.startswith(cache))


@dataclass(frozen=True)
class Sizes:
    """What a runtime holds and computes at once: tokens but for max_num_seqs; kv_cache_tokens are whole pages."""

    max_model_len: int
    kv_cache_tokens: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def __str__(self) -> str:
        return (
            f"max_model_len {self.max_model_len}, KV cache {self.kv_cache_tokens} tokens "
            f"({self.kv_cache_bytes / 1e9:.2f} GB), max_num_seqs {self.max_num_seqs}, "
            f"max_num_batched_tokens {self.max_num_batched_tokens}"
        )


def refusal(name: str, value: int, size: int, fits: int, most: int | None = None) -> ValueError:
    """The error for an option whose value takes `size` bytes where `fits` are free. most: the largest that fits."""
    at_most = "" if most is None else f"at most {most}, "
    return ValueError(
        f"{name} is {value}, which takes {_gigabytes(size)}; legal here: {at_most}what fits into {_gigabytes(fits)}"
    )


def _gigabytes(size: int) -> str:
    """To two digits, and of any integer: a float ends at 1e308."""
    return f"{size // 10**9}.{size // 10**7 % 100:02d} GB"


def _check(name: str, value: int | None, of_each: int, fits: int) -> None:
    """Raise ValueError if an option is given of which each takes so many bytes, and all more than what fits."""
    fits = max(fits, 0)
    if value is not None and value * of_each > fits:
        raise refusal(name, value, value * of_each, fits, fits // of_each)


def sizes(
    config: LlamaConfig,
    *,
    device: str,
    available: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page_size: int,
    more_per_token: int = 0,
    num_draft_tokens: int = 0,
    max_model_len: int | None = None,
    kv_cache_tokens: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> Sizes:
    """The sizes that are given, and for those that are None what suits the model and the memory.

    device: "cpu" or "cuda". available: bytes that are free beside the weights. dtype: of activations. kv_dtype: of
    pages. more_per_token: bytes that a draft model keeps of each token. num_draft_tokens: that are verified for each
    sequence in a step, or 0. The KV cache gets a share of what the largest step leaves, but no more than all sequences
    can fill.
    Raises ValueError where a sequence of max_model_len could never fit, and for what is given and takes more memory
    than there is.
    """
    of_token = (2 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize  # gate, up and their product
    # Logits of a sequence, a copy where samples share them, and what is sampled from: of its last token and of drafts
    # behind it. And its rows in the tables of adjustments.
    of_row = config.vocab_size * (2 * dtype.itemsize + torch.float32.itemsize)
    of_seq = of_row * (1 + num_draft_tokens) + config.vocab_size * adjustments.BYTES
    share = int(available * STEP_SHARE)
    tokens = max_num_batched_tokens
    if tokens is None:
        fits = max(share // of_token, LEAST_TOKENS)
        tokens = max(min(1 << fits.bit_length() - 1, MOST_TOKENS[device]), max_num_seqs or 1)
    seqs = max_num_seqs
    if seqs is None:
        seqs = min(max(share // of_seq, LEAST_SEQS), MOST_SEQS[device], tokens)

    length = config.context_length if max_model_len is None else max_model_len
    of_kv = KVCache.bytes_per_token(config, kv_dtype) + more_per_token
    left = max(available - tokens * of_token - seqs * of_seq, 0)
    _check("max_num_seqs", max_num_seqs, of_seq + of_token, available)  # in each step, each has a token at least
    _check("max_num_batched_tokens", max_num_batched_tokens, of_token, available - seqs * of_seq)
    _check("kv_cache_tokens", kv_cache_tokens, of_kv, left)
    held = kv_cache_tokens
    if held is None:
        held = max(int(left * KV_SHARE[device] / of_kv) // page_size, 1) * page_size
    if max_num_seqs is None:
        seqs = min(seqs, max(held // max(min(length // 4, EXPECTED_TOKENS), page_size), LEAST_SEQS))
    if kv_cache_tokens is None:
        held = min(held, ceil_div(length, page_size) * page_size * seqs)
    if held < length:
        if max_model_len is not None:
            raise ValueError(
                f"max_model_len is {max_model_len} and the KV cache holds {held} tokens; legal: at most kv_cache_tokens"
            )
        length = held
    held = ceil_div(held, page_size) * page_size
    return Sizes(length, held, held * of_kv, seqs, tokens)


def choose(
    model: LlamaForCausalLM,
    options: EngineOptions,
    kv_dtype: torch.dtype,
    more_per_token: int,
    num_draft_tokens: int = 0,
) -> Sizes:
    """The sizes of a runtime for a model, by what is free now, as the log then says. See `sizes`.

    Raises ValueError before anything is allocated, for host_cache_tokens too.
    """
    available = available_bytes(model.device)
    chosen = sizes(
        model.config,
        device=model.device.type,
        available=available,
        dtype=model.dtype,
        kv_dtype=kv_dtype,
        page_size=options.page_size,
        more_per_token=more_per_token,
        num_draft_tokens=num_draft_tokens,
        max_model_len=options.max_model_len,
        kv_cache_tokens=options.kv_cache_tokens,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    wanted = host_bytes(model.config, options.host_cache_tokens, options.page_size, kv_dtype, model.device)
    fits = available - chosen.kv_cache_bytes if model.device.type == "cpu" else available_bytes(torch.device("cpu"))
    if wanted > max(fits, 0):
        raise refusal("host_cache_tokens", options.host_cache_tokens, wanted, max(fits, 0))
    logger.info("%s", chosen)
    held, limit = chosen.max_model_len, model.config.context_length
    if options.max_model_len is None and held < limit:
        logger.warning("max_model_len is %d, not the model's %d: the KV cache holds no more", held, limit)
    return chosen


def host_bytes(config: LlamaConfig, num_tokens: int, page_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Host memory that pages for so many tokens take beside a model on a device: pinned where that is a GPU."""
    num_tokens = ceil_div(num_tokens, page_size) * page_size
    if device.type == "cuda" and num_tokens:
        return KVCache.pinned_bytes(config, num_tokens, dtype)
    return num_tokens * KVCache.bytes_per_token(config, dtype)
