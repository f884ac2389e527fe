"""A patched model of quantized linear layers that is changed is right at the next call, as in test_changes.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastllama
from fastllama.integrations.transformers.linears import HF_LINEARS, HfInt4Linear
from fastllama.quant.rounding import round_to_nearest
from tests.integrations.models import IDS, assert_close
from tests.integrations.quantized import KINDS, NUM_LAYERS, TILES, addresses, counted, logits, pair
from tests.integrations.test_changes import through_pickle, through_torch_save
from tests.rounds import exhaustive


class TwiceInt4Linear(HfInt4Linear):
    """A linear layer of another library."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(x)


def other(linear: Any) -> Any:
    """A layer like it, of other numbers."""
    torch.manual_seed(5)
    weight = 0.1 * torch.randn(linear.out_features, linear.in_features)
    return HF_LINEARS[linear.kind].of(round_to_nearest(weight, linear.kind, linear.group_size), linear.bias)


def set_data(linear: Any, name: str) -> None:
    getattr(linear, name).data = getattr(other(linear), name)


def assign(linear: Any, name: str) -> None:
    setattr(linear, name, getattr(other(linear), name).clone())


def write(linear: Any, name: str) -> None:
    getattr(linear, name).copy_(getattr(other(linear), name))


def load(linear: Any, name: str) -> None:
    linear.load_state_dict(other(linear).state_dict(), assign=name == "assign")


Change = tuple[Callable[[Any, str], object], str]
CHANGES: dict[str, Change] = {
    f"{change.__name__} {name}": (change, name) for change in (set_data, assign, write) for name in ("packed", "scales")
} | {
    "load": (load, "copy"),
    "load by assigning": (load, "assign"),
    "fewer groups": (lambda linear, name: assign_groups(linear), ""),
    "another dtype": (lambda linear, name: linear.double(), ""),
}


def assign_groups(linear: Any) -> None:
    """Groups of 64 columns in place of 32: as many packed values, half as many scales."""
    linear.scales = linear.scales[:, ::2].contiguous()


PLACES = ["self_attn.k_proj", exhaustive("self_attn.o_proj"), exhaustive("mlp.gate_proj"), "mlp.down_proj"]


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_quantized_layer_is_noticed(name: str, place: str, used: bool) -> None:
    plain, patched = pair(sizes=TILES | {"num_hidden_layers": 2})
    before = logits(patched) if used else logits(plain)
    change, which = CHANGES[name]
    for model in (plain, patched):
        with torch.no_grad():
            change(model.model.layers[1].get_submodule(place), which)
    for _ in range(2):
        with counted() as found:
            after = logits(patched)
        assert_close(after, logits(plain))
    assert found["matmul_int4"] >= 8
    if name != "another dtype":
        assert not torch.equal(after, before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["another", "a dense one", "another kind"])
def test_a_layer_that_is_replaced_is_noticed(what: str, place: str) -> None:
    plain, patched = pair()
    before = logits(patched)
    for model in (plain, patched):
        owner, _, name = place.rpartition(".")
        linear = other(model.model.layers[1].get_submodule(place))
        if what != "another":
            dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
            dense.weight = nn.Parameter(linear.weight)
            linear = (
                dense if what == "a dense one" else HF_LINEARS["int8"].of(round_to_nearest(linear.weight, "int8"), None)
            )
        setattr(model.model.layers[1].get_submodule(owner), name, linear)
    with counted() as found:
        after = logits(patched)
    assert found.total() in (4 * NUM_LAYERS, 4 * NUM_LAYERS + 1, 4 * NUM_LAYERS + 2)
    assert_close(after, logits(plain))
    assert not torch.equal(after, before)


def test_a_bias_that_comes_later_is_noticed() -> None:
    plain, patched = pair()
    for model in (plain, patched):
        model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(TILES["hidden_size"]))
    assert_close(logits(patched), logits(plain))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "another class": (
        lambda layer: setattr(layer.self_attn.k_proj, "__class__", TwiceInt4Linear),
        "k_proj is a .*TwiceInt4Linear",
    ),
    "a hook": (
        lambda layer: layer.self_attn.o_proj.register_forward_hook(lambda module, given, found: 2 * found),
        "HfInt4Linear in it has a hook",
    ),
    "a forward of its own": (
        lambda layer: setattr(layer.mlp.up_proj, "forward", lambda x: 0 * x[..., :1] + torch.ones(192)),
        "HfInt4Linear in it has a forward of its own",
    ),
    "a bias for one": (
        lambda layer: setattr(layer.mlp.up_proj, "bias", nn.Parameter(torch.ones(192))),
        "only some of gate_proj, up_proj have a bias",
    ),
    "a bias that is no parameter": (
        lambda layer: setattr(layer.mlp.down_proj, "bias", torch.ones(TILES["hidden_size"])),
        "down_proj's bias is a torch.Tensor",
    ),
    "scales that are not contiguous": (
        lambda layer: setattr(
            layer.self_attn.q_proj, "scales", torch.cat([layer.self_attn.q_proj.scales] * 2, -1)[:, :4]
        ),
        "q_proj's scales is not contiguous",
    ),
}


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_does_not_suit_us(name: str, used: bool) -> None:
    plain, patched = pair()
    change, reason = REFUSED[name]
    if used:
        logits(patched)
    for model in (plain, patched):
        change(model.model.layers[1])
    with pytest.warns(UserWarning, match=f"run transformers' own code: .*{reason}"):
        found = logits(patched)
    assert_close(found, logits(plain))
    with pytest.warns(UserWarning, match=rf"not patched: model.layers.1 \(.*{reason}"):
        assert fastllama.patch(plain).left.keys() == {"model.layers.1"}


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_patched_too_and_of_its_own(kind: str, again: Callable[[Any], Any]) -> None:
    _, patched = pair(kind)
    expected = logits(patched)
    second = again(patched)
    patched.model.layers[0].self_attn.q_proj.packed.zero_()
    with counted() as found:
        assert torch.equal(logits(second), expected)
    assert found == {f"matmul_{kind}": 4 * NUM_LAYERS}
    assert not torch.equal(logits(patched), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_and_patch_again(kind: str) -> None:
    plain, patched = pair(kind)
    expected = logits(patched)
    where = addresses([patched])
    fastllama.unpatch(patched)
    assert [type(module) for module in patched.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(logits(patched), logits(plain))
    assert addresses([patched]) == where
    assert fastllama.patch(patched, strict=True).patched == NUM_LAYERS
    assert torch.equal(logits(patched), expected)


def test_another_dtype_and_back() -> None:
    _, patched = pair()
    expected = logits(patched)
    for dtype in (torch.bfloat16, torch.float32):
        patched.to(dtype)
        assert patched.model.layers[0].mlp.up_proj.scales.dtype == torch.float32
        with counted() as found:
            assert logits(patched).dtype == dtype
        assert found == {"matmul_int4": 4 * NUM_LAYERS}
    assert_close(logits(patched), expected, bound=0.1)  # norms and embeddings were rounded


@pytest.mark.parametrize("change", ["write packed", "assign packed", exhaustive("set_data packed"), "set_data scales"])
def test_a_compiled_model_is_not_stale_either(change: str) -> None:
    plain, patched = pair()
    compiled = torch.compile(patched, backend="aot_eager")
    with torch.inference_mode():
        compiled(IDS, use_cache=False)
    run, name = CHANGES[change]
    for model in (plain, patched):
        with torch.no_grad():
            run(model.model.layers[1].self_attn.k_proj, name)
    with torch.inference_mode():
        assert_close(compiled(IDS, use_cache=False).logits, logits(plain))
