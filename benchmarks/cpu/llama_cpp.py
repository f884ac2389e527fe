"""llama.cpp as a peer in decoding: the weights of a transformers Llama as GGUF files, timed through llama-cpp-python.

Needs the extra [llama]; `missing` returns the package that is not installed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from fastllama.bench.timing import Generation

FORMATS = ("BF16", "Q8_0", "Q4_0")
CONTEXT = 1024  # tokens
# Names of a Llama's tensors: Hugging Face's and GGUF's.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def missing() -> str | None:
    """Returns the name of a package that is not installed; None if all are."""
    lacking = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed: pip install -e .[llama]" if lacking else None


def version() -> str:
    """Returns the version of llama-cpp-python, and the CPU features that its build uses."""
    llama_cpp = importlib.import_module("llama_cpp")
    return f"{llama_cpp.__version__}, {llama_cpp.llama_print_system_info().decode().strip()}"


def write_files(model: transformers.LlamaForCausalLM, folder: Path) -> dict[str, Path]:
    """Write a GGUF file of a bf16 model for each of FORMATS, quantized by llama.cpp's own quantizer."""
    llama_cpp = importlib.import_module("llama_cpp")
    _quiet(llama_cpp)
    files = {name: folder / f"{name}.gguf" for name in FORMATS}
    _write(model, files["BF16"])
    for name, target in files.items():
        if name == "BF16":
            continue
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        options.nthread = torch.get_num_threads()
        if llama_cpp.llama_model_quantize(str(files["BF16"]).encode(), str(target).encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp could not quantize {files['BF16']} to {name}")
    return files


def _write(model: transformers.LlamaForCausalLM, target: Path) -> None:
    gguf = importlib.import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in _REST:
            target_name, kind = _REST[stem], _REST[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            kind = _LAYER[rest]
            target_name = f"blk.{layer}.{kind}"
        if kind in heads:
            tensor = _interleaved(tensor, heads[kind])
        if tensor.dim() == 1:
            writer.add_tensor(f"{target_name}.weight", tensor.float().numpy())
        else:
            words = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{target_name}.weight", words, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a projection from rotary pairs in two halves to interleaved pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _quiet(llama_cpp: object) -> None:
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    _kept.append(callback)


_kept: list[object] = []  # a callback of C must not be freed


class Decoder:
    """Decodes with the model of a GGUF file."""

    def __init__(self, file: Path, batch: int) -> None:
        """batch: the most tokens of a prompt."""
        self._api = importlib.import_module("llama_cpp")
        options = self._api.llama_model_default_params()
        options.use_mmap = False
        self._model = self._api.llama_model_load_from_file(str(file).encode(), options)
        settings = self._api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, batch, batch
        self._context = self._api.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self._vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self.bytes = self._api.llama_model_size(self._model)

    def _next(self, tokens: list[int]) -> int:
        """Feed some tokens; returns the likeliest next one."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def generate(self, prompt: list[int], tokens: int) -> tuple[list[int], Generation]:
        """Decode greedily with torch's number of threads; returns tokens and seconds."""
        threads = torch.get_num_threads()
        self._api.llama_set_n_threads(self._context, threads, threads)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        start = time.monotonic()
        found = [self._next(prompt)]
        first = time.monotonic()
        while len(found) < tokens:
            found.append(self._next(found[-1:]))
        return found, {"prefill": first - start, "decode": time.monotonic() - first}
