"""Settings of a measured process, read by the one that starts it, which loads no torch for that."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT = "launch: "  # begins the line that a server writes at SIGUSR1
OBJECTS = (  # that live as long as a request or a connection
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
    """What two processes have in common that are compared.

    threads: of torch and Numba. step_seconds: of a device that computes nothing and takes so long for each step; None
    for the model itself. switch_interval: sys.setswitchinterval's, whatever the program sets; None leaves it the
    choice. llm: arguments of LLM, beside those that the program gives. stall_seconds: how long a client may take for
    its headers, its body, or a read, which are no options of the program's; None leaves them as they are.
    """

    threads: int = 1
    step_seconds: float | None = None
    switch_interval: float | None = None
    llm: dict[str, Any] = field(default_factory=dict)
    stall_seconds: float | None = None

    def json(self) -> str:
        """As the command line has it."""
        return json.dumps(asdict(self))
