"""Settings of a measured process. Without torch, so that the process that starts it need not load it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT = "launch: "  # start of the line that a server writes at SIGUSR1
OBJECTS = (  # classes that live as long as a request or a connection
    "Generation",
    "Request",
    "Sequence",
    "Order",
    "Mailbox",
    "RequestStream",
    "Run",
    "Exchange",
    "Ticket",
    "LimitedProtocol",
    "RequestResponseCycle",
    "Task",
)


@dataclass(frozen=True)
class Settings:
    """Settings that both compared processes share.

    threads: of torch and Numba. step_seconds: step time of a device that computes nothing; None for the real model.
    switch_interval: overrides the program's sys.setswitchinterval; None keeps it. llm: further arguments of LLM.
    stall_seconds: how long a client may take for its headers, its body, or a read, for which the program has no
    options; None keeps its limits.
    """

    threads: int = 1
    step_seconds: float | None = None
    switch_interval: float | None = None
    llm: dict[str, Any] = field(default_factory=dict)
    stall_seconds: float | None = None

    def json(self) -> str:
        """The settings as an argument of the command line."""
        return json.dumps(asdict(self))
