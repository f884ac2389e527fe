"""The two generating endpoints: read a body, run it, respond as a stream or as a whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial

from starlette.types import Receive, Scope, Send

from fastllama.runtime.outputs import RequestDelta
from fastllama.serve.errors import ClientGoneError
from fastllama.serve.exchange import Exchange
from fastllama.serve.jobs import Job
from fastllama.serve.keys import Key, Ticket
from fastllama.serve.render import Answer, answer_of, error_event
from fastllama.serve.responses import EventStream, check_json, read_body, respond, while_connected
from fastllama.serve.service import Service


class Completions:
    """A generating endpoint; translate: chat_job or completion_job of translate.py."""

    def __init__(self, service: Service, translate: Callable[..., Job]) -> None:
        self._service, self._translate = service, translate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, exchange = self._service, scope["state"]["exchange"]
        check_json(scope, service.limits)
        service.check_room()
        ticket = exchange.key.admit()
        try:
            body = await read_body(receive, service)
            await while_connected(receive, self._answer(exchange, exchange.key, ticket, body, send))
        finally:
            ticket.close()

    async def _answer(self, exchange: Exchange, key: Key, ticket: Ticket, body: bytes, send: Send) -> None:
        with self._service.running():
            try:
                await self._run(exchange, key, ticket, body, send)
            finally:
                if exchange.running is not None:
                    self._service.end(exchange.running)
                    ticket.charge(exchange.running.num_generated_tokens)

    async def _run(self, exchange: Exchange, key: Key, ticket: Ticket, body: bytes, send: Send) -> None:
        service, model = self._service, self._service.model
        exchange.job = await service.in_thread(partial(self._translate, body, model, key.max_tokens))
        ticket.widen(len(exchange.job.prompts) * exchange.job.params.n)
        exchange.running = await service.start(exchange.job)
        ticket.charge(exchange.job.num_prompt_tokens)
        answer = answer_of(exchange.job, model, exchange.request_id)
        async with aclosing(exchange.running.deltas()) as deltas:
            if exchange.job.stream:
                await self._stream(exchange, answer, deltas, ticket.headers(), send)
            else:
                async for index, delta in deltas:
                    answer.take(index, delta)
                await respond(send, 200, answer.body(), ticket.headers())

    async def _stream(
        self,
        exchange: Exchange,
        answer: Answer,
        deltas: AsyncGenerator[tuple[int, RequestDelta], None],
        headers: dict[str, str],
        send: Send,
    ) -> None:
        """Send deltas as events, and an error too: clients take a truncated stream for a whole answer."""
        async with EventStream.open(send, headers, self._service.limits.ping_seconds) as stream:
            if opening := answer.opening():
                await stream.send(opening)
            try:
                async for index, delta in deltas:
                    if events := answer.take(index, delta):
                        await stream.send(events)
                last = answer.closing()
            except ClientGoneError:
                raise
            except Exception as error:
                failure = self._service.api_error(error)
                exchange.error = failure.code
                last = error_event(failure)
            await stream.end(last)
