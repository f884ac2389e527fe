"""How much memory is free, in a container as well, and the sizes that are chosen for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LLM, LlamaConfig
from fastllama.io.load import meta_model, open_model
from fastllama.layers import packing
from fastllama.layers.batch import KVCache
from fastllama.layers.config import PRESETS
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device import memory
from fastllama.runtime.device.memory import Sizes
from tests.runtime.models import ours

GROUPS = {
    "v2": ("0::/a/b", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "v1": (
        "3:cpu:/x\n2:memory:/a/b",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def limited(root: Path, version: str, folders: dict[str, tuple[str, int, int]]) -> list[int]:
    """container_bytes where control groups have a limit, a usage and an idle file cache."""
    membership, mount, limit, used, cache = GROUPS[version]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership + "\n")
    for name, values in folders.items():
        folder = root / mount / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{values[0]}\n")
        (folder / used).write_text(f"{values[1]}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} {values[2]}\nactive_file 7\n")
    return list(memory.container_bytes(root))


@pytest.mark.parametrize("version", GROUPS)
def test_a_group_and_those_that_enclose_it_count(version: str, tmp_path: Path) -> None:
    assert limited(tmp_path, version, {"a/b": ("1000", 400, 50), "a": ("900", 500, 0)}) == [650, 400]


@pytest.mark.parametrize("version", GROUPS)
def test_a_container_sees_its_group_as_the_root(version: str, tmp_path: Path) -> None:
    assert limited(tmp_path, version, {"": ("1000", 400, 0)}) == [600]


def test_a_group_without_a_limit_does_not_count(tmp_path: Path) -> None:
    assert limited(tmp_path, "v2", {"a/b": ("max", 400, 0), "a": ("700", 400, 0)}) == [300]


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert list(memory.container_bytes(tmp_path)) == []


def test_the_smallest_is_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([5000, 3000]))
    assert memory.available_bytes(torch.device("cpu")) == 3000


@pytest.mark.parametrize(
    ("free", "quantization", "warning"),
    [
        (
            1_000_000,
            None,
            r"the weights in float32 take about 0\.01 GB, and 0\.00 GB of memory are free on cpu; "
            r"quantization='int8' takes 0\.00 GB; quantization='int4' takes 0\.00 GB",
        ),
        (1_000_000, "int8", r"the weights in int8 take about .*free on cpu; quantization='int4' takes 0\.00 GB$"),
        (1_000_000, "int4", r"the weights in int4 take about .*free on cpu; try a smaller model$"),
        (10**9, None, None),
    ],
)
def test_weights_that_do_not_fit_are_announced_before_they_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, quantization: str, warning: str | None
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    checkpoint, dtype = open_model("tiny", dtype="float32")
    model, kind = meta_model(checkpoint, dtype, device=torch.device("cpu"), quantization=quantization)
    memory.warn_of_weights(model.config, dtype, kind, torch.device("cpu"), kept=None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None)
    assert all(re.match(warning or "", message) for message in messages)


def test_an_llm_announces_them(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8_000_000)
    with LLM("tiny", dtype="float32", max_model_len=64, max_num_batched_tokens=64, max_num_seqs=1):
        pass
    assert any(record.getMessage().startswith("the weights in float32 take") for record in caplog.records)


@pytest.mark.parametrize("kind", ["bf12", "int8", "w8a8", "int4"])
def test_what_weights_will_take_is_what_they_take(kind: str) -> None:
    config = LlamaConfig(1000, 256, 1024, 2, 4, 2, head_dim=64, max_position_embeddings=512)
    model = LlamaForCausalLM(config, torch.bfloat16, "cpu")
    torch.nn.init.normal_(model.embed_tokens.weight)
    for layer in model.layers.parameters():
        torch.nn.init.normal_(layer, std=0.02)
    packing.apply(model, kind, progress=False)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert packing.expected_bytes(config, torch.bfloat16, kind) == pytest.approx(held, rel=0.03)


def test_windows_reports_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no os.sysconf; the sizes stand at bytes 8 and 16 of MEMORYSTATUSEX."""

    def fill(buffer: Any) -> int:
        assert len(buffer) == int.from_bytes(buffer.raw[:4], "little") == 64
        buffer[8:24] = (16 * GB).to_bytes(8, "little") + (9 * GB).to_bytes(8, "little")
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(memory.ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.physical_bytes() == 16 * GB
    monkeypatch.setattr(memory.Path, "exists", lambda path: False)
    assert memory.available_bytes(torch.device("cpu")) == 9 * GB


GB = 10**9
SMALL = LlamaConfig(100, 32, 96, 2, 4, 2, head_dim=16, max_position_embeddings=512)  # 1 KiB a token in fp64


def chosen(config: LlamaConfig = SMALL, *, gigabytes: float = 1.0, device: str = "cpu", **given: Any) -> Sizes:
    dtype = torch.float64 if config is SMALL else torch.bfloat16
    sizes = {"dtype": dtype, "kv_dtype": dtype, "page_size": 64} | given
    return memory.sizes(config, device=device, available=round(gigabytes * GB), **sizes)


LLAMA2_7B, TINYLLAMA = PRESETS["llama-2-7b"], PRESETS["tinyllama-1.1b"]
# Llama 3.1 8B: a long context of small keys and values, and four times the logits.
LONG = replace(
    LLAMA2_7B, vocab_size=128256, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072
)


@pytest.mark.parametrize(
    ("config", "device", "gigabytes", "expected"),
    [
        (LLAMA2_7B, "cuda", 66, (4096, 105664, 103, 8192)),  # free beside the weights on a GPU of 80 GB
        (LLAMA2_7B, "cuda", 10.5, (4096, 16512, 16, 2048)),  # of 24
        (LLAMA2_7B, "cuda", 2, (3072, 3072, 16, 512)),  # of 16
        (PRESETS["llama-2-70b"], "cuda", 100, (4096, 254656, 248, 8192)),
        (LONG, "cuda", 64, (131072, 406144, 256, 8192)),
        (LONG, "cuda", 8, (48896, 48896, 47, 2048)),
        (TINYLLAMA, "cpu", 8, (2048, 87424, 64, 2048)),
        (LLAMA2_7B, "cpu", 16, (4096, 7488, 16, 2048)),
        (SMALL, "cpu", 1, (512, 512 * 64, 64, 2048)),  # no more cache than all sequences can fill
        (SMALL, "cuda", 1, (512, 512 * 256, 256, 8192)),
        (SMALL, "cpu", 0, (64, 64, 16, 512)),
    ],
)
def test_what_is_chosen(config: LlamaConfig, device: str, gigabytes: float, expected: tuple[int, ...]) -> None:
    found = chosen(config, gigabytes=gigabytes, device=device)
    sizes = (found.max_model_len, found.kv_cache_tokens, found.max_num_seqs, found.max_num_batched_tokens)
    assert sizes == expected
    dtype = torch.float64 if config is SMALL else torch.bfloat16
    assert found.kv_cache_bytes == found.kv_cache_tokens * KVCache.bytes_per_token(config, dtype)


@pytest.mark.parametrize("gigabytes", [0.01, 0.1, 0.5, 2, 8, 30, 140])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [*PRESETS.values(), LONG])
def test_a_step_and_the_cache_fit_together(config: LlamaConfig, device: str, gigabytes: float) -> None:
    found = chosen(config, gigabytes=gigabytes, device=device)
    assert 1 <= found.max_num_seqs <= found.max_num_batched_tokens
    step = found.max_num_batched_tokens * (2 * config.hidden_size + 3 * config.intermediate_size) * 2
    logits = found.max_num_seqs * config.vocab_size * 16  # logits twice, fp32, and two tables
    assert step <= gigabytes * GB / 32 or found.max_num_batched_tokens == 512
    page = 64 * KVCache.bytes_per_token(config, torch.bfloat16)
    assert found.kv_cache_bytes <= max((gigabytes * GB - step - logits) * memory.KV_SHARE[device], page)


def test_what_is_given_stays_and_the_rest_is_chosen_to_fit() -> None:
    assert chosen(max_num_seqs=5000).max_num_batched_tokens == 5000, "each running sequence advances in each step"
    assert chosen(max_num_batched_tokens=7).max_num_seqs == 7
    assert chosen(max_num_batched_tokens=10**5).max_num_seqs == 64
    assert chosen(max_num_seqs=300, max_num_batched_tokens=301, kv_cache_tokens=640).max_num_seqs == 300
    assert chosen(max_num_seqs=3, max_model_len=100).kv_cache_tokens == 3 * 128
    assert chosen(kv_cache_tokens=5000).kv_cache_tokens == 5056, "whole pages"
    assert chosen(kv_cache_tokens=40, max_model_len=40) == Sizes(40, 64, 64 * 1024, 16, 2048)
    assert chosen(kv_cache_tokens=200) == Sizes(200, 256, 256 * 1024, 16, 2048)
    assert chosen(kv_cache_tokens=40 * 128).max_num_seqs == 40, "a quarter of 512 each"
    assert chosen(LLAMA2_7B, gigabytes=66, kv_cache_tokens=40 * 1024).max_num_seqs == 40, "a quarter of 4096 each"
    assert chosen(LONG, gigabytes=66, kv_cache_tokens=40 * 1024).max_num_seqs == 40, (
        "a quarter of 131072 is more than is expected"
    )


def test_a_step_that_is_given_takes_from_the_cache() -> None:
    given = chosen(LLAMA2_7B, gigabytes=66, device="cuda", max_num_batched_tokens=8192 * 4)
    left = 66 * GB - 8192 * 4 * 82432 - 103 * 32000 * 6
    assert given.kv_cache_bytes == pytest.approx(0.85 * left, rel=2e-3)
    half = chosen(LLAMA2_7B, gigabytes=66, device="cuda", kv_dtype=torch.int8)
    assert half.kv_cache_tokens == pytest.approx(105792 * 2 * 128 / 132, rel=2e-3), "a scale beside each 128 values"


def test_a_sequence_that_could_never_fit_is_refused() -> None:
    for given, held in (({"kv_cache_tokens": 99}, 99), ({"gigabytes": 0}, 64)):
        message = f"^max_model_len is 100 and the KV cache has {held} tokens; legal: at most kv_cache_tokens$"
        with pytest.raises(ValueError, match=message):
            chosen(max_model_len=100, **given)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens"])
def test_what_is_given_fits_or_is_refused(name: str, device: str) -> None:
    """The refusal states a size that fits, and that size does."""
    for value in (10**7, 10**12, 10**30, 10**400):
        with pytest.raises(ValueError, match=f"^{name} is {value}, which takes [0-9.]* GB; legal here: ") as refused:
            chosen(LLAMA2_7B, gigabytes=66, device=device, **{name: value})
        found = re.search(r"at most (\d+), what fits into (\S*) GB$", str(refused.value))
        assert found is not None
        assert 60 < float(found[2]) <= 66
        legal = int(found[1])
        sizes = chosen(LLAMA2_7B, gigabytes=66, device=device, **{name: legal})
        assert legal <= getattr(sizes, name) < legal + 64
        with pytest.raises(ValueError, match=f"^{name} is"):
            chosen(LLAMA2_7B, gigabytes=66, device=device, **{name: legal + 1})


def test_what_is_given_together_fits_together() -> None:
    given = {"max_num_seqs": 1000, "max_num_batched_tokens": 10**5, "kv_cache_tokens": 10**5}
    taken = (1000 * 32000 * 16, 10**5 * (2 * 4096 + 3 * 11008) * 2, 10**5 * 2**19)
    assert chosen(LLAMA2_7B, gigabytes=sum(taken) / GB + 1e-8, **given).kv_cache_tokens == 100032
    for missing, name in ((taken[2] + 1, "max_num_batched_tokens"), (1, "kv_cache_tokens")):
        with pytest.raises(ValueError, match=f"^{name} is 100000"):
            chosen(LLAMA2_7B, gigabytes=(sum(taken) - missing) / GB, **given)


def test_logits_of_drafts_are_counted() -> None:
    """A step has logits of each draft too."""
    plain, drafting = (chosen(LONG, gigabytes=2, kv_cache_tokens=4096, num_draft_tokens=n) for n in (0, 3))
    assert (plain.max_num_seqs, drafting.max_num_seqs) == (16, 16)
    plain, drafting = (chosen(LONG, gigabytes=64, device="cuda", num_draft_tokens=n) for n in (0, 15))
    assert (plain.max_num_seqs, drafting.max_num_seqs) == (256, 114)
    assert drafting.kv_cache_tokens < plain.kv_cache_tokens
    assert chosen(max_num_seqs=100, gigabytes=0.007).max_num_seqs == 100
    with pytest.raises(ValueError, match=r"^max_num_seqs is 100, which takes 0\.00 GB; legal here: at most"):
        chosen(max_num_seqs=100, gigabytes=0.001, num_draft_tokens=7)


@pytest.mark.parametrize("name", ["kv_cache_tokens", "host_cache_tokens", "max_num_seqs", "max_num_batched_tokens"])
@pytest.mark.parametrize("value", [10**12, 10**30])
def test_nothing_is_allocated_for_what_does_not_fit(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}, which takes .* GB; legal here: "):
        LLM(ours(), progress=False, **{name: value})


def test_one_line_states_the_sizes() -> None:
    assert str(chosen(LLAMA2_7B, gigabytes=66, device="cuda")) == (
        "max_model_len 4096, KV cache 105664 tokens (55.40 GB), max_num_seqs 103, max_num_batched_tokens 8192"
    )


def test_what_torch_keeps_of_freed_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed memory returns to the GPU before it is asked how much is free."""
    kept = [3]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 - sum(kept), 10))
    assert memory.available_bytes(torch.device("cuda")) == 10
