"""A patched model that is changed is right at the next call, on our ops or on transformers', and never stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastllama
from tests.integrations.models import IDS, SIZES, assert_close, llama, on_our_ops, pair

Change = Callable[[Any], object]  # of a layer


class Doubled(nn.Module):
    """Wraps a weight or a linear layer."""

    def __init__(self, linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x if self.linear is None else self.linear(x))


class TwiceLinear(nn.Linear):
    """A class that another library may put in place of an instance's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def random(like: Tensor) -> nn.Parameter:
    generator = torch.Generator().manual_seed(3)
    return nn.Parameter(0.1 * torch.randn(like.shape, generator=generator))


def set_forward(module: Any) -> None:
    stock = module.forward
    module.forward = lambda *args, **kwargs: 2 * stock(*args, **kwargs)


def new_heads(layer: Any) -> None:
    """Half of the query heads, sliced in place, at the same address."""
    attention = layer.self_attn
    half = attention.q_proj.weight.shape[0] // 2
    attention.q_proj.weight.data = attention.q_proj.weight.data[:half]
    attention.q_proj.out_features = half
    attention.o_proj.weight.data = attention.o_proj.weight.data[:, :half].contiguous()
    attention.o_proj.in_features = half
    attention.num_key_value_groups = half // attention.k_proj.weight.shape[0]


ON_OUR_OPS: dict[str, Change] = {
    "weight in place": lambda layer: layer.self_attn.q_proj.weight.data.mul_(2),
    "data of a fused weight": lambda layer: setattr(
        layer.self_attn.k_proj.weight, "data", random(layer.self_attn.k_proj.weight).data
    ),
    "a fused weight": lambda layer: setattr(layer.mlp.up_proj, "weight", random(layer.mlp.up_proj.weight)),
    "data of a weight": lambda layer: setattr(
        layer.mlp.down_proj.weight, "data", random(layer.mlp.down_proj.weight).data
    ),
    "a weight": lambda layer: setattr(layer.self_attn.o_proj, "weight", random(layer.self_attn.o_proj.weight)),
    "a norm's weight": lambda layer: setattr(layer.input_layernorm, "weight", random(layer.input_layernorm.weight)),
    "a norm's epsilon": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 1.0),
    "a linear layer": lambda layer: setattr(layer.self_attn, "v_proj", copy.deepcopy(layer.self_attn.v_proj)),
    "a square weight turned": lambda layer: setattr(
        layer.self_attn.q_proj.weight, "data", layer.self_attn.q_proj.weight.data.t().contiguous()
    ),
    "fewer query heads": new_heads,
}
ON_TRANSFORMERS: dict[str, tuple[Change, str]] = {
    "a wrapper": (
        lambda layer: setattr(layer.mlp, "down_proj", Doubled(layer.mlp.down_proj)),
        r"down_proj is a .*Doubled",
    ),
    "another class": (
        lambda layer: setattr(layer.self_attn.k_proj, "__class__", TwiceLinear),
        r"k_proj is a .*TwiceLinear",
    ),
    "a hook": (
        lambda layer: layer.mlp.register_forward_hook(lambda module, given, found: 2 * found),
        "LlamaMLP in it has a hook",
    ),
    "a pre-hook": (
        lambda layer: layer.self_attn.o_proj.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
        "Linear in it has a hook",
    ),
    "a forward of its own": (lambda layer: set_forward(layer.mlp), "LlamaMLP in it has a forward of its own"),
    "an activation": (lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()), "activation is a torch.*GELU"),
    "a parametrization": (
        lambda layer: parametrize.register_parametrization(layer.self_attn.q_proj, "weight", Doubled()),
        "q_proj is a .*ParametrizedLinear",
    ),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer.self_attn.q_proj, "weight", 0.5),
        r"q_proj's weight is a torch.Tensor|a hook",
    ),
    "a bias for one": (
        lambda layer: setattr(layer.mlp.up_proj, "bias", random(layer.mlp.up_proj.weight[:, 0])),
        "only some of gate_proj, up_proj have a bias",
    ),
    "another implementation": (
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "sdpa"),
        "attention was set to 'sdpa'",
    ),
    "a weight that is turned": (
        lambda layer: setattr(layer.self_attn.q_proj.weight, "data", layer.self_attn.q_proj.weight.data.t()),
        "q_proj's weight is not contiguous",
    ),
}


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("name", ON_OUR_OPS)
def test_a_change_that_suits_us(name: str, used: bool) -> None:
    stock, patched = pair()
    with torch.inference_mode():
        if used:
            patched(IDS)
    for model in (stock, patched):
        ON_OUR_OPS[name](model.model.layers[1])
    with torch.inference_mode():
        for _ in range(2):
            assert_close(patched(IDS).logits, stock(IDS).logits)
    assert on_our_ops(patched)


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("name", ON_TRANSFORMERS)
def test_a_change_that_does_not(name: str, used: bool) -> None:
    stock, patched = pair()
    change, reason = ON_TRANSFORMERS[name]
    with torch.inference_mode():
        if used:
            patched(IDS)
    for model in (stock, patched):
        change(model.model.layers[1])
    with torch.inference_mode():
        for _ in range(2):
            with pytest.warns(UserWarning, match=f"run transformers' own code: .*{reason}"):
                found = patched(IDS).logits
            assert_close(found, stock(IDS).logits)


@pytest.mark.parametrize(
    "name", sorted(ON_TRANSFORMERS.keys() - {"another implementation"})
)  # with which a model begins
def test_what_does_not_suit_us_is_left_alone_from_the_beginning(name: str) -> None:
    model = llama()
    ON_TRANSFORMERS[name][0](model.model.layers[1])
    before = type(model.model.layers[0]), model.config._attn_implementation
    with torch.inference_mode():
        expected = model(IDS).logits
        with pytest.raises(ValueError, match=r"strict: patched \d of \d layers; not patched: model.layers.1 \("):
            fastllama.patch(model, strict=True)
        assert (type(model.model.layers[0]), model.config._attn_implementation) == before
        with pytest.warns(UserWarning, match=ON_TRANSFORMERS[name][1]):
            report = fastllama.patch(model)
        assert list(report.left) == ["model.layers.1"]
        assert report.patched == SIZES["num_hidden_layers"] - 1
        assert_close(model(IDS).logits, expected)


def test_a_hook_that_is_removed_is_forgotten() -> None:
    stock, patched = pair()
    with torch.inference_mode():
        handle = patched.model.layers[0].mlp.register_forward_hook(lambda module, given, found: 2 * found)
        with pytest.warns(UserWarning, match="a hook"):
            patched(IDS)
        handle.remove()
        assert_close(patched(IDS).logits, stock(IDS).logits)
    assert on_our_ops(patched)


@pytest.mark.parametrize("change", ["data", "weight", "module"])
def test_a_compiled_model_is_not_stale_either(change: str) -> None:
    stock, patched = pair()
    compiled = torch.compile(patched, backend="aot_eager")
    with torch.inference_mode():
        compiled(IDS, use_cache=False)
    for model in (stock, patched):
        linear = model.model.layers[1].self_attn.k_proj
        if change == "data":
            linear.weight.data = random(linear.weight).data
        elif change == "weight":
            linear.weight = random(linear.weight)
        else:
            model.model.layers[1].self_attn.k_proj = Doubled(linear)
    with torch.inference_mode():
        assert_close(compiled(IDS, use_cache=False).logits, stock(IDS).logits)


def test_another_dtype_and_back() -> None:
    stock, patched = pair()
    with torch.inference_mode():
        exact = stock(IDS).logits
        for dtype, bound in ((torch.bfloat16, 0.1), (torch.float64, None), (torch.float32, 0.1)):
            for model in (stock, patched):
                model.to(dtype)
            if bound is None:  # not among our dtypes: by transformers
                with pytest.warns(UserWarning, match=r"q_proj's weight is torch.float64"):
                    assert_close(patched(IDS).logits, stock(IDS).logits)
                continue
            assert patched(IDS).logits.dtype == dtype
            assert_close(patched(IDS).logits, exact, bound=bound)
            assert on_our_ops(patched)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_patched_too_and_of_its_own(again: Callable[[Any], Any]) -> None:
    stock, patched = pair()
    with torch.inference_mode():
        patched(IDS)
        second = again(patched)
        patched.model.layers[0].self_attn.q_proj.weight.data.zero_()
        assert_close(second(IDS).logits, stock(IDS).logits)
    assert on_our_ops(second)


def test_saving_and_loading(tmp_path: Any) -> None:
    stock, patched = pair()
    assert list(patched.state_dict()) == list(stock.state_dict())
    for name, model in (("stock", stock), ("patched", patched)):
        model.save_pretrained(tmp_path / name)
    files = [{file.name: file.stat().st_size for file in (tmp_path / name).iterdir()} for name in ("stock", "patched")]
    assert files[0] == files[1]
    assert (tmp_path / "patched" / "config.json").read_text() == (tmp_path / "stock" / "config.json").read_text()
    with torch.inference_mode():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "patched")(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_are_loaded(assign: bool) -> None:
    _, patched = pair()
    other = llama()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    patched.load_state_dict(other.state_dict(), assign=assign)
    with torch.inference_mode():
        assert_close(patched(IDS).logits, other(IDS).logits)
    assert on_our_ops(patched)


def test_unpatch_gives_the_model_back() -> None:
    stock, patched = pair()
    fastllama.unpatch(patched)
    assert [type(module) for module in patched.modules()] == [type(module) for module in stock.modules()]
    assert [vars(module).keys() for module in patched.modules()] == [vars(module).keys() for module in stock.modules()]
    assert patched.config._attn_implementation == stock.config._attn_implementation
    with torch.inference_mode():
        assert torch.equal(patched(IDS).logits, stock(IDS).logits)
    fastllama.unpatch(patched)  # and again, which is nothing
    assert fastllama.patch(patched).patched == SIZES["num_hidden_layers"]
    assert on_our_ops(patched)


def test_a_second_patch_takes_in_what_is_fit_by_now() -> None:
    model = llama()
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, given, found: None)
    with pytest.warns(UserWarning, match=r"patched \d of \d layers; not patched: model.layers.0 \(.* a hook\)"):
        assert fastllama.patch(model).patched == SIZES["num_hidden_layers"] - 1
    handle.remove()
    report = fastllama.patch(model)
    assert (report.patched, report.norms, report.left) == (SIZES["num_hidden_layers"], 1, {})
    assert str(report) == "patched {0} of {0} layers".format(SIZES["num_hidden_layers"])


def test_other_models_are_not_touched() -> None:
    config = LlamaConfig(**SIZES)
    first, second = (LlamaForCausalLM(config).eval() for _ in range(2))
    assert first.config is second.config
    with torch.inference_mode():
        expected = second(IDS).logits
        fastllama.patch(first)
        assert second.config._attn_implementation == "sdpa"
        assert torch.equal(second(IDS).logits, expected)
    assert type(second.model.layers[0]) is modeling_llama.LlamaDecoderLayer
    assert first.config is first.model.config is first.model.layers[0].self_attn.config
