"""A model quantized in place, block by block: which layers change, how much they lose, and what is refused."""

from __future__ import annotations

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
from fastllama.verify import oracle, plant_outliers
from tests.layers.test_loading_packed import assert_same, state

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


class Kept(dict[str, Mapping[str, Tensor]]):
    """Finished blocks, kept in memory."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        assert key not in self, "nothing is computed twice"
        self[key] = {name: tensor.clone() for name, tensor in tensors.items()}


def logits(model: LlamaForCausalLM, ids: Sequence[int]) -> Tensor:
    """Logits by explicit formulas, in fp64, of the dequantized weights."""
    weights = {name: tensor.double() for name, tensor in hf_tensors(model)}
    *_, found = oracle.forward(model.config, weights, torch.tensor(ids), torch.float64, len(ids))
    return found


def divergence(model: LlamaForCausalLM, exact: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """The mean KL divergence of a model's next-token distributions from the exact model's."""
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
    """For half a step in 8 (int4) or 127 (int8) the divergence is at most 0.4 and 0.003 here, and never 0."""
    model = quantized(method, scheme, config)
    lost = divergence(model, random_model(config), DOCUMENTS)
    assert 0 < lost < (0.8 if scheme == "int4" else 0.006)
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tie_word_embeddings


@shapes
@dtypes
@pytest.mark.parametrize("scheme", KINDS)
def test_rtn_gives_what_packing_gives(config: LlamaConfig, scheme: str, dtype: torch.dtype) -> None:
    """Bit for bit: both go through fp32."""
    expected = random_model(config, dtype)
    packing.quantize(expected, scheme, progress=False)
    assert_same(quantized("rtn", scheme, config, dtype, documents=()), expected)


@recipes
def test_the_same_gives_the_same(method: str, scheme: str) -> None:
    first, second = (quantized(method, scheme, dtype=torch.bfloat16) for _ in range(2))
    assert_same(second, first)


@pytest.mark.parametrize("of", [tuple, torch.tensor, lambda ids: torch.tensor(ids).numpy()])
def test_token_ids_may_come_in_any_sequence(of: Any) -> None:
    """With the same key of finished blocks."""
    kept, ids = Kept(), texts(20, 20)
    expected = quantized("gptq", "int4", documents=ids, finished=kept)
    for documents in (of(ids), [*map(of, ids)]):
        assert_same(quantized("gptq", "int4", documents=documents, finished=kept), expected)
    assert len(kept) == 2


@pytest.mark.parametrize(("method", "scheme"), [each for each in RECIPES if "gptq" in each[0]])
def test_what_is_read_counts(method: str, scheme: str) -> None:
    """On unseen text, too: GPTQ keeps the divergence below 0.6 of that of rounding to nearest."""
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
    """4 channels of each norm, and of up, are 32 times the others; the divergence is below 0.7 of rtn's.

    In int8 a scale covers a whole row, so the smaller columns of these channels are rounded more coarsely.
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
    """It shares memory with our model, whose blocks are replaced, not overwritten."""
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
        ({"documents": [[1, 2.0]]}, r"document 0 holds token 2\.0; legal: 0 to 63"),
        ({"documents": torch.ones(2, 3)}, r"document 0 holds token tensor\(1\.\); legal: 0 to 63"),
        ({"documents": ["a story"]}, "document 0 holds token 'a'; legal: 0 to 63"),
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
    """Of float16, by a block that is not the first: those before it are quantized, it and those after are not."""
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


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_the_device_may_be_named(device: Any) -> None:
    assert_same(quantized("gptq", "int4", device=device), quantized("gptq", "int4"))
