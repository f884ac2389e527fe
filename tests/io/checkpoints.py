"""Small checkpoints in every format, written from the formats' public descriptions, not by the functions under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

State = dict[str, Tensor]
# kv heads of a model with 16 query heads
SHAPES = {"mha": 16, "gqa": 8, "mqa": 1}
PER_LAYER = ["attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
META_TO_HF = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def random_llama(
    *, kv_heads: int = 8, tied: bool = False, dtype: torch.dtype = torch.float32, **settings: Any
) -> transformers.LlamaForCausalLM:
    """A transformers model of 2 layers in which no two weights are alike by construction, norms included.

    64 wide with 16 heads, 192 in the MLP (what Meta's formula gives for multiple_of=32), 40 tokens: all split in 8.
    """
    sizes = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | settings)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return model.to(dtype).eval()


def hf_state(model: transformers.LlamaForCausalLM) -> State:
    """The tensors that a checkpoint of the model must read as, by Hugging Face name, a tied head left out."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_hf_bin(model: transformers.LlamaForCausalLM, path: Path, *, shards: int = 1) -> Path:
    """pytorch_model*.bin, as transformers 4 wrote it; transformers 5 no longer does."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return path
    names, weight_map = list(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        mine = names[i::shards]
        torch.save({name: state[name] for name in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in Meta's order: row 2i of a head is Hugging Face's row i, row 2i+1 its row i + d/2."""
    d = weight.shape[0] // heads
    order = [head * d + (row // 2 if row % 2 == 0 else row // 2 + d // 2) for head in range(heads) for row in range(d)]
    return weight[order]


def meta_tensors(model: transformers.LlamaForCausalLM) -> State:
    """The model's tensors with rows in Meta's order, named `embedding`, `norm`, `output`, `0.wq`...."""
    state, config = model.state_dict(), model.config
    found = {"embedding": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    found["output"] = state["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        for name in PER_LAYER:
            weight = state[f"model.layers.{i}.{META_TO_HF[name]}.weight"]
            if name in ("wq", "wk"):
                heads = config.num_attention_heads if name == "wq" else config.num_key_value_heads
                weight = interleaved(weight, heads)
            found[f"{i}.{name}"] = weight
    return found


def write_meta(model: transformers.LlamaForCausalLM, path: Path, *, shards: int = 1) -> Path:
    """consolidated.NN.pth and params.json: fairscale's column-parallel layers keep some rows each, row-parallel ones
    and the embedding some columns each; norms are in every file, and so are the rotary frequencies."""
    path.mkdir()
    config, tensors = model.config, meta_tensors(model)
    for shard in range(shards):

        def part(name: str, dim: int, shard: int = shard) -> Tensor:
            return tensors[name].chunk(shards, dim)[shard].clone()

        state = {"tok_embeddings.weight": part("embedding", 1), "norm.weight": tensors["norm"].clone()}
        state["output.weight"] = part("output", 0)
        state["rope.freqs"] = torch.arange(config.head_dim // 2).float()
        for i in range(config.num_hidden_layers):
            for name in ("attention_norm", "ffn_norm"):
                state[f"layers.{i}.{name}.weight"] = tensors[f"{i}.{name}"].clone()
            for name, dim in {"wq": 0, "wk": 0, "wv": 0, "wo": 1}.items():
                state[f"layers.{i}.attention.{name}.weight"] = part(f"{i}.{name}", dim)
            for name, dim in {"w1": 0, "w2": 1, "w3": 0}.items():
                state[f"layers.{i}.feed_forward.{name}.weight"] = part(f"{i}.{name}", dim)
        torch.save(state, path / f"consolidated.{shard:02d}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 16, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    (path / "params.json").write_text(json.dumps(params))
    return path


def write_llama2c(model: transformers.LlamaForCausalLM, path: Path, *, version: int, group: int = 32) -> Path:
    """llama2.c's .bin: 0 has a bare header, 1 the magic "ak42", 2 also int8 values with one fp32 scale per group."""
    config, tensors = model.config, meta_tensors(model)
    tied = config.tie_word_embeddings
    fields = [config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads]
    vocab = config.vocab_size if tied or version else -config.vocab_size
    fields += [config.num_key_value_heads, vocab, config.max_position_embeddings]
    layers = range(config.num_hidden_layers)

    def all_layers(*names: str) -> list[Tensor]:
        return [tensors[f"{i}.{name}"] for name in names for i in layers]

    matrices = [tensors["embedding"], *all_layers("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    head = [] if tied else [tensors["output"]]
    if version == 0:
        angles = torch.zeros(2 * config.max_position_embeddings * config.head_dim // 2)
        order = [tensors["embedding"], *all_layers(*PER_LAYER), tensors["norm"], angles, *head]
        data = struct.pack("7i", *fields) + b"".join(map(fp32, order))
    else:
        header = struct.pack("<I8iB", 0x616B3432, version, *fields, int(tied))
        header += struct.pack("<i", group) if version == 2 else b""
        norms = [*all_layers("attention_norm", "ffn_norm"), tensors["norm"]]
        encode: Callable[[Tensor], bytes] = fp32 if version == 1 else lambda weight: q8_0(weight, group)
        data = header.ljust(256, b"\0") + b"".join(map(fp32, norms)) + b"".join(map(encode, [*matrices, *head]))
    path.write_bytes(data)
    return path


def fp32(tensor: Tensor) -> bytes:
    return tensor.float().contiguous().numpy().tobytes()


def q8_0(weight: Tensor, group: int) -> bytes:
    values = weight.float().reshape(-1, group)
    scale = values.abs().amax(1) / 127
    return (values / scale[:, None]).round().to(torch.int8).numpy().tobytes() + scale.numpy().tobytes()
