"""Inputs of linear layers over a text: against transformers in fp64, document by document, in any batching."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.layers import calibration
from fastllama.layers.block import LlamaBlock
from fastllama.layers.calibration import Calibration
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.rescaling import LINEARS
from fastllama.quant.activations import Activations
from tests.layers.test_model import SHAPES, ours, theirs
from tests.quant.memory import MemoryWatch
from tests.runtime.models import LLAMA3_ROPE, YARN_ROPE

CPU = torch.device("cpu")
PAGE = calibration.PAGE_SIZE
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 1, 130, 2)
NAMES = dict(zip(LINEARS, ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"), strict=True))
batch_tokens = pytest.mark.parametrize("tokens", [1, 64, 100, 2048])


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in LENGTHS]


def fed_by_transformers(model: Any, texts: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """For each layer of the model the inputs of its linear layers, and as "after" its output, all in fp64: [T, ...]."""
    exact = copy.deepcopy(model).double()
    found: list[dict[str, list[Tensor]]] = []
    for layer in exact.model.layers:
        lists: dict[str, list[Tensor]] = {name: [] for name in (*LINEARS, "after")}
        found.append(lists)
        for name, path in NAMES.items():
            keep = lists[name].append
            layer.get_submodule(path).register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0][0]))
        layer.register_forward_hook(
            lambda _, args, out, keep=lists["after"].append: keep(out[0] if out.ndim == 3 else out)
        )
    with torch.inference_mode():
        for ids in texts:
            exact(torch.tensor([ids]))
    return [{name: torch.cat(rows) for name, rows in lists.items()} for lists in found]


@functools.cache
def expected(shape: str) -> list[dict[str, Tensor]]:
    return fed_by_transformers(theirs(shape), documents())


def watchers(block: LlamaBlock, num_rows: int) -> dict[str, Activations]:
    sizes = {name: block.get_parameter(f"{name}.weight").shape[1] for name in LINEARS}
    return {name: Activations(size, num_rows, CPU, hessian=True) for name, size in sizes.items()}


def run(model: LlamaForCausalLM, texts: Any = None) -> tuple[list[dict[str, Activations]], Tensor]:
    """The inputs of each block, and the residual stream after the last."""
    walk, found = Calibration(model, documents() if texts is None else texts, CPU), []
    for block in model.layers:
        assert isinstance(block, LlamaBlock)
        found.append(watchers(block, walk.num_tokens))
        walk.run(block, found[-1])
    return found, torch.cat(walk._streams)


def run_without_watching(model: LlamaForCausalLM, texts: Any) -> list[Tensor]:
    """The residual streams of batches after the last block."""
    walk = Calibration(model, texts, CPU)
    for block in model.layers:
        assert isinstance(block, LlamaBlock)
        walk.run(block, {})
    return walk._streams


def close(found: Tensor, exact: Tensor, bound: float) -> bool:
    return bool((found.double() - exact).norm() <= bound * exact.norm())


def assert_fed(found: list[dict[str, Activations]], exact: list[dict[str, Tensor]], bound: float = 2e-6) -> None:
    for ours_, theirs_ in zip(found, exact, strict=True):
        for name, seen in ours_.items():
            rows = theirs_[name]
            assert seen.rows.shape == rows.shape
            assert close(seen.rows, rows, bound), name
            assert close(seen.absmax, rows.abs().amax(0), bound), name
            assert close(seen.hessian, rows.T @ rows, bound), name


@batch_tokens
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_are_fed_what_those_of_transformers_are(
    shape: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs after the norms, of separate documents, one of them longer than what is read at once."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", tokens)
    found, after = run(ours(shape, torch.float32))
    exact = expected(shape)
    assert_fed(found, exact)
    assert close(after, exact[-1]["after"], 2e-6)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, [*LENGTHS]), (100, [64, 64, 66, 130, 2]), (128, [128, 66, 130, 2]), (2048, [326])]
)
def test_whole_documents_are_read_at_once_while_they_fit(
    tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", tokens)
    walk = Calibration(ours("GQA", torch.float32), documents(), CPU)
    assert [len(each) for each in walk._streams] == expected
    assert walk.num_tokens == sum(LENGTHS)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, YARN_ROPE], ids=["llama3", "yarn"])
def test_angles_are_those_of_the_model(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "scaled", {"kv_heads": 4, "rope_parameters": rope})
    theirs.cache_clear()
    found, after = run(ours("scaled", torch.float32))
    exact = fed_by_transformers(theirs("scaled"), documents())
    theirs.cache_clear()
    assert_fed(found, exact, 2e-5)
    assert close(after, exact[-1]["after"], 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = ours("GQA", dtype)
    walk = Calibration(model, documents(), CPU)
    assert {each.dtype for each in walk._streams} == {dtype}
    found, after = run(model)
    assert after.dtype == dtype
    assert_fed(found, expected("GQA"), 4 * torch.finfo(dtype).eps)
    for blocks in found:
        for seen in blocks.values():
            assert torch.equal(seen.rows, seen.rows.to(dtype).float())


def test_rows_are_those_of_documents_in_their_order() -> None:
    """A document alone gives the same rows as among others."""
    model = ours("GQA", torch.float32)
    found, _ = run(model)
    start = 0
    for ids in documents():
        alone, _ = run(model, [ids])
        for all_of, own in zip(found, alone, strict=True):
            for name in LINEARS:
                rows = own[name].rows
                torch.testing.assert_close(all_of[name].rows[start : start + len(ids)], rows, rtol=1e-4, atol=1e-5)
        start += len(ids)


@pytest.mark.parametrize("of", [tuple, torch.tensor, lambda ids: torch.tensor(ids).numpy()])
def test_ids_may_come_in_any_sequence(of: Any) -> None:
    model = ours("GQA", torch.float32)
    (first, _), (second, _) = run(model), run(model, tuple(map(of, documents())))
    for one, another in zip(first, second, strict=True):
        for name in LINEARS:
            assert torch.equal(one[name].hessian, another[name].hessian)


def test_nothing_of_the_model_changes_and_no_hook_stays() -> None:
    model = ours("biases", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_also_where_a_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("GQA", torch.float32)
    walk, block = Calibration(model, documents(), CPU), model.layers[0]
    assert isinstance(block, LlamaBlock)

    def failing(self: Activations, x: Tensor) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr(Activations, "add", failing)
    with pytest.raises(RuntimeError, match="full"):
        walk.run(block, watchers(block, walk.num_tokens))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_not_watched_run_all_the_same() -> None:
    model = ours("GQA", torch.float32)
    assert torch.equal(run(model)[1], torch.cat(run_without_watching(model, documents())))


def test_memory_is_one_stream_and_what_a_block_makes_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 36 more batches, memory grows by their residual stream, and by 1 % for their positions."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 64)
    model, most = ours("GQA", torch.float32), []
    for count in (4, 40):
        with MemoryWatch() as watch:
            run_without_watching(model, [[each % 40 for each in range(64)]] * count)
        most.append(watch.most)
    stream = 36 * 64 * 64 * 4
    assert stream <= most[1] - most[0] < 1.1 * stream
