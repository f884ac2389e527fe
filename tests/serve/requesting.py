"""Requests written as keyword arguments, and the jobs or refusals that they are translated to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastllama.serve import translate
from fastllama.serve.errors import ApiError
from fastllama.serve.jobs import Job

HI = [{"role": "user", "content": "Hi"}]


def chat(model, most_tokens: int | None = None, /, **fields: Any) -> Job:
    return translate.chat_job(json.dumps({"messages": HI, **fields}).encode(), model, most_tokens)


def complete(model, most_tokens: int | None = None, /, **fields: Any) -> Job:
    return translate.completion_job(json.dumps({"prompt": "Hi", **fields}).encode(), model, most_tokens)


def refused(make, model, status: int = 400, /, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(model, **fields)
    assert caught.value.status == status
    assert len(str(caught.value)) < 1000
    return caught.value
