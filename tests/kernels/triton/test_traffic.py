"""Each element is read once and written once: the interpreter counts the least traffic of docs/measured/gpu.md."""

from __future__ import annotations

import pytest
import torch

from fastllama.catalogue.arguments import inputs
from fastllama.catalogue.maker import Maker
from fastllama.catalogue.sampling import adjust_logits
from fastllama.testing.monitor import CheckedRun
from tests.kernels.honest import public
from tests.kernels.ops.test_rope import cache

ROWS, HEADS, KV_HEADS, HEAD_DIM = 3, 8, 2, 128


@pytest.mark.interpreter
def test_the_norm_reads_and_writes_each_row_once(checked: CheckedRun) -> None:
    x = torch.randn(ROWS, 5120).bfloat16()
    public("add_rms_norm", "triton")(x, x.clone(), x[0].clone())
    (launch,) = checked.launches
    row = 2 * 5120
    assert launch.loaded == {"x_ptr": ROWS * row, "residual_ptr": ROWS * row, "weight_ptr": ROWS * row}  # weight: L2
    assert launch.stored == {"out_ptr": ROWS * row, "residual_out_ptr": ROWS * row}


@pytest.mark.interpreter
def test_silu_mul_reads_two_and_writes_one(checked: CheckedRun) -> None:
    both, half = ROWS * 2 * 2 * 13824, ROWS * 2 * 13824
    gate_up = torch.randn(ROWS, 2 * 13824).bfloat16()
    public("silu_mul", "triton")(gate_up)
    public("silu_mul", "triton")(*gate_up.chunk(2, dim=-1))
    fused, apart = checked.launches
    assert fused.loaded == {"gate_up_ptr": both}
    assert apart.loaded == {"gate_up_ptr": half, "up_ptr": half}
    assert fused.stored == apart.stored == {"out_ptr": half}


@pytest.mark.interpreter
def test_adjusting_logits_reads_three_and_writes_one(checked: CheckedRun) -> None:
    """Two tiles of a row and part of a third; the tables of a row without options are not read."""
    vocab = 1100
    call = inputs("adjust_logits", adjust_logits(Maker(torch.bfloat16), ROWS, vocab, slots=(1, -1, 0)))
    public("adjust_logits", "triton")(**call)
    (launch,) = checked.launches
    tables = 4 * (ROWS - 1) * vocab
    read = {name: launch.loaded[f"{name}_ptr"] for name in ("logits", "bias", "counts")}
    assert read == {"logits": 2 * ROWS * vocab, "bias": tables, "counts": tables}
    assert launch.stored == {"out_ptr": 4 * ROWS * vocab}


@pytest.mark.interpreter
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_rotation_reads_the_projection_once_and_writes_it_once(
    quantized: bool, interleaved: bool, checked: CheckedRun
) -> None:
    """Padding is not even read; quantized pages take one byte for an element, and four for a head."""
    dtype = torch.int8 if quantized else torch.bfloat16
    qkv = torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    held = [torch.zeros(1, KV_HEADS, 16, HEAD_DIM, dtype=dtype) for _ in "kv"]
    held += [torch.zeros(1, KV_HEADS, 16) for _ in "kv"] if quantized else []
    slots = torch.tensor([3, -1, 9])
    public("rope_and_write_kv", "triton")(
        qkv, cache(HEAD_DIM), torch.arange(ROWS), slots, *held, interleaved=interleaved
    )
    (launch,) = checked.launches
    written = ROWS - 1
    heads = written * KV_HEADS
    assert launch.loaded["qkv_ptr"] == 2 * HEAD_DIM * (ROWS * HEADS + 2 * heads)
    assert launch.stored["q_out_ptr"] == 2 * HEAD_DIM * ROWS * HEADS
    for name in ("k", "v"):
        assert launch.stored[f"{name}_pages_ptr"] == dtype.itemsize * HEAD_DIM * heads
        assert launch.stored[f"{name}_scales_ptr"] == (4 * heads if quantized else 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_are_read_once_and_written_once(
    dtype: torch.dtype, scale: float | None, checked: CheckedRun
) -> None:
    """Padding is not even read; a scale that is given is not written."""
    codes = dtype.itemsize == 1
    k, v = (torch.randn(ROWS, KV_HEADS, HEAD_DIM).bfloat16() for _ in "kv")
    held = [torch.zeros(1, KV_HEADS, 16, HEAD_DIM).to(dtype) for _ in "kv"]
    computed = [torch.zeros(1, KV_HEADS, 16) for _ in "kv"] if codes and scale is None else []
    given = {"k_scale": scale, "v_scale": scale} if codes else {}
    public("write_kv", "triton")(k, v, torch.tensor([3, -1, 9]), *held, *computed, **given)
    (launch,) = checked.launches
    heads = (ROWS - 1) * KV_HEADS
    for name in ("k", "v"):
        assert launch.loaded[f"{name}_ptr"] == 2 * HEAD_DIM * heads
        assert launch.stored[f"{name}_pages_ptr"] == dtype.itemsize * HEAD_DIM * heads
        assert launch.stored[f"{name}_scales_ptr"] == (4 * heads if computed else 0)


@pytest.mark.interpreter
def test_rope_reads_and_writes_each_head_once(checked: CheckedRun) -> None:
    q, k = (torch.randn(ROWS, heads, HEAD_DIM).bfloat16() for heads in (HEADS, KV_HEADS))
    public("rope", "triton")(q, k, cache(HEAD_DIM), torch.arange(ROWS))
    (launch,) = checked.launches
    for name, tensor in (("q", q), ("k", k)):
        assert launch.loaded[f"{name}_ptr"] == launch.stored[f"{name}_out_ptr"] == 2 * tensor.numel()
