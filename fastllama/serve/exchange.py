"""The state of one HTTP request, from which its access log entry is made."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastllama.serve.jobs import Job
from fastllama.serve.keys import Key
from fastllama.serve.log import CLIENT_LEFT, AccessRecord
from fastllama.serve.running import RunningJob


@dataclass(eq=False)
class Exchange:
    """The state of one HTTP request.

    arrival: by time.monotonic(). status: None until the response begins. error: the code of an error response. job,
    running: of a completion, once it is queued.
    """

    request_id: str
    route: str
    arrival: float = field(default_factory=time.monotonic)
    status: int | None = None
    error: str | None = None
    client_left: bool = False
    key: Key | None = None
    job: Job | None = None
    running: RunningJob | None = None

    def record(self) -> AccessRecord:
        """Returns the access log entry, after the request has ended."""
        record = AccessRecord(
            id=self.request_id,
            route=self.route,
            status=CLIENT_LEFT if self.client_left or self.status is None else self.status,
            key="" if self.key is None else self.key.name,
            reason="client_left" if self.client_left else self.error,
        )
        record.total_s = time.monotonic() - self.arrival
        record.time -= record.total_s
        if self.job is not None and self.running is not None:
            metrics = self.running.metrics()
            record.model, record.user, record.stream = self.job.model, self.job.user, self.job.stream
            record.prompt_tokens = self.job.num_prompt_tokens
            record.cached_tokens = sum(each.num_cached_tokens for each in metrics)
            record.completion_tokens = sum(each.num_generated_tokens for each in metrics)
            record.queue_s = self._until(each.first_scheduled_time for each in metrics)
            record.first_token_s = self._until(each.first_token_time for each in metrics)
            record.reason = record.reason or ",".join(sorted(self.running.finish_reasons())) or None
        return record

    def _until(self, times: Iterable[float | None]) -> float | None:
        """Seconds from arrival to the earliest of these times; None if there is none."""
        return min((each - self.arrival for each in times if each is not None), default=None)
