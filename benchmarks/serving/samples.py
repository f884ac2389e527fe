"""What is asked of both sides of the comparison, and what one answer to it took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

PAUSE = 0.02  # seconds between two probes
PROBE = "One day a dog"


@dataclass(frozen=True)
class Burst:
    """So many streams that begin at once, each of so many tokens.

    probed: whether requests for one token are made meanwhile, one after another.
    """

    streams: int
    tokens: int
    probed: bool = False

    @property
    def prompts(self) -> list[str]:
        """One for each stream."""
        return [f"Once upon a time there were {number} birds" for number in range(self.streams)]


@dataclass(frozen=True)
class Sample:
    """One burst. Times are seconds.

    seconds: from before the first request until the last stream has ended. cpu_seconds: of the process that serves,
    all its threads. client_cpu_seconds: of the process that reads, where that is another. first: from each request to
    its first token. gaps: between two reads of a stream from there on. tokens: of all streams. probes: from each
    request that comes while the streams run to its token.
    """

    seconds: float
    cpu_seconds: float
    client_cpu_seconds: float
    tokens: int
    first: list[float]
    gaps: list[float]
    probes: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        arrivals: Sequence[Sequence[float]],
        *,
        seconds: float,
        cpu_seconds: float,
        client_cpu_seconds: float,
        tokens: int,
        probes: list[float],
    ) -> Sample:
        """arrivals: of each stream, when it was asked for, and when each of its reads came."""
        return cls(
            seconds,
            cpu_seconds,
            client_cpu_seconds,
            tokens,
            first=[times[1] - times[0] for times in arrivals],
            gaps=[after - before for times in arrivals for before, after in pairwise(times[1:])],
            probes=probes,
        )

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return self.tokens / self.seconds

    @property
    def cpu_per_token(self) -> float:
        """CPU seconds of the process that serves, for one token."""
        return self.cpu_seconds / self.tokens

    def json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
