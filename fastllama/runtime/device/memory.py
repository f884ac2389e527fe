"""Chooses the engine's sizes (KV cache, sequences, tokens per step) by the available memory."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllama.arithmetic import ceil_div
from fastllama.layers import packing
from fastllama.layers.batch import KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device import adjustments
from fastllama.runtime.options import EngineOptions

logger = logging.getLogger("fastllama")

KV_SHARE = {"cpu": 0.25, "cuda": 0.85}  # of the free memory; on a CPU, the rest of the system needs some too
STEP_SHARE = 1 / 32  # of the free memory, for a step's activations, and the same for its logits

# Tokens of a step. On an H100, a step is compute-bound above 300 tokens (989 TFLOP/s over 3.35 TB/s, 16 bits), so fewer
# than 512 waste it. More only amortize the step's fixed cost, and each running answer waits for the whole step: 8192
# tokens of a 7B are 110 TFLOP, 0.2 s there at 60 %; two CPU cores take 40 s for 2048 of a 1.1B.
LEAST_TOKENS = 512
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}

# Sequences. Decoding reads the weights once for all of them, which pays up to the same 300, on a CPU far fewer. Each is
# expected to reach a quarter of its limit, at most a quarter of Llama 2's 4096; if they grow longer, the newest is
# preempted and recomputed. LEAST_SEQS is how many samples of one prompt a request may ask for.
LEAST_SEQS = 16
MOST_SEQS = {"cpu": 64, "cuda": 256}
EXPECTED_TOKENS = 1024


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (on a CPU: without swapping, as far as the system reports).

    On a GPU, torch's cached free memory is released first; after quantization that is as much as the weights were.
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
    return windows_memory()[1] if not hasattr(os, "sysconf") else physical_bytes() // 2


def physical_bytes() -> int:
    """Bytes of memory that this machine has, free or not."""
    if not hasattr(os, "sysconf"):
        return windows_memory()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def windows_memory() -> tuple[int, int]:
    """Bytes of physical memory on Windows: all of them, and those available. Source: MEMORYSTATUSEX, sysinfoapi.h."""
    status = struct.pack("<II7Q", 64, *[0] * 8)
    buffer = ctypes.create_string_buffer(status, len(status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(buffer)  # type: ignore[attr-defined]  # typed on Windows alone
    _, _, total, available, *_ = struct.unpack("<II7Q", buffer.raw)
    return total, available


def container_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Yields the memory that each Linux control group of this process, and so its container, still allows.

    root: the root of proc and sys. Inactive file cache counts as free; active file cache does not, unlike in
    MemAvailable.
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
        # A container sees its own group as the mount's root, whatever its path on the host.
        for group in (Path(path), *Path(path).parents):
            folder = root / mount / group.relative_to("/")
            with suppress(OSError, ValueError):  # no such file, or "max"
                allowed = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
                yield allowed + sum(int(line.split()[1]) for line in stat if line.startswith(cache))


def warn_of_weights(
    config: LlamaConfig, dtype: torch.dtype, kind: str | None, device: torch.device, *, kept: str | None
) -> None:
    """Logs a warning if the weights of a model exceed the free memory. No error: with swap they may still load.

    kind: of the packed weights, None where they stay in dtype; kept: of a checkpoint that is quantized already. Linux
    kills a process that exhausts memory, with no message: this warning is the only one.
    """
    kind = kept or kind
    needed, free = packing.expected_bytes(config, dtype, kind), available_bytes(device)
    if needed <= free:
        return
    fewer = {} if kept else {each: packing.expected_bytes(config, dtype, each) for each in ("int8", "int4")}
    ways = [f"quantization={each!r} takes {_gigabytes(size)}" for each, size in fewer.items() if size < needed]
    logger.warning(
        "the weights in %s take about %s, and %s of memory are free on %s; %s",
        kind or str(dtype).removeprefix("torch."),
        _gigabytes(needed),
        _gigabytes(free),
        device,
        "; ".join(ways) or "try a smaller model",
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of an engine, in tokens except for max_num_seqs; kv_cache_tokens is a multiple of the page size."""

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
    """Returns the error for an option that takes `size` bytes where `fits` are free. most: the largest that fits."""
    at_most = "" if most is None else f"at most {most}, "
    return ValueError(
        f"{name} is {value}, which takes {_gigabytes(size)}; legal here: {at_most}what fits into {_gigabytes(fits)}"
    )


def _gigabytes(size: int) -> str:
    """Formats bytes with two digits; of any integer, since a float ends at 1e308."""
    return f"{size // 10**9}.{size // 10**7 % 100:02d} GB"


def _check(name: str, value: int | None, of_each: int, fits: int) -> None:
    """Raise ValueError if an option is given and its value, at `of_each` bytes per unit, does not fit."""
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
    """Returns the given sizes; those that are None are chosen to suit the model and the memory.

    device: "cpu" or "cuda". available: free bytes, weights already loaded. dtype: of activations. kv_dtype: of pages.
    more_per_token: bytes per token of a draft model's KV cache. num_draft_tokens: verified per sequence in a step, or
    0. The KV cache gets a share of what the largest step leaves, but at most what all sequences can fill.
    Raises ValueError if a sequence of max_model_len could never fit, or if given sizes exceed the memory.
    """
    of_token = (2 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize  # gate, up and silu(gate) * up
    # Logits of a sequence, a copy if samples share them, and the fp32 input of sampling, for its last token and each
    # draft after it. And its rows in the tables of adjustments.
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
    _check("max_num_seqs", max_num_seqs, of_seq + of_token, available)  # a step has a token or more of each
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
                f"max_model_len is {max_model_len} and the KV cache has {held} tokens; legal: at most kv_cache_tokens"
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
    """Returns the sizes of an engine for a model by the memory that is free now, and logs them. See `sizes`.

    Raises ValueError before anything is allocated, also for host_cache_tokens.
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
        logger.warning("max_model_len is %d, not the model's %d: the KV cache has no room for more", held, limit)
    return chosen


def host_bytes(config: LlamaConfig, num_tokens: int, page_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Host memory, in bytes, of a host cache of num_tokens tokens: pinned if the model is on a GPU."""
    num_tokens = ceil_div(num_tokens, page_size) * page_size
    if device.type == "cuda" and num_tokens:
        return KVCache.pinned_bytes(config, num_tokens, dtype)
    return num_tokens * KVCache.bytes_per_token(config, dtype)
