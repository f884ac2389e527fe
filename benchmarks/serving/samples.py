"""A burst of requests, the same for both contenders, and its measured sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

PAUSE = 0.02  # seconds between two probes
PROBE = "One day a dog"


@dataclass(frozen=True)
class Burst:
    """A number of streams that start at once, each with the same number of tokens.

    probed: whether requests for one token are sent meanwhile, one after another.
    """

    streams: int
    tokens: int
    probed: bool = False

    @property
    def prompts(self) -> list[str]:
        """A prompt for each stream."""
        return [f"Once upon a time there were {number} birds" for number in range(self.streams)]


@dataclass(frozen=True)
class Sample:
    """One burst. Times are seconds.

    seconds: from before the first request until the last stream has ended. cpu_seconds: of the serving process, all
    threads. client_cpu_seconds: of the client process, if separate. first: from each request to its first token.
    gaps: between two reads of a stream after that. tokens: of all streams. probes: from each request sent while the
    streams run to its token.
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
        """arrivals: for each stream, the time of its request and of each of its reads."""
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
        """Tokens per second of all streams together."""
        return self.tokens / self.seconds

    @property
    def cpu_per_token(self) -> float:
        """CPU seconds of the serving process per token."""
        return self.cpu_seconds / self.tokens

    def json(self) -> str:
        """The sample as one line of JSON."""
        return json.dumps(asdict(self))


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of all values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
