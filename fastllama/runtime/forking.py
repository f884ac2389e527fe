"""What a request may ask for that goes on from where another stands."""

from __future__ import annotations

from fastllama.runtime.params import SamplingParams
from fastllama.runtime.sequence import Request


def check_fork(request: Request, params: SamplingParams) -> None:
    """Raises ValueError where a request with these parameters cannot go on from where an unfinished one stands."""
    for name, n in (("n of the request to fork", request.params.n), ("n", params.n)):
        if n != 1:
            raise ValueError(f"{name} is {n}; legal: 1")
    num_generated = len(request.sequences[0].token_ids) - len(request.prompt_token_ids)
    if params.max_tokens <= num_generated:
        raise ValueError(
            f"max_tokens is {params.max_tokens}, of which {num_generated} are there; "
            f"legal: at least {num_generated + 1}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and getattr(request.params, name) is None:
            raise ValueError(f"{name} is {value}, and the request to fork has none to share; legal: None")
