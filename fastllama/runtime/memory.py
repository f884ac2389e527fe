"""How much memory there is for the KV cache, and how many tokens that makes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from fastllama.layers.batch import KVCache
from fastllama.layers.model import LlamaForCausalLM

logger = logging.getLogger("fastllama")

KV_SHARE = {"cpu": 0.25, "cuda": 0.85}  # of the free memory; on a CPU the rest of the system needs some too


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (on a CPU: without swapping, as far as the system tells)."""
    if device.type == "cuda":
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


def cache_sizes(
    model: LlamaForCausalLM,
    max_model_len: int | None,
    kv_cache_tokens: int | None,
    max_num_seqs: int,
    page_size: int,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """max_model_len and kv_cache_tokens, from the model and the free memory where they are None. dtype: of the pages.

    Raises ValueError where a sequence of max_model_len could never fit.
    """
    length = model.config.max_position_embeddings if max_model_len is None else max_model_len
    if kv_cache_tokens is None:
        per_token = KVCache.bytes_per_token(model.config, dtype)
        fits = int(available_bytes(model.device) * KV_SHARE[model.device.type] / per_token)
        pages = min(fits // page_size, -(-length // page_size) * max_num_seqs)
        kv_cache_tokens = max(pages, 1) * page_size
        logger.info("KV cache: %d tokens, %.2f GB", kv_cache_tokens, kv_cache_tokens * per_token / 1e9)
    if kv_cache_tokens < length:
        if max_model_len is not None:
            raise ValueError(
                f"max_model_len is {max_model_len} and the KV cache holds {kv_cache_tokens} tokens; "
                "legal: at most kv_cache_tokens"
            )
        logger.warning("max_model_len is %d, not the model's %d: the KV cache holds no more", kv_cache_tokens, length)
        length = kv_cache_tokens
    return length, kv_cache_tokens
