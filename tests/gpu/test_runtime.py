"""The runtime on the device: its graphs give what the modules give, and a step waits for the device once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.layers import packing
from fastllama.runtime import sampler
from fastllama.runtime.graphs import DecodeGraphs
from fastllama.runtime.inputs import Inputs
from fastllama.runtime.runner import Runner
from fastllama.runtime.sampler import StepLogits
from fastllama.runtime.speculation import Pace

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 3, 8], list(range(20)), [7] * 300, [11] * 64, [2]]
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=2048,
    eos_token_ids=(),
)


@pytest.fixture
def model(kind: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(CONFIG, torch.bfloat16, "cuda")
    for parameter in made.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    if kind != "bf16":
        packing.quantize(made, kind, progress=False)
    return made


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those of every draw."""
    found, start = [], sampler.start

    def spying(step: StepLogits) -> sampler.Draws:
        found.append(step.logits.clone())
        return start(step)

    monkeypatch.setattr(sampler, "start", spying)
    return found


def generate(model: LlamaForCausalLM, **options: Any) -> list[tuple[int, ...]]:
    """Requests that end one after another."""
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=8 + 6 * i) for i in range(len(PROMPTS))]
    with LLM(model, kv_cache_tokens=4096, max_model_len=1024, progress=False, **options) as llm:
        return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "int4", "int8", "w8a8"])
def test_graphs_give_what_the_modules_give(model: LlamaForCausalLM, logits: list[Tensor], deterministic: bool) -> None:
    """Bit for bit: rows of padding change nothing."""
    replayed = generate(model, deterministic=deterministic)
    of_graphs = logits[-(8 + 6 * (len(PROMPTS) - 1)) :]
    handle = model.layers[0].register_forward_hook(lambda *args: None)
    written = generate(model, deterministic=deterministic)
    handle.remove()
    of_modules = logits[-len(of_graphs) :]
    assert replayed == written
    for ours, theirs in zip(of_graphs, of_modules, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["bf16"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_pages_come_back_from_the_host_as_they_were(model: LlamaForCausalLM, kv_cache_dtype: str) -> None:
    """Preempted requests give the tokens that they give where nobody is."""
    sizes: dict[str, Any] = {"max_model_len": 384, "deterministic": True, "progress": False}
    prompts = [[seed] * length for seed, length in enumerate((60, 130, 190, 100, 70, 220))]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=100)
    found = []
    for kv_cache_tokens, host_cache_tokens in ((4096, 0), (512, 4096)):
        tokens = {"kv_cache_tokens": kv_cache_tokens, "host_cache_tokens": host_cache_tokens}
        with LLM(model, kv_cache_dtype=kv_cache_dtype, **tokens, **sizes) as llm:
            found.append([each.outputs[0].token_ids for each in llm.generate(prompts, params)])
            assert (llm.engine.pool.num_host_hit_tokens > 0) == (host_cache_tokens > 0)
    assert found[0] == found[1]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replayed steps that raise where one waits for the device or asks it for memory; gives how many there were."""
    steps, run = [0], DecodeGraphs.run

    def strictly(self: DecodeGraphs, inputs: Inputs, *fill: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = self._capture.shape(inputs.num_decodes, len(inputs.page_table[0]))
        if (*shape, inputs.num_queries) not in self._graphs:
            return run(self, inputs, *fill)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run(self, inputs, *fill)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        steps[0] += 1
        return found

    monkeypatch.setattr(DecodeGraphs, "run", strictly)
    return steps


@pytest.mark.parametrize("kind", ["bf16"])
def test_a_replayed_step_waits_for_nothing(model: LlamaForCausalLM, replays: list[int]) -> None:
    generate(model)
    assert replays[0] >= 8 + 6 * (len(PROMPTS) - 1) - 1


@pytest.mark.parametrize("kind", ["bf16"])
def test_running_ahead_changes_no_answer(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that go from step to step on the device, in one batch and from batch to batch."""
    ahead = generate(model, deterministic=True)
    init = Runner.__init__

    def waiting(self: Runner, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.runs_ahead = False

    monkeypatch.setattr(Runner, "__init__", waiting)
    assert generate(model, deterministic=True) == ahead


@pytest.mark.parametrize("kind", ["bf16"])
@pytest.mark.parametrize("own", [False, True])
def test_guesses_change_no_answer(model: LlamaForCausalLM, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the text, and the model's own as its draft, verified wherever there are any."""
    expected = generate(model, deterministic=True)
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    speculation = copy.deepcopy(model) if own else "prompt_lookup"
    assert generate(model, deterministic=True, speculation=speculation) == expected
