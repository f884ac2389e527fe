"""A patched model in other people's programs: torch's modes, replaced functions, layers called by hand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.llama import modeling_llama

import fastllama
from tests.integrations.models import (
    CACHE,
    IDS,
    LEFT,
    assert_close,
    cache_of,
    llama,
    on_our_ops,
    pair,
)

Call = Callable[[Any], Tensor]


def bidirectional(model: Any) -> Tensor:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model(IDS, use_cache=False).logits


def under_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(IDS, attention_mask=LEFT).logits[LEFT.bool()]


def in_training_mode(model: Any) -> Tensor:
    """With dropout, which samples its mask without gradients too."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    return model.train()(IDS).logits


def by_hand(model: Any) -> Tensor:
    """Layers without the model, which makes the mask; called with positional arguments as far as possible."""
    x = model.model.embed_tokens(IDS)
    positions = torch.arange(9)[None]
    angles = model.model.rotary_emb(x, positions)
    for layer in model.model.layers[::2]:
        x = layer(x, None, positions, position_embeddings=angles)
    return x


def with_buffers_for_angles(model: Any) -> Tensor:
    """A rotation that writes cosines and sines to the same tensors at every call."""
    stock, kept = model.model.rotary_emb.forward, []

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = stock(x, position_ids)
        if not kept or kept[0].shape != found[0].shape:
            kept[:] = found
        return tuple(old.copy_(new) for old, new in zip(kept, found, strict=True))

    model.model.rotary_emb.forward = forward
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)


def of_narrower_inputs(model: Any) -> Tensor:
    """Inputs narrower than the weights, which transformers' norms widen."""
    return model(inputs_embeds=model.model.embed_tokens(IDS).bfloat16()).logits


def from_an_inference_cache(model: Any) -> Tensor:
    """Filled in inference mode and gone on with outside of it, without gradients and with."""
    with torch.inference_mode():
        cache = cache_of(model(IDS, use_cache=True))
    first = model(IDS[:, :2], **{CACHE: copy.deepcopy(cache)}).logits
    with torch.enable_grad():
        return torch.cat((first, model(IDS[:, :2], **{CACHE: cache}).logits.detach()))


CALLS: dict[str, Call] = {
    call.__name__: call
    for call in (
        bidirectional,
        under_autocast,
        in_training_mode,
        by_hand,
        with_buffers_for_angles,
        of_narrower_inputs,
        from_an_inference_cache,
    )
}


@pytest.mark.filterwarnings("ignore:layers of a patched model run transformers' own code")
@pytest.mark.parametrize("call", CALLS)
def test_a_call_out_of_the_ordinary(call: str) -> None:
    stock, patched = pair()
    with torch.no_grad():
        assert_close(CALLS[call](patched), CALLS[call](stock), bound=0.02 if "narrower" in call else 1e-5)


def test_a_gradient_goes_through_layers_called_by_hand() -> None:
    stock, patched = pair()
    by_hand(stock).sum().backward()
    with pytest.warns(UserWarning, match="gradients are required"):
        by_hand(patched).sum().backward()
    ours, theirs = (model.model.layers[0].self_attn.v_proj.weight.grad for model in (patched, stock))
    assert_close(ours, theirs)


def test_fake_tensors_reach_no_kernel() -> None:
    """An address of a tensor that holds nothing would end the process."""
    _, patched = pair()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert patched(IDS, use_cache=False).logits.shape == (3, 9, 97)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "input_layernorm"])
def test_nor_does_a_weight_that_is_two_tensors(name: str) -> None:
    stock, patched = pair()
    for model in (stock, patched):
        owner = model.model.layers[1].get_submodule(name)
        weight = owner.weight.detach()
        owner.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with torch.no_grad():
        expected = stock(IDS, use_cache=False).logits
        with pytest.warns(UserWarning, match="weight is a .*TwoTensor"):
            found = patched(IDS, use_cache=False).logits
    assert_close(found.a if type(found) is TwoTensor else found, getattr(expected, "a", expected))


def test_a_mask_of_the_callers_is_never_taken_for_ours() -> None:
    """Integers are none of SDPA's masks."""
    stock, patched = pair()
    mask = torch.ones(3, 1, 9, 9, dtype=torch.int32)
    for model in (stock, patched):
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            model(IDS, attention_mask=mask)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement function by another library."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    return run


REPLACED = {
    "attention": (modeling_llama.LlamaAttention, "forward", RuntimeError),
    "MLP": (modeling_llama.LlamaMLP, "forward", None),
    "norm": (modeling_llama.LlamaRMSNorm, "forward", None),
    "rotation": (modeling_llama, "apply_rotary_pos_emb", None),
}


@pytest.mark.filterwarnings("ignore:patched 0 of")
@pytest.mark.filterwarnings("ignore:layers of a patched model run transformers' own code")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_function_that_is_replaced_for_all_models(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way to add long contexts, fused kernels and adapters."""
    owner, attribute, error = REPLACED[name]
    stock, patched = llama(), llama()
    if when == "after":
        fastllama.patch(patched)
    monkeypatch.setattr(owner, attribute, doubled(getattr(owner, attribute)))
    if when == "before":
        assert fastllama.patch(patched).patched == 0
    with torch.no_grad():
        if error is not None and when == "after":
            with pytest.raises(error, match=r"not accept the masks of a patched model: fastllama.unpatch\(model\)"):
                patched(IDS)
            fastllama.unpatch(patched)
        assert_close(patched(IDS).logits, stock(IDS).logits)


@pytest.fixture
def hook_of_all_modules() -> Iterator[None]:
    def double(module: nn.Module, given: Any, found: Any) -> Any:
        return 2 * found if isinstance(module, modeling_llama.LlamaMLP) else None

    handle = torch_module.register_module_forward_hook(double)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_of_all_modules")
@pytest.mark.filterwarnings("ignore:patched 0 of")
@pytest.mark.filterwarnings("ignore:layers of a patched model run transformers' own code")
def test_a_hook_of_all_modules() -> None:
    stock = llama()
    patched = copy.deepcopy(stock)
    fastllama.patch(patched)
    with torch.no_grad():
        assert_close(patched(IDS).logits, stock(IDS).logits)


class Loud(modeling_llama.LlamaAttention):
    """A user's own attention, which adds the mask that it gets."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = inspect.signature(super().forward).bind(hidden_states, *args, **kwargs).arguments.get("attention_mask")
        scores = torch.zeros(3, 1, 9, 9) if mask is None else torch.zeros(3, 1, 9, 9).masked_fill(~mask, -10)
        found, weights = super().forward(hidden_states, *args, **kwargs)
        return found + scores.mean(), weights


def test_a_model_with_an_attention_of_its_own_keeps_its_masks() -> None:
    stock = llama()
    stock.model.layers[1].self_attn.__class__ = Loud
    patched = copy.deepcopy(stock)
    with pytest.warns(UserWarning, match=r"patched 0 of \d layers; .*model.layers.1.self_attn is a .*Loud"):
        report = fastllama.patch(patched)
    assert report.norms > 0
    assert patched.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert_close(patched(IDS, attention_mask=LEFT).logits, stock(IDS, attention_mask=LEFT).logits, LEFT)


def test_one_that_comes_later_is_refused_a_mask_that_it_cannot_read() -> None:
    _, patched = pair()
    patched.model.layers[1].self_attn.__class__ = Loud
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"self_attn is a .*Loud, which does not accept the masks"):
        patched(IDS, attention_mask=LEFT)


def test_weights_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        stock = llama()
        patched = copy.deepcopy(stock)
        fastllama.patch(patched, strict=True)
        assert_close(patched(IDS).logits, stock(IDS).logits)
        assert on_our_ops(patched)


def test_weights_that_processes_share_stay_shared() -> None:
    model = llama().share_memory()
    with pytest.warns(UserWarning, match="q_proj's weight is in memory shared between processes"):
        assert fastllama.patch(model).patched == 0
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_old_weights_are_not_kept_beside_new_ones() -> None:
    _, patched = pair()
    with torch.no_grad():
        patched(IDS)
        whole = [ref(layer._fastllama.linears[0]) for layer in patched.model.layers]
        assert None not in [fused() for fused in whole]
        patched.bfloat16()
        assert [fused() for fused in whole] == [None] * len(whole)


def test_a_forward_that_a_user_sets_outlives_unpatch() -> None:
    stock, patched = pair()
    for model in (stock, patched):
        for module in (model.model.layers[1], model.model.norm):
            module.forward = doubled(module.forward)
    with torch.no_grad():
        assert_close(patched(IDS).logits, stock(IDS).logits)
        fastllama.unpatch(patched)
        assert_close(patched(IDS).logits, stock(IDS).logits)
