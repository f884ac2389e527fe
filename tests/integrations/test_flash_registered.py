"""attn_implementation="fastllama_flash": transformers' flash-attention path and continuous batching on our ops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, T5Config, T5EncoderModel
from transformers import modeling_flash_attention_utils as flash_utils

from fastllama.integrations.transformers import register
from fastllama.kernels.dispatch.op import OPS
from tests.integrations.models import BEFORE_5, IDS, LEFT, NEW_TOKENS, SIZES, VOCAB, assert_close, llama

NAME = "fastllama_flash"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [*range(20, 39)]]
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])

if BEFORE_5:
    pytest.skip(
        "transformers 4.57 keeps one flash-attention for all models: see test_flash_versions", allow_module_level=True
    )
register()

Call = Callable[[Any], Tensor]


def on_ours(stock: Any, name: str = NAME) -> Any:
    model = copy.deepcopy(stock)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    return model


@contextmanager
def counted(*ops: str) -> Iterator[dict[str, int]]:
    """The number of calls of each op."""
    calls = dict.fromkeys(ops, 0)
    device = torch.device("cpu")

    def counting(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            calls[op] += 1
            return run(*args)

        return count

    with ExitStack() as stack:
        for op in ops:
            stack.enter_context(OPS[op].bound_to(device, counting(op, OPS[op].bound(device))))
        yield calls


def padded(model: Any) -> Tensor:
    return model(IDS, attention_mask=LEFT).logits[LEFT.bool()]


FORWARDS: dict[str, Call] = {
    "all tokens": lambda model: model(IDS).logits,
    "left padding": padded,
    "packed prompts": lambda model: model(IDS[:1], position_ids=PACKED, use_cache=False).logits,
}


@torch.inference_mode()
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_logits_are_those_of_sdpa(forward: Call) -> None:
    stock = llama()
    with counted("attention_varlen") as calls:
        found = forward(on_ours(stock))
    assert calls["attention_varlen"] == stock.config.num_hidden_layers
    assert_close(found, forward(stock))


def generated(model: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(IDS, attention_mask=LEFT, **options)


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunks"]
)
def test_generates_what_sdpa_does(options: dict[str, Any]) -> None:
    stock = llama()
    assert generated(on_ours(stock), **options).equal(generated(stock, **options))


@torch.inference_mode()
def test_a_model_that_is_no_llama_runs_too() -> None:
    torch.manual_seed(0)
    stock = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()
    assert_close(on_ours(stock)(IDS).logits, stock(IDS).logits)


@torch.inference_mode()
def test_a_sliding_window_is_refused_by_name() -> None:
    model = on_ours(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval())
    with pytest.raises(NotImplementedError, match=r"window_size is \(\d, \d\)"):
        model(IDS)


@torch.inference_mode()
def test_a_model_without_flash_attention_in_transformers_is_refused() -> None:
    """Its attention adds position biases, which would get lost."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = on_ours(T5EncoderModel(T5Config(vocab_size=VOCAB, **sizes)).eval())
    for _ in range(2):
        with pytest.raises(ValueError, match='attn_implementation is "fastllama_flash"; legal for T5PreTrainedModel'):
            model(IDS)


def test_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match="has no backward"):
        on_ours(llama())(IDS)


@torch.inference_mode()
def test_one_graph_holds_a_forward() -> None:
    """In 16 bits, since transformers warns of flash-attention in fp32, which breaks the graph."""
    model = on_ours(llama(torch.bfloat16))
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(IDS, use_cache=False).logits, expected)


@torch.inference_mode()
def test_other_implementations_of_the_process_stay_their_own() -> None:
    """A copy that asks for flash_attention_2, which is not installed, fails as ever, between two calls of ours."""
    stock = llama()
    ours, expected = on_ours(stock), stock(IDS).logits
    for _ in range(2):
        assert_close(ours(IDS).logits, expected)
        with pytest.raises((ImportError, ValueError)):
            copy.deepcopy(stock).set_attn_implementation("flash_attention_2")
        assert_close(ours(IDS).logits, expected)


def test_registering_again_changes_nothing() -> None:
    before = flash_utils._lazy_imports
    register()
    assert flash_utils._lazy_imports is before


def batched(model: Any) -> list[list[int]]:
    """Over a cache for these prompts: by default it takes most of the machine's memory, and fills it with zeros."""
    from transformers import ContinuousBatchingConfig

    size = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    batching = ContinuousBatchingConfig(**{size: 16}, num_blocks=16, max_batch_tokens=32)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {"generation_config": config, "continuous_batching_config": batching}
    outputs = model.generate_batch(PROMPTS, **options, progress_bar=False)
    assert len(outputs) == len(PROMPTS)
    assert not any(output.error for output in outputs.values())
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def test_continuous_batching_generates_what_generate_does() -> None:
    stock = llama()
    with counted("attention_varlen") as calls:
        found = batched(on_ours(stock))
    assert calls["attention_varlen"]
    assert found == one_by_one(stock)


def with_fast_path() -> Any:
    """generate_batch as on a GPU, where it decodes through a page table: one function queries the device."""
    from transformers.generation.continuous_batching import initialization

    decide = initialization.ensure_decode_fast_path_is_available

    def as_on_a_gpu(*args: Any, **kwargs: Any) -> Any:
        fake = ModuleType("torch")
        fake.__dict__.update(torch.__dict__, cuda=mock.Mock(is_available=lambda: True))
        with mock.patch.object(initialization, "torch", fake):
            return decide(*args, **kwargs)

    return mock.patch.object(initialization, "ensure_decode_fast_path_is_available", as_on_a_gpu)


def test_continuous_batching_decodes_through_a_page_table() -> None:
    stock = llama()
    with with_fast_path(), counted("attention_decode") as calls:
        found = batched(on_ours(stock, f"{NAME}_2"))
    assert calls["attention_decode"]
    assert found == one_by_one(stock)
