"""KV pages in host memory: the second level of the prefix cache, for pages evicted from the device."""

from __future__ import annotations

import logging
from collections import abc

import torch

from fastllama.arithmetic import ceil_div
from fastllama.layers.batch import KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.runtime.device.memory import available_bytes, host_bytes, refusal
from fastllama.runtime.planning.block_pool import Transfer

logger = logging.getLogger("fastllama")


class HostCache:
    """Pages for num_tokens tokens, with the layout and dtype of `kv`; pinned if `kv` is on a GPU.

    Raises ValueError, naming the option host_cache_tokens, if there is too little memory, or memory to pin.
    """

    def __init__(self, kv: KVCache, config: LlamaConfig, num_tokens: int) -> None:
        pages = kv.layers[0].k_pages
        self._num_device_pages, page_size = pages.shape[0], pages.shape[2]
        num_pages = ceil_div(num_tokens, page_size)
        size = host_bytes(config, num_tokens, page_size, pages.dtype, pages.device)
        try:
            host = KVCache.allocate(
                config, num_pages, page_size, pages.dtype, "cpu", pinned=pages.device.type == "cuda"
            )
        except RuntimeError as error:  # torch's out-of-memory error
            fits = available_bytes(torch.device("cpu"))
            raise refusal("host_cache_tokens", num_tokens, size, fits) from error
        # (device, host) of each layer's tensors. A page of each is contiguous: one copy, without a temporary.
        self._pairs = [
            pair
            for layers in zip(kv.layers, host.layers, strict=True)
            for pair in zip(*(layer.tensors() for layer in layers), strict=True)
        ]
        logger.info("host cache: %d tokens, %.2f GB", num_pages * page_size, size / 1e9)

    @torch.inference_mode()
    def transfer(self, transfers: abc.Sequence[Transfer]) -> None:
        """Copy pages in this order, asynchronously, after the work queued on the device."""
        first = self._num_device_pages
        for source, destination in transfers:
            for device, host in self._pairs:
                if destination < first:
                    device[destination].copy_(host[source - first], non_blocking=True)
                else:
                    host[destination - first].copy_(device[source], non_blocking=True)
