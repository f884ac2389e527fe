"""lm-eval's local-completions gets the log-probabilities that the library itself computes."""

from __future__ import annotations

import pytest

from fastllama import LLM, SamplingParams
from tests.clients.conftest import HERE, ROOT, Client, last_json

ROUNDING = 1e-3  # of a sum over a sentence's end in fp32, whose prompts ran in other batches


def test_local_completions_hears_our_own_logprobs(client: Client, server: str) -> None:
    tokenizer, tasks = ROOT / "fastllama" / "assets" / "tiny", HERE / "lm_eval_tasks"
    script = HERE / "scripts" / "lm_eval_stories.py"
    got = last_json(client("now", script, f"{server}/completions", str(tokenizer), str(tasks)))
    assert len(got["heard"]) == 10
    llm = LLM("tiny", dtype="float32")
    prompts = [[*each["context"], *each["end"]] for each in got["heard"]]
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    for each, output in zip(got["heard"], llm.generate(prompts, params), strict=True):
        assert output.prompt_logprobs is not None
        own = [report for report in output.prompt_logprobs[len(each["context"]) :] if report is not None]
        assert [report.token_id for report in own] == each["end"]
        assert each["logprob"] == pytest.approx(sum(report.logprob for report in own), abs=ROUNDING)
        assert each["is_greedy"] == all(report.rank == 1 for report in own)
    assert got["accuracy"] == 1.0
