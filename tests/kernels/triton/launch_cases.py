"""The shipped launches as test cases, and which of them only repeat others.

Compiling all of them for five targets takes two cores five minutes. The quick round compiles each kernel for each
target in each form: dtypes, optional arguments, switches, and the smallest and largest tile of rows.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import pytest

from fastllama.testing.recorder import Launch
from tests.kernels.triton.launches import SHIPPED
from tests.rounds import exhaustive

ALL = [shipped for launches in SHIPPED.values() for shipped in launches]
# By name: the same kernels in the same form, with other numbers.
REPEATED = re.compile(
    r"13B"
    # Heads in groups are another tile of decode, and so many features are not split.
    r"|70B(?! bf16, (split, pages bf16|4 queries)| gate_up bf16, (1|16) rows| gate_up bf16, 64 rows$)"
    r"|(rope|rope_and_write_kv|write_kv|silu_mul) .* bf16 prefill"
    r"|V=(128256|262144)|K=(11008|28672)"
    r"|, 32 rows"
    r"|^matmul 7B (qkv|down) bf16, 64 rows"
    r"|^matmul_(int4|int8) 7B qkv bf16, (16|64|1024) rows, groups of 128$|^matmul_w8a8 7B qkv bf16, (64|1024) rows"
    r"|groups of (64|11008)|16 rows, groups of 32|64 rows, groups of 128($|, zeros|, norm$|, residual)"
)
CASES = [
    exhaustive(shipped, id=shipped.name) if REPEATED.search(shipped.name) else pytest.param(shipped, id=shipped.name)
    for shipped in ALL
]


def form(launch: Launch) -> Hashable:
    """The kernel, the dtypes of its pointers, its absent arguments, and its switches."""
    names, source = launch.source.fn.arg_names, launch.source
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    switches = sorted((name, str(value)) for name, value in constants.items() if isinstance(value, bool | None))
    return launch.kernel, *(str(kind) for kind in source.signature.values() if str(kind)[0] == "*"), *switches
