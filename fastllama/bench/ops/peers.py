"""An op's peers in torch: its formula, eager and compiled, and torch's own fused op where there is one.

A peer has the arguments and results of the public op; it may overwrite its inputs where torch's op does. Every peer is
checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastllama.bench.ops import attention, matmuls
from fastllama.bench.ops.compiling import compiled
from fastllama.bench.ops.formulas import EAGER, Function
from fastllama.catalogue.maker import EPS

Peers = dict[str, Callable[[], Function]]  # by name; calling a value imports or compiles what it needs

FUSED: dict[str, tuple[str, Function]] = {
    "rms_norm": ("F.rms_norm", lambda t: F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS)),
    "matmul": ("F.linear", lambda t: F.linear(t["x"], t["weight"])),
    "embedding": ("F.embedding", lambda t: F.embedding(t["ids"], t["weight"])),
    "attention_varlen": ("SDPA", attention.sdpa_varlen),
    "attention_prefill": ("SDPA, gathered", attention.sdpa_prefill),
    "attention_decode": ("SDPA, gathered", attention.sdpa_decode),
}


def torch_peers(op: str, device: torch.device, backend: str = "inductor") -> Peers:
    """The peers of an op on a device. backend: of torch.compile."""
    found: Peers = {}
    if op in EAGER:
        found["torch eager"] = lambda: EAGER[op]
        found["torch.compile"] = lambda: compiled(EAGER[op], backend)
    if op in FUSED:
        name, function = FUSED[op]
        found[name] = lambda: function
    if op in attention.FLEX:
        gathered, flex = attention.FLEX[op]
        found["flex_attention" + gathered] = lambda: flex(attention.compiled_flex(backend))
    return found | matmuls.torch_matmuls(op, device, backend)
