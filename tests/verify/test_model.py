"""Layer by layer, logits, tokens and weights: right models pass, and each kind of wrong one fails at its fault."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaConfig
from fastllama.kernels.dispatch.op import OPS
from fastllama.layers.batch import BatchMeta
from fastllama.layers.block import LlamaMLP
from fastllama.layers.config import RopeScaling
from fastllama.layers.linear import RMSNorm
from fastllama.layers.weights import hf_tensors
from fastllama.runtime.device import sampler
from fastllama.runtime.device.graphs import DecodeGraphs
from fastllama.runtime.device.runner import Runner
from fastllama.verify import Report, Row, check, model, oracle
from tests.cli.models import SIZES, write_model

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mha, biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "linear rope": {"rope_scaling": RopeScaling("linear", 4.0)},
    "dynamic rope": {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 64},
    "yarn rope": {"rope_scaling": RopeScaling("yarn", 4.0, 32)},
    "short context": {"max_position_embeddings": 20},
}


@pytest.fixture(autouse=True)
def _no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops have their own tests."""
    monkeypatch.setattr("fastllama.verify.ops.rows", lambda dtype, device: iter(()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=3)


def failed(report: Report) -> list[str]:
    return [row.name for row in report.rows if not row.ok]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_model_agrees(tmp_path: Path, shape: str) -> None:
    report = check(write_model(tmp_path / "model", **SHAPES[shape]), dtype="float32")
    assert [row.name for row in report.rows] == ["weights", "layer 0", "layer 1", "logits", "tokens", "replayed tokens"]
    assert report.ok, report.table()
    assert report.rows[-1].bound == report.rows[-2].bound == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_so_it_does_in_16_bits(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    """Whatever the dtype of the file: the oracle is given the weights as they are after the cast."""
    folder = write_model(tmp_path / "model", dtype=stored)
    report, wide = check(folder, dtype=dtype), check(folder, dtype="float32")
    assert report.ok, report.table()
    assert report.dtype == dtype
    # A model amplifies roundings of any size alike: its bounds are the dtype's own, no looser.
    finer = torch.finfo(getattr(torch, dtype)).eps / torch.finfo(torch.float32).eps
    for ours, theirs in zip(report.rows, wide.rows, strict=True):
        if ours.kind in ("layer", "logits"):
            assert 1 / 8 < ours.bound / theirs.bound / finer < 8


def test_a_model_without_a_tokenizer_is_given_any_ids(tmp_path: Path) -> None:
    report = check(write_model(tmp_path / "model", tokenizer=False))
    assert report.ok, report.table()


def test_prompt_and_answer_go_through_the_runtime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefill, then single tokens: the paths that a user's request takes."""
    run, chunks = Runner.run, []

    def watched(self: Runner, step: Any, *before: Any) -> Any:
        chunks.extend(chunk.length for chunk in step.chunks)
        return run(self, step, *before)

    monkeypatch.setattr(Runner, "run", watched)
    report = check(path)
    # LLM warms up with one row and two; the text's first page is there the second time.
    assert chunks == [1, 2, 40, 40, 16, *[1] * 31, 32, *[1] * 31]
    tokens = ["32 greedy tokens", "32 greedy tokens by replayed steps"]
    assert [row.case for row in report.rows] == ["30 tensors", *["127 tokens"] * 4, *tokens]


def wrong_mlp(at: int) -> Callable[[LlamaMLP, Tensor, RMSNorm, BatchMeta], Tensor]:
    """An MLP after which half errs by a ten-thousandth, in its call number `at` of each pass through three layers."""
    forward, calls = LlamaMLP.forward, 0

    def wrong(self: LlamaMLP, hidden: Tensor, norm: RMSNorm, batch: BatchMeta) -> Tensor:
        nonlocal calls
        calls += 1
        out = forward(self, hidden, norm, batch)
        out[:, ::2] *= 1.0001 if (calls - 1) % 3 == at else 1.0
        return out

    return wrong


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_first_wrong_layer_is_the_first_that_fails(path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", wrong_mlp(at))
    names = failed(check(path))
    assert names[0] == f"layer {at}"
    assert "logits" in names


def test_wrong_logits_alone_are_named(path: Path, bind: Callable[..., None]) -> None:
    right = OPS["matmul"].implementation("cpu").run

    def wrong(x: Tensor, weight: Tensor, *args: Any) -> None:
        right(x, weight, *args)
        out = args[-2]
        if weight.shape[0] == 300:
            out[..., 7] += 0.001 * out.abs().max()

    bind("matmul", wrong)
    assert failed(check(path)) == ["logits"]


def test_a_wrong_sample_fails_the_tokens_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second likeliest token, once."""
    start, calls = sampler.start, 0

    @torch.inference_mode()
    def wrong(step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            step.logits[-1, step.logits[-1].argmax()] = step.logits[-1].min()
        return start(step)

    monkeypatch.setattr(sampler, "start", wrong)
    report = check(path)
    assert failed(report) == ["tokens"]
    assert report.rows[-2].case == "32 greedy tokens, 1 of them another"


def test_logits_that_are_no_numbers_fail_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN begins in the fifth token of the answer: the report covers the tokens before."""
    forward, calls = LlamaMLP.forward, 0

    def wrong(self: LlamaMLP, hidden: Tensor, norm: RMSNorm, batch: BatchMeta) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, hidden, norm, batch).mul_(
            float("nan") if calls > 3 * (2 + 7) else 1.0
        )  # two calls warm up

    monkeypatch.setattr(LlamaMLP, "forward", wrong)
    report = check(path)
    assert failed(report) == ["layer 0", "layer 1", "layer 2", "logits", "tokens", "replayed tokens"]
    assert report.rows[-2].case == "5 greedy tokens, then the model's logits are not finite numbers"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_the_checkpoints_are_found(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = LLM.__init__

    def wrong(self: LLM, *args: Any, **options: Any) -> None:
        load(self, *args, **options)
        dict(hf_tensors(self.engine.model))[name].view(-1)[-1] += 1e-6

    monkeypatch.setattr(LLM, "__init__", wrong)
    assert failed(check(path)) == ["weights"]


def test_a_graph_that_computes_something_else_fails_the_replayed_tokens_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sampling takes the least likely token, in the fifth step that is replayed."""
    run, replays = DecodeGraphs.run, 0

    @torch.inference_mode()
    def wrong(self: DecodeGraphs, *args: Any, **options: Any) -> Any:
        nonlocal replays
        replays += 1
        logits, drawn = run(self, *args, **options)
        if replays == 6:  # one warms up
            drawn.tokens[0] = logits[0].argmin()
        return logits, drawn

    monkeypatch.setattr(DecodeGraphs, "run", wrong)
    report = check(path)
    assert failed(report) == ["replayed tokens"]
    assert report.rows[-1].case == "32 greedy tokens by replayed steps, others from token 6 on"


def test_the_report_states_where_nothing_is_replayed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_GRAPHS", "0")
    report = check(path)
    assert report.ok
    assert report.rows[-1].case == "32 greedy tokens by eager steps"


def answer_row(logits: list[list[float]], answer: tuple[int, ...], bound: float) -> Row:
    values = torch.tensor(logits, dtype=torch.float64)
    return model._token_row(model.Run(torch.zeros(len(logits)), [], values, answer, None), values, bound)


@pytest.mark.parametrize(
    ("answer", "bound", "error", "case"),
    [
        ((0, 1), 0.0, 0.0, "2 greedy tokens"),
        ((1, 1), 0.2, 0.125, "2 greedy tokens, 1 of them a near-tie"),
        ((1, 1), 0.1, 0.125, "2 greedy tokens, 1 of them another"),
        ((1, 0), 0.2, 0.5, "2 greedy tokens, 2 of them others"),
    ],
)
def test_a_token_may_be_another_only_within_a_near_tie(
    answer: tuple[int, ...], bound: float, error: float, case: str
) -> None:
    """The last two of the three rows are the answer's."""
    row = answer_row([[0.0, 0.0, 9.0], [4.0, 3.5, 0.0], [2.0, 4.0, 0.0]], answer, bound)
    assert (row.error, row.bound, row.case, row.ok) == (error, bound, case, error <= bound)


def test_the_oracle_holds_one_matrix_in_fp64_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix is cast when it is used, and not kept."""
    alive: list[weakref.ref[Tensor]] = []
    linear, most = torch.nn.functional.linear, 0

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal most
        if weight.dtype == torch.float64:
            gc.collect(0)
            alive.append(weakref.ref(weight))
            most = max(most, sum(ref() is not None for ref in alive))
        return linear(x, weight, bias)

    monkeypatch.setattr(oracle.F, "linear", watched)
    assert check(path).ok
    assert most == 1
    assert len(alive) == 7 * 3 + 1


def test_the_text_is_held_out_and_starts_with_bos(path: Path) -> None:
    with LLM(path) as llm:
        ids = model._text_ids(llm, 96)
        assert len(ids) == 96
        assert ids[0] == llm.tokenizer.bos_token_id
        assert len(set(ids)) > 10
    assert model.lengths(config(128)) == (96, 32)
    assert model.lengths(config(20)) == (15, 5)


def config(context: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=300, **(SIZES | {"max_position_embeddings": context}))
