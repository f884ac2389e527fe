"""A model updated with new weights equals one loaded from them, and stays where it was in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.layers import packing
from fastllama.layers.linear import Bf12Linear, Linear
from fastllama.layers.loading import load_weights
from fastllama.layers.quantization import KINDS
from fastllama.layers.update import update_weights
from fastllama.layers.weights import EMBEDDING, HEAD, hf_tensors

# q, k and v end at rows 64, 80 and 96, gate and up at 160 and 320: within tiles of 64. Groups of 64 and 32 columns.
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 16}
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
NORM, K = "model.norm.weight", Q.replace("q_", "k_")

every_kind = pytest.mark.parametrize("kind", [None, *KINDS])


def config(tied: bool = False, bias: bool = True) -> LlamaConfig:
    return LlamaConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        eos_token_ids=(),
    )


def weights(seed: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Hugging Face tensors of a model, with another scale for each seed, so that all packed values differ."""
    torch.manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in hf_tensors(LlamaForCausalLM(config(tied), device="meta"))}
    return {name: (torch.randn(shape) * 2.0 ** (seed - 4)).to(dtype) for name, shape in shapes.items()}


def loaded(tensors: dict[str, Tensor], kind: str | None = None, tied: bool = False) -> LlamaForCausalLM:
    """A model of these weights, packed or quantized, in bf16."""
    built = LlamaForCausalLM(config(tied), torch.bfloat16)
    load_weights(built, tensors.items())
    packing.apply(built, kind, progress=False)
    return built


def state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """A model's state: parameters, buffers, and exponents as tensors."""
    exponents = {
        f"{name}.exponent": torch.tensor(each.exponent)
        for name, each in model.named_modules()
        if isinstance(each, Bf12Linear)
    }
    return {**model.state_dict(), **exponents}


def assert_same(model: LlamaForCausalLM, expected: LlamaForCausalLM) -> None:
    found, wanted = state(model), state(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def addresses(model: LlamaForCausalLM) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@every_kind
@pytest.mark.parametrize("tied", [False, True])
def test_an_updated_model_is_the_one_that_its_weights_would_make(kind: str | None, tied: bool) -> None:
    model, new = loaded(weights(1, tied), kind, tied), weights(2, tied)
    update_weights(model, new)
    assert_same(model, loaded(new, kind, tied))


@every_kind
@pytest.mark.parametrize("at_once", [False, True])
def test_some_tensors_in_any_order_leave_the_others_as_they_were(kind: str | None, at_once: bool) -> None:
    """A projection of a fused layer can be updated alone, although its rows share tiles and outliers with others."""
    old, new = weights(1), weights(2)
    model = loaded(old, kind)
    some = {name: new[name] for name in reversed([*new]) if "q_proj" in name or "up_proj" in name or name == NORM}
    assert len(some) == 2 * 2 * 2 + 1
    update_weights(model, some if at_once else iter(some.items()))
    assert_same(model, loaded(old | some, kind))
    update_weights(model, iter(new.items()))
    assert_same(model, loaded(new, kind))


@every_kind
@pytest.mark.parametrize("order", ["qkv", "vqk", "q-kv", "kv-q", "v-k-q", "k-v", "qk"])
def test_parts_of_a_fused_layer_come_together_or_apart(kind: str | None, order: str) -> None:
    old, new = weights(1), weights(2)
    model = loaded(old, kind)
    names = [NORM if each == "-" else Q.replace("q_", f"{each}_") for each in order]
    some = {name: new[name] for name in dict.fromkeys(names)}
    if order == "v-k-q":  # each in another round
        for item in some.items():
            update_weights(model, [item])
    else:
        update_weights(model, iter(some.items()))
    assert_same(model, loaded(old | some, kind))


@pytest.mark.parametrize("kind", [kind for kind in (None, *KINDS) if kind != "bf12"])
def test_every_tensor_keeps_its_memory(kind: str | None) -> None:
    model = loaded(weights(1), kind)
    before = addresses(model)
    assert update_weights(model, weights(2)) is False
    assert addresses(model) == before


def test_a_lossless_model_reports_when_buffers_were_replaced() -> None:
    old = weights(4)
    model = loaded(old, "bf12")
    layer = model.layers[1].self_attn.qkv_proj
    assert isinstance(layer, Bf12Linear)
    before = addresses(model)
    assert update_weights(model, {name: -tensor for name, tensor in old.items()}) is False, "as many outliers as before"
    assert addresses(model) == before
    assert_same(model, loaded({name: -tensor for name, tensor in old.items()}, "bf12"))
    tiny = old[Q].clone()
    tiny[0, :3] = 2.0**-100
    assert update_weights(model, {Q: tiny, K: old[K]}) is True, "three outliers more, then as many again"
    assert {name for name, address in addresses(model).items() if address != before[name]} == {
        "layers.1.self_attn.qkv_proj.outliers"
    }
    exponent = layer.exponent
    assert update_weights(model, {Q.replace("q_", f"{each}_"): old[Q.replace("q_", f"{each}_")] * 4 for each in "qkv"})
    assert layer.exponent == exponent + 2
    assert update_weights(model, {NORM: old[NORM]}) is False


@every_kind
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_in_any_float_dtype_and_strides(kind: str | None, source: torch.dtype) -> None:
    model, new = loaded(weights(1), kind), weights(2, dtype=source)
    strided = {name: tensor.unsqueeze(-1).repeat(*[1] * tensor.dim(), 2)[..., 0] for name, tensor in new.items()}
    assert not strided[Q].is_contiguous()
    update_weights(model, {name: nn.Parameter(tensor) for name, tensor in strided.items()})
    assert_same(model, loaded(new, kind))


def test_parameters_can_be_trained_and_updated_again() -> None:
    """An update leaves neither inference tensors nor a graph, whatever mode the caller is in."""
    model = loaded(weights(1))
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.autocast("cpu")):
        with mode:
            update_weights(model, weights(2))
    weight = model.layers[0].self_attn.o_proj.weight
    assert not weight.is_inference()
    weight.requires_grad_()
    update_weights(model, weights(3))
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 2))


def test_an_iterator_is_asked_in_the_callers_mode() -> None:
    """A generator may keep its tensors: they must not be inference tensors, which autograd refuses later."""
    made = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(2).items():
            made.append(tensor.clone())
            yield name, made[-1]

    update_weights(loaded(weights(1)), tensors())
    assert made
    assert not any(tensor.is_inference() for tensor in made)


def test_an_iterators_tensors_are_let_go_one_by_one() -> None:
    """All tensors of a 70B would not fit in memory besides the model."""
    kept: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(2).items():
            assert all(ref() is None for ref in kept)
            copy = tensor.clone()
            kept.append(weakref.ref(copy))
            item = name, copy
            del copy
            yield item
            del item

    for kind in (None, "bf12", "int4"):
        update_weights(loaded(weights(1), kind), tensors())
    assert kept


def test_an_iterator_may_use_one_buffer_for_all() -> None:
    new = weights(2, tied=True)
    new[HEAD] = new[EMBEDDING]
    model = loaded(weights(1, tied=True), "int8", tied=True)
    buffer = torch.empty(max(tensor.numel() for tensor in new.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in new.items():
            held = buffer[: tensor.numel()].view(tensor.shape)
            held.copy_(tensor)
            yield name, held

    update_weights(model, tensors())
    assert_same(model, loaded(new, "int8", tied=True))


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD], [HEAD, EMBEDDING]], ids=str)
@pytest.mark.parametrize("at_once", [False, True])
def test_either_name_fills_tied_embeddings(names: list[str], at_once: bool) -> None:
    model = loaded(weights(1, tied=True), tied=True)
    value = weights(2, tied=True)[EMBEDDING]
    items = [(name, value.clone()) for name in names]
    update_weights(model, items if at_once else iter(items))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, value.bfloat16())


@pytest.mark.parametrize("at_once", [False, True])
def test_tied_embeddings_that_differ_are_refused(at_once: bool) -> None:
    model = loaded(weights(1, tied=True), tied=True)
    value = weights(2, tied=True)[EMBEDDING]
    items = [(HEAD, value), (EMBEDDING, 2 * value)]
    with pytest.raises(ValueError, match=rf"tensor {EMBEDDING} differs from {HEAD}; legal: equal values"):
        update_weights(model, dict(items) if at_once else iter(items))
    assert torch.equal(model.lm_head.weight, weights(1, tied=True)[EMBEDDING].bfloat16()) == at_once


def with_value(value: float) -> Tensor:
    tensor = torch.zeros(64, 64)
    tensor[-1, -1] = value
    return tensor


class Sharded(Tensor):
    """Like DTensor, of which a copy would be only a shard."""


WRONG = [
    ("module.model.norm.weight", torch.ones(64), r"is unexpected: outside of the Llama \(did you mean 'model.norm.wei"),
    ("v_head.summary.weight", torch.ones(64), "is unexpected: outside of the Llama; legal: names such as model.embed"),
    ("model.layers.2.mlp.up_proj.weight", torch.ones(160, 64), "is unexpected: the configuration has num_hidden_layer"),
    ("lm_head.bias", torch.ones(128), "is unexpected: no part of the Llama that the configuration declares"),
    ("model.layers.0.mlp.up_proj.qweight", torch.ones(8, 8, dtype=torch.int32), "belongs to quantized weights; expect"),
    (Q, torch.ones(64, 32), r"has shape \[64, 32\], expected \[64, 64\] by the configuration \(heads"),
    (Q, torch.ones(128, 64), r"has shape \[128, 64\], expected \[64, 64\]"),
    (Q, torch.ones(64), r"has shape \[64\], expected \[64, 64\]"),
    (Q, torch.ones(64, 64, dtype=torch.int8), "has dtype torch.int8, expected float32, bfloat16, float16 or float64"),
    (Q, with_value(float("nan")), "holds NaN or infinity"),
    (Q, with_value(float("-inf")), "holds NaN or infinity"),
    (Q, with_value(3.4e38).double() * 2, r"reaches 6.8e\+38, beyond torch.bfloat16's 3.39e\+38"),
    (Q, torch.ones(64, 64, device="meta"), r"of shape \[64, 64\] is a Tensor of layout torch.strided on meta; legal"),
    (
        Q,
        torch.ones(64, 64).as_subclass(Sharded),
        r"of shape \[64, 64\] is a Sharded of layout torch.strided on cpu; lega",
    ),
    (Q, torch.ones(64, 64).to_sparse(), r"of shape \[64, 64\] is a Tensor of layout torch.sparse_coo on cpu; legal"),
]


@pytest.mark.parametrize("kind", [None, "bf12", "int4"])
@pytest.mark.parametrize(("name", "tensor", "message"), WRONG, ids=[f"{at}-{each[0]}" for at, each in enumerate(WRONG)])
def test_a_wrong_tensor_is_named_before_any_is_written(
    kind: str | None, name: str, tensor: Tensor, message: str
) -> None:
    model = loaded(weights(1), kind)
    new = {key: value for key, value in weights(2).items() if key != name}
    for tensors in ({**new, name: tensor}, [*new.items(), (name, tensor)], {**new, name: tensor}.items()):
        with pytest.raises(ValueError, match=f"^tensor {name} {message}"):
            update_weights(model, tensors)
        assert_same(model, loaded(weights(1), kind))
    with pytest.raises(ValueError, match=f"^tensor {name} {message}"):
        update_weights(model, iter([(UP, new[UP]), (NORM, new[NORM]), (name, tensor)]))
    assert_same(model, loaded({**weights(1), UP: new[UP], NORM: new[NORM]}, kind))


@pytest.mark.parametrize("item", [(Q, [1.0]), (Q, None), (5, torch.ones(64, 64)), (Q, torch.ones(64, 64).numpy())])
def test_what_is_no_name_with_a_tensor_is_refused(item: tuple[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"tensors holds '.*' with a .*; legal: names \(str\) with torch.Tensors"):
        update_weights(loaded(weights(1)), [item])


def test_a_name_that_comes_twice_is_refused() -> None:
    model, new = loaded(weights(1)), weights(2)
    with pytest.raises(ValueError, match=f"tensor {Q} appears twice; legal: each name once"):
        update_weights(model, [(Q, new[Q]), (UP, new[UP]), (Q, new[Q])])
    assert_same(model, loaded(weights(1)))


def test_redundant_tensors_are_passed_over() -> None:
    model = LlamaForCausalLM(config(bias=False))
    old = {name: tensor for name, tensor in weights(1).items() if not name.endswith("bias")}
    load_weights(model, old.items())
    bias = "model.layers.0.self_attn.q_proj.bias"
    update_weights(model, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), bias: torch.zeros(64)})
    assert all(torch.equal(tensor, old[name]) for name, tensor in hf_tensors(model))
    with pytest.raises(ValueError, match=f"tensor {bias} is unexpected: the configuration has attention_bias=False"):
        update_weights(model, {bias: torch.ones(64)})


def test_a_head_packed_in_a_quantized_model_is_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "pays", lambda *_: True)
    model, new = loaded(weights(1), "int4"), weights(2)
    assert isinstance(model.lm_head, Bf12Linear)
    assert update_weights(model, new)
    assert_same(model, loaded(new, "int4"))


def test_layers_keep_their_kind() -> None:
    """Columns that bf12 cannot pack stay, and so do weights without a common scale, until the model is packed anew."""
    wild = weights(1)
    wild[Q] = torch.rand(64, 64).sub(0.5).mul(200).exp2()
    model = loaded(weights(1), "bf12")
    update_weights(model, wild)
    assert isinstance(model.layers[0].mlp.down_proj, Linear)
    assert isinstance(model.layers[1].self_attn.qkv_proj, Bf12Linear)
    assert torch.equal(dict(hf_tensors(model))[Q], wild[Q].bfloat16())
