"""Loading by the table of names, with every way a tensor can be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.layers.config import LlamaConfig
from fastllama.layers.loading import load_weights
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.weights import hf_tensors, slots

GQA = LlamaConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
)
CONFIGS = {
    "gqa": GQA,
    "mha": replace(GQA, num_key_value_heads=6),
    "mqa": replace(GQA, num_key_value_heads=1),
    "tied": replace(GQA, tie_word_embeddings=True),
    "attention bias": replace(GQA, attention_bias=True),
    "mlp bias": replace(GQA, mlp_bias=True),
}
Q = "model.layers.0.self_attn.q_proj.weight"


def fresh(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM(config, dtype, torch.device("cpu"))


def random_tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Hugging Face tensors of the shapes that transformers gives them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size, "o_proj": hidden}
    rows |= {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    columns = {"o_proj": config.q_size, "down_proj": inner}
    found = {
        "model.embed_tokens.weight": torch.randn(config.vocab_size, hidden),
        "model.norm.weight": torch.randn(hidden),
    }
    for i in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = torch.randn(hidden)
        for name in rows:
            mlp = name in ("gate_proj", "up_proj", "down_proj")
            at = f"model.layers.{i}.{'mlp' if mlp else 'self_attn'}.{name}"
            found[f"{at}.weight"] = torch.randn(rows[name], columns.get(name, hidden))
            if config.mlp_bias if mlp else config.attention_bias:
                found[f"{at}.bias"] = torch.randn(rows[name])
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = torch.randn(config.vocab_size, hidden)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_covers_every_parameter_once(config: LlamaConfig) -> None:
    model = fresh(config)
    covered = {name: torch.zeros(parameter.shape[0], dtype=torch.int) for name, parameter in model.named_parameters()}
    for slot in slots(config).values():
        covered[slot.parameter][slot.start : slot.start + slot.rows] += 1
    assert all(bool((rows == 1).all()) for rows in covered.values())
    assert slots(config).keys() == random_tensors(config).keys()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_loaded_comes_out_again(config: LlamaConfig) -> None:
    model, tensors = fresh(config), random_tensors(config)
    load_weights(model, reversed(tensors.items()))
    found = dict(hf_tensors(model))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_projections_are_fused_in_the_documented_order() -> None:
    model, tensors = fresh(GQA), random_tensors(GQA)
    load_weights(model, tensors.items())
    parameters = dict(model.named_parameters())
    at = "model.layers.1"
    q, k, v = (tensors[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (tensors[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(parameters["layers.1.self_attn.qkv_proj.weight"], torch.cat([q, k, v]))
    assert torch.equal(parameters["layers.1.mlp.gate_up_proj.weight"], torch.cat([gate, up]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_are_cast_to_the_parameters(source: torch.dtype, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(source) for name, tensor in random_tensors(GQA).items()}
    model = fresh(GQA, dtype)
    load_weights(model, tensors.items())
    for name, tensor in hf_tensors(model):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name].to(dtype)), name


TIED = CONFIGS["tied"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD], [HEAD, EMBEDDING]], ids=str)
def test_either_name_fills_the_matrix_of_a_tied_model(names: list[str]) -> None:
    model, tensors = fresh(TIED), random_tensors(TIED)
    embedding = tensors.pop(EMBEDDING)
    load_weights(model, [*tensors.items(), *((name, embedding.clone()) for name in names)])
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


@pytest.mark.parametrize("first", [EMBEDDING, HEAD])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(first: str) -> None:
    both = {HEAD: torch.randn(11, 12), EMBEDDING: torch.randn(11, 12)}
    second = HEAD if first == EMBEDDING else EMBEDDING
    ordered = [(first, both[first]), (second, both[second])]
    message = rf"tensor {second} appears twice, with different values \(.* are tied\)"
    with pytest.raises(CheckpointError, match=message):
        load_weights(fresh(TIED), ordered)


LAYER = "model.layers.0.self_attn"
BUFFERS = [
    f"{LAYER}.rotary_emb.inv_freq",
    f"{LAYER}.rotary_emb.cos_cached",
    f"{LAYER}.rotary_emb.sin_cached",
    "model.rotary_emb.original_inv_freq",
    "rotary_emb.inv_freq",
    "rope.freqs",
    "freqs_cis",
    "layers.0.attention.inner_attention.rope.freqs",
    f"{LAYER}.masked_bias",
    f"{LAYER}.bias",
    "layers.0.attention.mask",
    "transformer.h.0.attn.bias",
    "model.embeddings.position_ids",
]


@pytest.mark.parametrize("name", BUFFERS)
def test_tables_and_masks_are_recomputed_wherever_they_lie(name: str, caplog: pytest.LogCaptureFixture) -> None:
    load_weights(fresh(GQA), (random_tensors(GQA) | {name: torch.full((2,), float("nan"))}).items())
    assert caplog.messages == []


FOREIGN = ["v_head.summary.weight", "v_head.summary.bias", "score.weight", "mtp.layers.0.proj.weight", "value_head.0.w"]


def test_tensors_outside_of_every_llama_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensors = random_tensors(GQA)
    load_weights(fresh(GQA), [*((name, torch.ones(2)) for name in FOREIGN), *tensors.items()])
    assert caplog.messages == ["tensor v_head.summary.weight and 4 more are outside of the Llama, and not loaded"]


def test_a_bias_that_is_not_declared_may_be_zero(caplog: pytest.LogCaptureFixture) -> None:
    zeros = {
        "model.layers.1.self_attn.q_proj.bias": torch.zeros(24),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(10),
    }
    load_weights(fresh(GQA), (random_tensors(GQA) | zeros).items())
    (line,) = caplog.messages
    assert line.startswith("tensor model.layers.1.self_attn.q_proj.bias and 1 more are not loaded: the configuration")


def test_a_bias_that_is_declared_and_missing_is_zero(caplog: pytest.LogCaptureFixture) -> None:
    """transformers warns and makes it zero: a model made from one with biases of q, k and v alone is right so."""
    config = CONFIGS["attention bias"]
    model, tensors = fresh(config), random_tensors(config)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    for layer in range(2):
        del tensors[f"model.layers.{layer}.self_attn.o_proj.bias"]
    load_weights(model, tensors.items())
    assert torch.equal(dict(model.named_parameters())["layers.1.self_attn.o_proj.bias"], torch.zeros(12))
    assert caplog.messages == [
        "tensor model.layers.0.self_attn.o_proj.bias and 1 more are missing, and taken as zero, as in transformers"
    ]


QUANTIZED = [
    f"{LAYER}.q_proj.{end}"
    for end in ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "input_scale", "SCB")
] + [
    f"{LAYER}.q_proj.weight.{end}" for end in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4", "nested_absmax")
]


@pytest.mark.parametrize("name", [*QUANTIZED, f"{LAYER}.q_proj.weight_packed", f"{LAYER}.k_scale", "lm_head.qweight"])
def test_what_quantized_weights_leave_is_recognised(name: str) -> None:
    message = f"tensor {name} belongs to quantized weights; expected float32, bfloat16, float16 or float64"
    with pytest.raises(CheckpointError) as raised:
        load_weights(fresh(GQA), broken(name, torch.ones(2, dtype=torch.uint8)))
    assert str(raised.value) == message


def broken(name: str, value: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors but Q, then the named one if it has a value."""
    yield from (item for item in random_tensors(GQA).items() if item[0] != Q)
    if value is not None:
        yield name, value


def with_value(value: float) -> Tensor:
    tensor = torch.zeros(24, 12)
    tensor[-1, -1] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (Q, torch.zeros(12, 24), "has shape [12, 24], expected [24, 12] by the configuration"),
        (Q, torch.zeros(24), "has shape [24], expected [24, 12] by the configuration"),
        (Q, None, "is missing; the checkpoint is incomplete"),
        (
            "model.layers.2.input_layernorm.weight",
            torch.zeros(12),
            "is unexpected: the configuration has num_hidden_layers=2",
        ),
        ("layers.2.self_attn.q_proj.bias", torch.zeros(12), "is unexpected: the configuration has num_hidden_layers=2"),
        ("model.layers.0.self_attn.q_norm.weight", torch.zeros(4), "is unexpected: no part of the Llama"),
        ("model.embed_positions.weight", torch.zeros(4, 12), "is unexpected: no part of the Llama"),
        ("lm_head.bias", torch.zeros(11), "is unexpected: no part of the Llama"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(24),
            "is unexpected: the configuration has attention_bias=Fa",
        ),
        ("model.layers.0.mlp.up_proj.bias", torch.ones(10), "is unexpected: the configuration has mlp_bias=False, and"),
        (
            Q,
            torch.zeros(24, 12, dtype=torch.int8),
            "has dtype torch.int8, expected float32, bfloat16, float16 or float",
        ),
        (Q, torch.zeros(24, 12, dtype=torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn, expected float32"),
        (Q, with_value(float("nan")), "holds NaN or infinity"),
        (Q, with_value(float("inf")), "holds NaN or infinity"),
        (Q, with_value(float("-inf")), "holds NaN or infinity"),
        (Q, with_value(7e4), "reaches 7e+04, beyond torch.float16's 6.55e+04; load it as bfloat16 or float32"),
        (Q, with_value(-7e4), "reaches 7e+04, beyond torch.float16's 6.55e+04; load it as bfloat16 or float32"),
    ],
)
def test_a_wrong_tensor_is_named_and_not_written(name: str, value: Tensor | None, message: str) -> None:
    model = fresh(GQA, torch.float16)
    for parameter in model.parameters():
        parameter.data.fill_(3)
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, broken(name, value))
    assert str(raised.value).startswith(f"tensor {name} {message}")
    assert bool((dict(hf_tensors(model))[Q] == 3).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_that_comes_twice_must_be_the_same(dtype: torch.dtype) -> None:
    tensors = random_tensors(GQA)
    load_weights(fresh(GQA, dtype), [*tensors.items(), (Q, tensors[Q].clone())])
    with pytest.raises(CheckpointError, match=rf"tensor {Q} appears twice, with different values$"):
        load_weights(fresh(GQA, dtype), [*tensors.items(), (Q, 2 * tensors[Q])])


def test_names_with_a_prefix_of_their_own_are_reported() -> None:
    tensors = {f"module.{name}": tensor for name, tensor in random_tensors(GQA).items()}
    message = r"is missing, and so are 20 others; names here begin otherwise: module\.model\.embed_tokens\.weight$"
    with pytest.raises(CheckpointError, match=message):
        load_weights(fresh(GQA), tensors.items())


def test_a_head_that_is_not_tied_must_be_there() -> None:
    tensors = random_tensors(GQA)
    del tensors[HEAD]
    with pytest.raises(CheckpointError, match=rf"tensor {HEAD} is missing, and the configuration has tie_word_embedd"):
        load_weights(fresh(GQA), tensors.items())


def test_a_wrong_shape_is_reported_with_the_sizes_that_give_it() -> None:
    tensors = random_tensors(GQA) | {EMBEDDING: torch.zeros(16, 12)}
    message = r"has shape \[16, 12\], expected \[11, 12\] by the configuration \(vocab_size, hidden_size\)$"
    with pytest.raises(CheckpointError, match=message):
        load_weights(fresh(GQA), tensors.items())


def test_all_that_is_missing_is_counted() -> None:
    with pytest.raises(CheckpointError, match=r"tensor model.embed_tokens.weight is missing, and so are 20 others"):
        load_weights(fresh(GQA), [])


def test_a_tied_model_refuses_a_head_of_another_shape() -> None:
    config = CONFIGS["tied"]
    tensors = random_tensors(config) | {"lm_head.weight": torch.zeros(12, 12)}
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight has shape \[12, 12\], expected \[11, 12\]"):
        load_weights(fresh(config), tensors.items())


def test_the_file_is_named_where_it_is_known() -> None:
    with pytest.raises(CheckpointError, match=rf"^part-2: tensor {Q} is missing"):
        load_weights(fresh(GQA), broken(Q, None), file_of={Q: "part-2"}.__getitem__)
