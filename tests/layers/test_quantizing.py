"""A model quantized in place, block by block: what becomes of it, what stays, what is refused, and how to go on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.layers import packing, quantizing
from fastllama.layers.config import LlamaConfig
from fastllama.layers.linear import Linear
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import METHODS
from fastllama.layers.quantized import LINEARS as KINDS
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.quantizing import quantize
from fastllama.layers.rescaling import GATE_UP, LINEARS
from fastllama.layers.weights import hf_tensors
from fastllama.quant.activations import Activations
from fastllama.verify import oracle, plant_outliers
from tests.layers.test_loading_packed import assert_same, state
from tests.quant.memory import MemoryWatch
from tests.rounds import exhaustive

torch.set_num_threads(1)  # these models are too small for two, and the tests may run in several processes

VOCAB = 64
GQA = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    eos_token_ids=(),
)
SHAPES = {
    "GQA": GQA,
    "MHA, one block": replace(GQA, num_key_value_heads=4, num_hidden_layers=1),
    "MQA": replace(GQA, num_key_value_heads=1),
    "tied": replace(GQA, tie_word_embeddings=True),
    "biases": replace(GQA, attention_bias=True, mlp_bias=True),
    "odd sizes": replace(GQA, hidden_size=100, intermediate_size=50, head_dim=18),
}
RECIPES = [(method, scheme) for method, schemes in METHODS.items() for scheme in schemes]
recipes = pytest.mark.parametrize(("method", "scheme"), RECIPES)
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


DOCUMENTS = texts(1, 30, 64, 20)


def random_model(config: LlamaConfig = GQA, dtype: torch.dtype = torch.float32, seed: int = 1) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config, dtype)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15 if parameter.dim() == 2 else 0.3).add_(parameter.dim() == 1)
    return model


def quantized(
    method: str, scheme: str, config: LlamaConfig = GQA, dtype: torch.dtype = torch.float32, **options: Any
) -> LlamaForCausalLM:
    model = random_model(config, dtype)
    quantize(model, scheme, method, **({"documents": DOCUMENTS, "progress": False} | options))
    return model


def logits(model: LlamaForCausalLM, ids: Sequence[int]) -> Tensor:
    """By the explicit formulas, in fp64, of the weights that quantized values stand for."""
    weights = {name: tensor.double() for name, tensor in hf_tensors(model)}
    *_, found = oracle.forward(model.config, weights, torch.tensor(ids), torch.float64, len(ids))
    return found


def divergence(model: LlamaForCausalLM, exact: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """The mean KL divergence of a model's tokens from those of the exact one."""
    found = torch.cat([logits(model, ids) for ids in documents]).log_softmax(-1)
    wanted = torch.cat([logits(exact, ids) for ids in documents]).log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@recipes
@dtypes
def test_linear_layers_of_blocks_are_quantized_and_nothing_else(method: str, scheme: str, dtype: torch.dtype) -> None:
    config = SHAPES["biases"]
    model, before = quantized(method, scheme, config, dtype), random_model(config, dtype)
    for block, dense in zip(model.layers, before.layers, strict=True):
        for name in LINEARS:
            layer, linear = block.get_submodule(name), dense.get_submodule(name)
            assert type(layer) is KINDS[scheme]
            assert layer.scales.dtype == layer.bias.dtype == dtype
            assert (layer.zeros is not None) == (method == "hqq")
            assert layer.group_size == (32 if scheme == "int4" and layer.in_features % 64 else layer.group_size)
            scaled = method.startswith(("awq", "smooth")) and name != "self_attn.o_proj"
            assert torch.equal(layer.bias, linear.bias) or scaled
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = block.get_parameter(f"{norm}.weight")
            assert weight.dtype == dtype
            assert torch.equal(weight, dense.get_parameter(f"{norm}.weight")) != method.startswith(("awq", "smooth"))
    for name in ("embed_tokens", "lm_head", "norm"):
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
    assert type(model.lm_head) is Linear
    assert model.num_parameters == before.num_parameters
    assert not any(parameter.requires_grad for parameter in model.parameters())


@shapes
@recipes
def test_any_shape_loses_little(config: LlamaConfig, method: str, scheme: str) -> None:
    """Of half a step in 8 (int4) or 127 the divergence is 0.4 and 0.003 at most here, and it is never 0."""
    model = quantized(method, scheme, config)
    lost = divergence(model, random_model(config), DOCUMENTS)
    assert 0 < lost < (0.8 if scheme == "int4" else 0.006)
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tie_word_embeddings


@shapes
@dtypes
@pytest.mark.parametrize("scheme", KINDS)
def test_rtn_gives_what_packing_gives(config: LlamaConfig, scheme: str, dtype: torch.dtype) -> None:
    """Bit for bit: it goes by way of fp32."""
    expected = random_model(config, dtype)
    packing.quantize(expected, scheme, progress=False)
    assert_same(quantized("rtn", scheme, config, dtype, documents=()), expected)


@recipes
def test_the_same_gives_the_same(method: str, scheme: str) -> None:
    first, second = (quantized(method, scheme, dtype=torch.bfloat16) for _ in range(2))
    assert_same(second, first)
    again = quantized(method, scheme, dtype=torch.bfloat16, documents=[torch.tensor(ids) for ids in DOCUMENTS])
    assert_same(again, first)


@pytest.mark.parametrize(("method", "scheme"), [each for each in RECIPES if "gptq" in each[0]])
def test_what_is_read_counts(method: str, scheme: str) -> None:
    """Of a text that was not read, too: GPTQ keeps the divergence below 0.6 of that of rounding to nearest."""
    options: dict[str, Any] = {"documents": texts(*[64] * 12, seed=2), "config": replace(GQA, intermediate_size=96)}
    exact = random_model(options["config"])
    unseen = texts(*[64] * 4, seed=3)
    lost = [divergence(quantized(each, scheme, **options), exact, unseen) for each in ("rtn", method)]
    assert 0 < lost[1] < 0.6 * lost[0]
    other = quantized(method, scheme, config=options["config"])
    assert not torch.equal(
        other.layers[0].mlp.down_proj.packed, quantized(method, scheme, **options).layers[0].mlp.down_proj.packed
    )


@pytest.mark.parametrize(("method", "scheme"), [each for each in RECIPES if each[0] not in ("rtn", "hqq")])
def test_planted_outliers_cost_little(method: str, scheme: str) -> None:
    """4 channels of each norm, and of up, are 32 times the others: what scales inputs loses less than it would.

    In int8 rows are whole, and as coarse as the columns of these channels are small.
    """
    options: dict[str, Any] = {"documents": texts(*[64] * 6, seed=2), "progress": False}
    exact, rounded, found = (random_model() for _ in range(3))
    for model in (rounded, found):
        plant_outliers(model)
    quantize(rounded, scheme, "rtn", progress=False)
    quantize(found, scheme, method, **options)
    unseen = texts(*[64] * 3, seed=3)
    assert 0 < divergence(found, exact, unseen) < 0.7 * divergence(rounded, exact, unseen)


@pytest.mark.parametrize(
    ("scheme", "group_size", "expected"),
    [
        ("int4", None, {96: 32, 160: 32, 128: 128}),
        ("int4", 64, {96: 32, 160: 32, 128: 64}),
        ("int4", 32, {96: 32, 160: 32, 128: 32}),
        ("int4", -1, {96: 96, 160: 160, 128: 128}),
        ("int8", None, {96: 96, 160: 160, 128: 128}),
        ("int8", 64, {96: 32, 160: 32, 128: 64}),
        ("w8a8", -1, {96: 96, 160: 160, 128: 128}),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_group_sizes(method: str, scheme: str, group_size: int | None, expected: Mapping[int, int]) -> None:
    block = quantized(method, scheme, group_size=group_size).layers[1]
    for name in LINEARS:
        layer = block.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert layer.group_size == expected[layer.in_features], name


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn", "int8"), ("hqq", "int4"), ("awq+gptq", "int4"), ("smoothquant+gptq", "w8a8")]
)
def test_a_model_of_transformers_goes_on_as_it_was(method: str, scheme: str) -> None:
    """It shares its memory with ours, whose blocks are replaced and not written to."""
    from fastllama import from_transformers
    from tests.io.checkpoints import random_llama

    theirs = random_llama(kv_heads=4, hidden_size=64, intermediate_size=96)
    model = from_transformers(theirs)
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        before = theirs(ids).logits
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    quantize(model, scheme, method, documents=[[1, 2, 3, 30]], progress=False)
    assert packing.kind_of(model) == scheme
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, before)


class Kept(dict[str, Mapping[str, Tensor]]):
    """Blocks as they are finished, in memory."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        assert key not in self, "nothing is computed twice"
        self[key] = {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn", "int8"), ("hqq", "int4"), ("awq+gptq", "int4"), ("smoothquant+gptq", "w8a8")]
)
@pytest.mark.parametrize("config", [SHAPES["biases"], exhaustive(SHAPES["tied"])])
def test_what_is_finished_is_taken_and_the_rest_computed(method: str, scheme: str, config: LlamaConfig) -> None:
    """Whichever blocks are lost: the same bits."""
    config = replace(config, num_hidden_layers=3)
    expected, kept = quantized(method, scheme, config, torch.bfloat16), Kept()
    assert_same(quantized(method, scheme, config, torch.bfloat16, finished=kept), expected)
    keys = [*kept]
    assert len(keys) == 3
    for lost in ((), (0,), (1, 2)):
        left = Kept({key: kept[key] for number, key in enumerate(keys) if number not in lost})
        assert_same(quantized(method, scheme, config, torch.bfloat16, finished=left), expected)
        assert left.keys() == kept.keys()


def test_finished_blocks_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    expected = quantized("awq+gptq", "int4", finished=kept)
    monkeypatch.setattr(quantizing, "gptq", None)
    assert_same(quantized("awq+gptq", "int4", finished=kept), expected)


def test_what_is_kept_is_no_memory_of_the_model() -> None:
    """A mapped file may be deleted, and the model's weights may be updated."""
    kept = Kept()
    quantized("hqq", "int4", finished=kept)
    model = quantized("hqq", "int4", finished=kept)
    held = {tensor.untyped_storage().data_ptr() for tensors in kept.values() for tensor in tensors.values()}
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


def test_what_was_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that was being quantized is as it was."""
    kept, model, gptq, calls = Kept(), random_model(), quantizing.gptq, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return gptq(*args)

    monkeypatch.setattr(quantizing, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, documents=DOCUMENTS, finished=kept, progress=False)
    assert len(kept) == 1
    assert type(model.layers[0].mlp.down_proj) is KINDS["int4"]
    before = random_model()
    for name, tensor in before.layers[1].named_parameters():
        assert torch.equal(model.layers[1].get_parameter(name), tensor)
    assert_same(quantized("gptq", "int4", finished=kept), quantized("gptq", "int4"))
    assert len(calls) == 7 + 4 + 8


def changed_weight(model: LlamaForCausalLM, path: str) -> LlamaForCausalLM:
    model.get_parameter(path).data.view(-1)[0] += 0.5
    return model


def test_other_arguments_texts_and_weights_have_other_keys() -> None:
    """And blocks before a weight that changed the same; a head, and a text that is not read, count for nothing."""
    kept, options = Kept(), {"documents": DOCUMENTS, "finished": (seen := Kept()), "progress": False}
    for method, scheme in RECIPES:
        quantized(method, scheme, finished=kept)
    for other in (
        {"documents": [*DOCUMENTS[:-1], [*DOCUMENTS[-1][:-1], 0]]},
        {"documents": [*DOCUMENTS[:-2], [*DOCUMENTS[-2], *DOCUMENTS[-1]]]},
        {"group_size": 32},
        {"dtype": torch.bfloat16},
        {"config": replace(GQA, rope_theta=5e5)},
        {"config": replace(GQA, rms_norm_eps=1e-3)},
    ):
        quantized("gptq", "int4", finished=kept, **other)
    assert len(kept) == 2 * (len(RECIPES) + 6)
    quantize(random_model(), **options)
    quantize(changed_weight(random_model(), "lm_head.weight"), **options)
    quantize(changed_weight(random_model(), "norm.weight"), **options)
    assert len(seen) == 2
    quantize(changed_weight(random_model(), "layers.1.mlp.down_proj.weight"), **options)
    assert len(seen) == 3
    for path in ("layers.0.input_layernorm.weight", "layers.0.self_attn.o_proj.weight", "embed_tokens.weight"):
        before = len(seen)
        quantize(changed_weight(random_model(), path), **options)
        assert len(seen) == before + 2, path
    before = len(seen)
    for documents in (DOCUMENTS, ()):
        quantize(random_model(), "int4", "rtn", **(options | {"documents": documents}))
        quantize(changed_weight(random_model(), "embed_tokens.weight"), "int4", "rtn", **options)
    assert len(seen) == before + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int3"}, r"scheme is 'int3'.*legal values: 'int4', 'int8', 'w8a8'"),
        ({"scheme": None}, "scheme is None"),
        ({"method": "gtpq"}, r"method is 'gtpq' \(did you mean 'gptq'\?\)"),
        ({"method": "awq", "scheme": "int8"}, "method is 'awq' for scheme 'int8'; legal for it: rtn, gptq$"),
        ({"method": "hqq", "scheme": "w8a8"}, "'w8a8'; legal for it: rtn, gptq, smoothquant, smoothquant\\+gptq$"),
        ({"method": "smoothquant"}, "'smoothquant' for scheme 'int4'; legal for it: rtn, gptq, awq, awq\\+gptq, hqq"),
        ({"group_size": 16}, r"group_size is 16 for scheme 'int4'; legal: 32, 64, 128, -1 \(-1: whole rows\)"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": "32"}, "group_size is '32'"),
        ({"group_size": 32, "scheme": "w8a8"}, "group_size is 32 for scheme 'w8a8'; legal: -1"),
        ({"documents": []}, "documents is empty; legal for method 'gptq': a text, as token ids"),
        ({"documents": [[1], []]}, "document 1 has 0 tokens; legal: 1 to 256"),
        ({"documents": [[1] * 257]}, "document 0 has 257 tokens; legal: 1 to 256"),
        ({"documents": [[1], [2, 64]]}, "document 1 holds token 64; legal: 0 to 63"),
        ({"documents": [[-1]]}, "document 0 holds token -1; legal: 0 to 63"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=message):
        quantize(model, **({"documents": DOCUMENTS, "progress": False} | arguments))
    assert_same(model, random_model())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_packed_layers_are_refused(method: str) -> None:
    model = random_model()
    model.layers[1].mlp = quantized("rtn", "int8").layers[1].mlp
    before = state(model)
    with pytest.raises(ValueError, match="model has a Int8Linear; legal: dense layers, as of quantization=None"):
        quantize(model, "int4", method, documents=DOCUMENTS, progress=False)
    after = state(model)
    assert all(torch.equal(tensor, after[name][1]) for name, (_, tensor) in before.items())


def test_infinite_activations_are_refused() -> None:
    """Of float16, by a block that is not the first: those before it are quantized, it and those behind it are not."""
    model = random_model(replace(GQA, num_hidden_layers=3), torch.float16)
    model.layers[1].get_parameter(f"{GATE_UP}.weight").mul_(1000)
    kept, before = Kept(), [tensor.clone() for tensor in model.layers[1].parameters()]
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.mlp\.down_proj is fed infinity or NaN by the calibration text, in torch\.float16; legal: .*"
        "bfloat16",
    ):
        quantize(model, documents=DOCUMENTS, finished=kept, progress=False)
    assert [type(block.mlp.down_proj) for block in model.layers] == [KINDS["int4"], Linear, Linear]
    assert len(kept) == 1
    for tensor, unchanged in zip(model.layers[1].parameters(), before, strict=True):
        assert torch.equal(tensor, unchanged)


def test_methods_without_a_text_do_not_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "Calibration", None)
    for method in ("rtn", "hqq"):
        for documents in ((), [[VOCAB + 1]]):
            quantized(method, "int4", documents=documents)


def test_only_gptq_takes_hessians_and_none_outlives_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Activations]] = []
    most, hessians = 0, set()

    class Counted(Activations):
        def __init__(self, *args: Any, hessian: bool) -> None:
            nonlocal most
            super().__init__(*args, hessian=hessian)
            hessians.add(hessian)
            alive.append(weakref.ref(self))
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(quantizing, "Activations", Counted)
    for method, scheme in RECIPES:
        alive.clear()
        hessians.clear()
        quantized(method, scheme)
        assert len(alive) == (0 if method in ("rtn", "hqq") else 2 * len(LINEARS))
        assert hessians == ({"gptq" in method} if alive else set())
    assert most == len(LINEARS)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "int8"), ("hqq", "int4"), ("awq+gptq", "int4")])
def test_memory_does_not_grow_with_the_number_of_blocks(method: str, scheme: str) -> None:
    """But by what they are packed into: the model's own blocks go as their places are taken."""
    most, held, config = [], [], replace(GQA, hidden_size=128, intermediate_size=128)
    for count in (2, 4):
        model = random_model(replace(config, num_hidden_layers=count), torch.bfloat16)
        dense = sum(parameter.nbytes for parameter in model.layers[0].parameters())
        with MemoryWatch() as watch:
            quantize(model, scheme, method, documents=DOCUMENTS, progress=False)
        most.append(watch.most)
        held.append(watch.held)
    assert 0.25 * 2 * dense < held[1] - held[0] < 0.6 * 2 * dense
    assert most[1] - most[0] < 1.02 * (held[1] - held[0])


def test_memory_of_gptq_is_one_block_in_fp32_its_hessians_and_two_more_of_the_largest() -> None:
    """And two of the largest weight, as which inputs of the kernels count, too, and all that is smaller."""
    config = replace(GQA, intermediate_size=512)
    model = random_model(config, torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in model.layers[0].parameters())
    columns = [model.layers[0].get_submodule(name).weight.shape[1] for name in LINEARS]
    largest = max(model.layers[0].get_submodule(name).weight.numel() for name in LINEARS)
    with MemoryWatch() as watch:
        quantize(model, documents=DOCUMENTS, progress=False)
    hessians = sum(each**2 for each in columns) + 2 * max(columns) ** 2
    assert 4 * hessians < watch.most < 1.05 * 4 * (numbers + hessians + 2 * largest)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_the_device_may_be_named(device: Any) -> None:
    assert_same(quantized("gptq", "int4", device=device), quantized("gptq", "int4"))


def test_progress_counts_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, though a finished block's come at once."""
    shown: list[tuple[Any, ...]] = []

    class Bar:
        def __init__(self, title: str, wanted: bool | None, total: int, unit: str) -> None:
            self.total, self.count = total, 0
            shown.append((title, wanted, unit))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *trouble: object) -> None:
            shown.append((self.count, self.total))

        def update(self, count: int = 1) -> None:
            self.count += count

    monkeypatch.setattr(quantizing, "progress_bar", Bar)
    kept = Kept()
    for wanted in (True, None):
        quantized("gptq", "int4", progress=wanted, finished=kept)
        assert shown == [("Quantizing", wanted, "layer"), (8, 8)]
        shown.clear()
