"""A replayed decode step that allocates or waits is found in any program, by its calls to the GPU."""

from __future__ import annotations

import pytest

from tests.tools.fakegpu.conftest import Program

pytestmark = pytest.mark.fakegpu

PROGRAM = """
import torch
from fastllama import LLM, SamplingParams
from fastllama.runtime.device import graphs

load = graphs._Graph.load

def loading(self, *args):
    {planted}
    load(self, *args)

graphs._Graph.load = loading
with LLM("tiny", device="cuda", max_num_seqs=1, max_model_len=128, progress=False) as llm:
    llm.generate("Once", SamplingParams(max_tokens=4, temperature=0))
"""


@pytest.mark.parametrize(
    ("planted", "violations"),
    [
        ("pass", []),
        ("torch.empty(8, device='cuda')", ["an allocation in a replayed step"]),
        ("torch.cuda.synchronize()", ["cudaDeviceSynchronize in a replayed step"]),
        ("torch.cuda.current_stream().synchronize()", ["cudaStreamSynchronize in a replayed step"]),
    ],
)
def test_what_a_replayed_step_must_not_do(program: Program, planted: str, violations: list[str]) -> None:
    _, log = program(PROGRAM.format(planted=planted))
    assert list(log.violations) == violations
    assert log.replays > 0
