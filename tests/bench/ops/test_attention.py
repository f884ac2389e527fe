"""flex_attention as a peer computes the op, and is never timed uncompiled."""

from __future__ import annotations

import pytest
import torch

from fastllama.bench.ops.attention import FLEX, compiled_flex
from fastllama.bench.ops.judge import judged
from fastllama.catalogue.llama_calls import toy_calls

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_flex_attention_as_it_is_timed_is_right() -> None:
    """Inductor compiles it, as on a GPU: the judge's tests only run it eagerly."""
    (case,) = toy_calls(torch.float32, ("attention_varlen",))
    _, flex = FLEX["attention_varlen"]
    with torch.inference_mode():
        error, bound = judged(case, flex(compiled_flex("inductor")), CPU)
    assert error <= bound


def test_flex_attention_that_is_not_compiled_is_an_error() -> None:
    """Eager flex_attention would hold all scores, and be timed so."""
    attend = compiled_flex("eager")
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1):
        attend(*torch.randn(3, 3, 2, 16))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(*torch.randn(3, 4, 2, 16))
