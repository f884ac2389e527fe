"""fastllama.from_transformers: a transformers Llama answers through LLM with its own tokens, from its own memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import fastllama
from fastllama import LLM, SamplingParams
from tests.integrations.models import IDS, INTERPRETED, NEW_TOKENS, SIZES, VOCAB, assert_close, llama, on_our_ops
from tests.integrations.test_patch import ROPES, SHAPES

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
FUSED = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]


def greedy(model: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    """The tokens that transformers generates."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def endless(model: Any) -> list[list[int]]:
    return [greedy(model, prompt, eos_token_id=VOCAB + 1) for prompt in PROMPTS]


def running(model: Any, **options: Any) -> LLM:
    return LLM(model, **({"kv_cache_tokens": 1024, "progress": False} | options))


def answers(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]


def log_probs(llm: LLM, prompt: Sequence[int]) -> Tensor:
    """Log-probabilities of the prompt's tokens except the first."""
    (output,) = llm.generate([list(prompt)], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    return torch.tensor([entry.logprob for entry in output.prompt_logprobs if entry is not None])


@torch.no_grad()
def expected_log_probs(model: Any, prompt: Sequence[int]) -> Tensor:
    ids = torch.tensor([prompt])
    found: Tensor = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found


def tensors(model: Any) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]


def nbytes(*models: Any) -> int:
    """Bytes of memory that parameters take, what they share once."""
    spans = {(p.data_ptr(), p.data_ptr() + p.nbytes) for model in models for p in model.parameters()}
    total = end = 0
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0)
        end = max(end, last)
    return total


def assert_shared(ours: fastllama.LlamaForCausalLM, theirs: Any) -> None:
    """Each of our parameters shares memory with one of theirs, and all together take no more than theirs."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in theirs.parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.untyped_storage().data_ptr() in storages, name
    assert nbytes(ours, theirs) == nbytes(theirs) == nbytes(ours)


@pytest.mark.parametrize("shape", ["plain", *SHAPES])
def test_tokens_are_those_of_generate(shape: str) -> None:
    theirs = llama(**SHAPES.get(shape, {}))
    before = endless(theirs)
    ours = fastllama.from_transformers(theirs)
    assert_shared(ours, theirs)
    with running(ours) as llm:
        assert answers(llm) == before
    assert endless(theirs) == before


@pytest.mark.parametrize("rope", ["default", *ROPES])
def test_log_probabilities_are_those_of_transformers_in_a_scaled_context(rope: str) -> None:
    """Longer than what ropes stretch, but for the dynamic one: its base moves in transformers with every length."""
    theirs = llama(**SHAPES.get(rope, {}))
    length = 12 if INTERPRETED else 100 if rope in ("default", "linear") else 63
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    with running(theirs) as llm:
        torch.testing.assert_close(log_probs(llm, prompt), expected_log_probs(theirs, prompt), rtol=0, atol=2e-5)


def test_end_tokens_are_those_of_the_generation_config() -> None:
    theirs = llama()
    free = endless(theirs)
    ends = free[0][NEW_TOKENS // 2], free[1][1]
    theirs.config.eos_token_id = 3
    theirs.generation_config.eos_token_id = list(ends)
    expected = [greedy(theirs, prompt) for prompt in PROMPTS]
    assert expected != free
    ours = fastllama.from_transformers(theirs)
    assert ours.config.eos_token_ids == ends
    with running(ours) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        for output, tokens in zip(llm.generate(PROMPTS, params), expected, strict=True):
            found = [*output.outputs[0].token_ids]
            assert found == tokens or [*found, tokens[-1]] == tokens  # without the end token itself
            assert (output.outputs[0].finish_reason == "stop") == (tokens[-1] in ends)
    theirs.generation_config.eos_token_id = None
    assert fastllama.from_transformers(theirs).config.eos_token_ids == (3,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_transformers(dtype: torch.dtype) -> None:
    theirs = llama(dtype)
    prompt = IDS.flatten().tolist()
    exact = expected_log_probs(copy.deepcopy(theirs).float(), prompt)
    plain = (expected_log_probs(theirs, prompt) - exact).norm()
    ours = fastllama.from_transformers(theirs)
    assert ours.dtype == dtype
    assert_shared(ours, theirs)
    with running(ours) as llm:
        error = (log_probs(llm, prompt) - exact).norm()
    assert 0 < error < 1.5 * plain


class Watch(TorchDispatchMode):
    """Counts, at each torch.cat of matrices, how many of those fused before still have their old memory."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self._old = [[StorageWeakRef(tensor.untyped_storage()) for tensor in group] for group in groups]
        self.left: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default and args[0][0].ndim == 2:
            before = self._old[: len(self.left)]
            self.left.append(sum(not old.expired() for group in before for old in group))
        return func(*args, **(kwargs or {}))


def test_no_more_than_one_matrix_is_there_twice() -> None:
    theirs = llama()
    groups = [
        [layer.get_submodule(owner).get_submodule(name).weight for name in names]
        for layer in theirs.model.layers
        for owner, names in FUSED
    ]
    with Watch([[weight.data for weight in group] for group in groups]) as watch:
        fastllama.from_transformers(theirs)
    assert watch.left == [0] * len(groups)


def test_what_is_written_to_either_is_in_both() -> None:
    theirs = llama()
    ours = fastllama.from_transformers(theirs)
    with running(ours) as llm:
        before = answers(llm)
        layer = theirs.model.layers[1]
        with torch.no_grad():
            for tensor in (layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj, theirs.model.norm):
                tensor.weight.mul_(-1.5)
            theirs.model.embed_tokens.weight.mul_(2)
            theirs.lm_head.weight.neg_()
        llm.reset_prefix_cache()
        changed = answers(llm)
        assert changed != before
        assert changed == endless(theirs)
        name = "model.layers.0.self_attn.q_proj.weight"
        llm.update_weights({name: theirs.state_dict()[name] * 3})
        assert answers(llm) == endless(theirs) != changed


def test_a_step_of_training_is_in_ours() -> None:
    theirs = llama().train()
    ours = fastllama.from_transformers(theirs)
    assert theirs.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    before = endless(theirs.eval())
    optimizer = torch.optim.SGD(theirs.train().parameters(), lr=30.0)
    theirs(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert_shared(ours, theirs)
    with running(ours) as llm:
        assert answers(llm) == endless(theirs.eval()) != before


@pytest.mark.parametrize("first", ["patch", "from_transformers"])
def test_a_patched_model_shares_too(first: str) -> None:
    theirs = llama(attention_bias=True)
    before = endless(theirs)
    if first == "patch":
        fastllama.patch(theirs, strict=True)
    ours = fastllama.from_transformers(theirs)
    places = [tensor.data_ptr() for tensor in tensors(theirs)]
    assert fastllama.patch(theirs, strict=True).patched == SIZES["num_hidden_layers"]
    with torch.inference_mode():
        assert on_our_ops(theirs)
        assert endless(theirs) == before
    assert [tensor.data_ptr() for tensor in tensors(theirs)] == places
    assert_shared(ours, theirs)
    with running(ours) as llm:
        assert answers(llm) == before
    fastllama.unpatch(theirs)
    assert_shared(fastllama.from_transformers(theirs), theirs)


def test_twice_is_the_same_memory() -> None:
    theirs = llama(tie_word_embeddings=True)
    first, second = fastllama.from_transformers(theirs), fastllama.from_transformers(theirs)
    assert_shared(first, theirs)
    assert_shared(second, theirs)


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_tied_is_what_the_model_is(sizes: dict[str, Any]) -> None:
    theirs = llama(**sizes)
    theirs.config.tie_word_embeddings = not theirs.config.tie_word_embeddings  # no weight shows this
    ours = fastllama.from_transformers(theirs)
    assert ours.config.tie_word_embeddings is bool(sizes)
    assert (ours.lm_head.weight is ours.embed_tokens.weight) is bool(sizes)
    with running(ours) as llm:
        assert answers(llm) == endless(theirs)


@pytest.mark.parametrize("has", [True, False])
def test_biases_are_what_the_layers_have(has: bool) -> None:
    theirs = llama(attention_bias=has, mlp_bias=has)
    theirs.config.attention_bias = theirs.config.mlp_bias = not has
    ours = fastllama.from_transformers(theirs)
    assert ours.config.attention_bias is ours.config.mlp_bias is has
    assert_shared(ours, theirs)
    with running(ours) as llm:
        assert answers(llm) == endless(theirs)


def test_each_norm_has_its_own_epsilon() -> None:
    theirs = llama()
    theirs.model.layers[1].input_layernorm.variance_epsilon = 0.5
    theirs.model.norm.variance_epsilon = 2.0
    prompt = IDS[0].tolist()
    with running(theirs) as llm:
        torch.testing.assert_close(log_probs(llm, prompt), expected_log_probs(theirs, prompt), rtol=0, atol=2e-5)


def test_what_transformers_collected_before_is_no_hook_of_others() -> None:
    """transformers 4.57 leaves an instance forward in each layer, and 5 hooks."""
    theirs = llama()
    with torch.inference_mode():
        theirs(IDS, output_hidden_states=True, output_attentions=True)
    with running(theirs) as llm:
        assert answers(llm) == endless(theirs)


def test_it_is_saved_as_any_model_of_ours(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    fastllama.save_model(fastllama.from_transformers(theirs), tmp_path / "saved")
    with running(tmp_path / "saved") as llm:
        assert answers(llm) == endless(theirs)


def test_a_model_of_inference_mode() -> None:
    with torch.inference_mode():
        theirs = llama()
    ours = fastllama.from_transformers(theirs)
    assert_shared(ours, theirs)
    with torch.inference_mode(), running(ours) as llm:
        assert answers(llm) == endless(theirs)


def test_copies_and_files_of_the_model_are_whole_and_no_larger(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "before")
    ours = fastllama.from_transformers(theirs)
    theirs.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert sizes[0] == sizes[1]
    copied, opened = copy.deepcopy(theirs), LlamaForCausalLM.from_pretrained(tmp_path / "after")
    with torch.inference_mode():
        expected = theirs(IDS).logits
        assert_close(opened(IDS).logits, expected)
        assert_close(copied(IDS).logits, expected)
    assert nbytes(theirs, copied) == 2 * nbytes(theirs)
    assert_shared(ours, theirs)


def test_each_lives_without_the_other() -> None:
    theirs = llama(attention_bias=True)
    expected = endless(theirs)
    ours = fastllama.from_transformers(theirs)
    dead = weakref.ref(theirs)
    del theirs
    gc.collect()
    assert dead() is None
    rubbish = [torch.full((1 << 14,), 1e9) for _ in range(64)]  # in what memory was freed
    with running(ours) as llm:
        assert answers(llm) == expected
    theirs = llama(attention_bias=True)
    ours = fastllama.from_transformers(theirs)
    gone = weakref.ref(ours)
    del ours, llm
    gc.collect()
    assert gone() is None
    rubbish += [torch.full((1 << 14,), 1e9) for _ in range(64)]
    assert endless(theirs) == expected


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
def test_a_model_that_was_trained_with_checkpoints() -> None:
    """transformers leaves a hook on the embedding that asks for gradients."""
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert model.model.embed_tokens._forward_hooks
    assert fastllama.from_transformers(model).dtype == torch.float32
