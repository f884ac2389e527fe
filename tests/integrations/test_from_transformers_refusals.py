"""fastllama.from_transformers refuses whatever differs from a plain Llama, by name, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel
from transformers.models.llama import modeling_llama

import fastllama
from fastllama import LLM
from tests.integrations.models import INTERPRETED, VOCAB, llama

Changes = Callable[[Any], Any]


class OwnAttention(modeling_llama.LlamaAttention):
    """A replacement by another library."""


class Doubled(modeling_llama.LlamaForCausalLM):
    """A model whose logits are not those of its weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def hook(*args: Any) -> None:
    """A forward hook."""


def adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))


def layer(model: Any, index: int = 1) -> Any:
    return model.model.layers[index]


def set_bias(model: Any) -> None:
    layer(model).self_attn.o_proj.bias = nn.Parameter(torch.zeros(layer(model).self_attn.o_proj.out_features))


def set_head(model: Any) -> None:
    model.lm_head = nn.Linear(model.config.hidden_size, VOCAB, bias=True)


def set_rope(model: Any) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    if hasattr(model.config, "rope_parameters"):
        model.config.rope_parameters = rope
    else:
        model.config.rope_scaling = rope


def longrope(model: Any) -> None:
    factors = [1.0] * (model.config.hidden_size // model.config.num_attention_heads // 2)
    set_rope(model)
    rope = model.config.rope_parameters if hasattr(model.config, "rope_parameters") else model.config.rope_scaling
    rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}


# What is done to a model of float32, and what the message holds then.
WEIGHTS_ALONE: dict[str, tuple[Changes, str]] = {
    "LoRA": (
        lambda m: peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), m),
        r"model.layers.0 and \d+ more \(q_proj is a peft",
    ),
    "hook on a linear layer": (
        lambda m: layer(m).mlp.up_proj.register_forward_hook(hook),
        r"model.layers.1 \(a Linear in it has a hook\)",
    ),
    "hook on a decoder layer": (
        lambda m: layer(m).register_forward_hook(hook),
        r"model.layers.1 \(it has a hook\)",
    ),
    "hook on the head": (lambda m: m.lm_head.register_forward_pre_hook(hook), r"lm_head \(it has a hook\)"),
    "hook on the model": (lambda m: m.register_forward_hook(hook), r"the model \(it has a hook\)"),
    "a forward of its own": (
        lambda m: setattr(m.model, "forward", lambda *args, **kwargs: None),
        r"model \(it has a forward of its own\)",
    ),
    "another model's forward": (
        lambda m: setattr(m, "__class__", Doubled),
        r"the model \(it is a tests.*Doubled with a forward of its own",
    ),
    "offloaded": (lambda m: layer(m).mlp.to("meta"), r"model.layers.1 \(gate_proj's weight is on the meta device"),
    "offloaded head": (lambda m: m.lm_head.to("meta"), r"lm_head \(weight is on the meta device"),
    "in shared memory": (lambda m: m.share_memory(), r"in memory shared between processes"),
    "activation": (lambda m: setattr(layer(m).mlp, "act_fn", nn.GELU()), r"activation is a torch.nn.*GELU"),
    "attention": (
        lambda m: setattr(layer(m), "self_attn", OwnAttention(m.config, 1)),
        r"model.layers.1 \(self_attn is a tests.*OwnAttention\)",
    ),
    "not causal": (lambda m: setattr(layer(m).self_attn, "is_causal", False), r"its attention is not causal"),
    "scaling": (
        lambda m: setattr(layer(m).self_attn, "scaling", 1.0),
        r"model.layers.1 \(its attention's scaling is 1",
    ),
    "another dtype of a layer": (lambda m: layer(m).bfloat16(), r"model.layers.1 \(.*torch.bfloat16 on cpu"),
    "another dtype of a norm": (lambda m: m.model.norm.half(), r"model.norm \(weight is torch.float16 on cpu"),
    "another dtype of the head": (lambda m: m.lm_head.bfloat16(), r"lm_head \(weight is torch.bfloat16 on cpu"),
    "float64": (lambda m: m.double(), r"torch.float64"),
    "head with a bias": (set_head, r"lm_head \(it is a .*Linear with a bias\)"),
    "head of another class": (
        lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)),
        r"lm_head \(it is a .*Sequential\)",
    ),
    "embeddings that are scaled": (
        lambda m: setattr(m.model.embed_tokens, "max_norm", 1.0),
        r"model.embed_tokens \(it is a .*Embedding with max_norm=1.0\)",
    ),
    "a bias of some": (set_bias, r"model.layers.1.self_attn.o_proj has a bias, and model.layers.0.self_attn.q_proj"),
    "other sizes": (
        lambda m: setattr(m.config, "vocab_size", VOCAB + 1),
        r"model.embed_tokens.weight has shape \[97, \d+\], expected \[98, \d+\] by the configuration \(vocab_size",
    ),
    "another head": (
        lambda m: setattr(m, "lm_head", nn.Linear(m.config.hidden_size, VOCAB + 3, bias=False)),
        r"lm_head.weight has shape \[100, ",
    ),
    "fewer layers": (lambda m: m.model.layers.__delitem__(0), r"has \d layers?, and config.num_hidden_layers is"),
    "another rope than it was made with": (set_rope, r"rotary_emb has other frequencies than config specifies"),
    "an unknown rope": (longrope, r"rope_type is 'longrope'; legal values: 'default'"),
    "an end token beyond the vocabulary": (
        lambda m: setattr(m.generation_config, "eos_token_id", [2, 97]),
        r"generation_config.eos_token_id is 97, and config.vocab_size 97",
    ),
}


def state(model: Any) -> list[Any]:
    tensors = (*model.parameters(), *model.buffers())
    return [model.state_dict().keys(), *((t.data_ptr(), t.dtype) for t in tensors if not t.is_meta)]


@pytest.mark.filterwarnings("ignore:Unrecognized keys in:UserWarning")
@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_more_than_weights(name: str) -> None:
    change, message = WEIGHTS_ALONE[name]
    if INTERPRETED and name == "fewer layers":
        pytest.skip("the interpreter's models have too few")
    model = llama()
    change(model)
    before = state(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fastllama.from_transformers(model)
    with pytest.raises(ValueError, match=message):
        LLM(model, progress=False)
    assert state(model) == before


def test_hooks_of_all_modules() -> None:
    model = llama()
    with nn.modules.module.register_module_forward_hook(hook), pytest.raises(ValueError, match="global module hooks"):
        fastllama.from_transformers(model)
    assert fastllama.from_transformers(model).dtype == torch.float32


LEGAL = "legal: a transformers LlamaForCausalLM"
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no head": (lambda: LlamaModel(llama().config), rf"model is a transformers.*\.LlamaModel; {LEGAL}$"),
    "classifier": (
        lambda: LlamaForSequenceClassification(llama().config),
        rf"LlamaForSequenceClassification; {LEGAL}$",
    ),
    "PEFT": (lambda: adapted(llama()), rf"PeftModel; {LEGAL}; for a PEFT model, the result of merge_and_unload\(\)$"),
    "a layer": (lambda: nn.Linear(2, 2), rf"model is a torch.nn.modules.linear.Linear; {LEGAL}$"),
    "ours": (lambda: fastllama.from_transformers(llama()), rf"model is a fastllama.*LlamaForCausalLM; {LEGAL}$"),
    "a path": (lambda: "tiny", rf"model is a builtins.str; {LEGAL}$"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_things(kind: str) -> None:
    make, message = OTHERS[kind]
    with pytest.raises(TypeError, match=message):
        fastllama.from_transformers(make())


@pytest.mark.parametrize("kind", ["no head", "classifier", "PEFT"])
def test_llm_refuses_them_too(kind: str) -> None:
    make, message = OTHERS[kind]
    with pytest.raises(TypeError, match=message):
        LLM(make(), progress=False)


def test_what_peft_merges_is_taken() -> None:
    merged = adapted(llama()).merge_and_unload()
    assert fastllama.from_transformers(merged).num_parameters == sum(p.numel() for p in merged.parameters())


def test_llm_names_what_is_legal_for_modules_of_others() -> None:
    for argument in ("model", "speculation"):
        options: dict[str, Any] = {"model": llama()} | {argument: nn.Linear(2, 2)}
        with pytest.raises(TypeError, match=rf"^{argument} is a Linear; legal: .*or a transformers LlamaForCausalLM$"):
            LLM(**options, kv_cache_tokens=256, progress=False)
