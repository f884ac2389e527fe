"""The ASGI application: endpoints, access checks, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from traceback import format_exception
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import fastllama
from fastllama.errors import brief
from fastllama.serve import page, translate, wire
from fastllama.serve.completions import Completions
from fastllama.serve.errors import ApiError, ClientGoneError
from fastllama.serve.exchange import Exchange
from fastllama.serve.keys import Ticket
from fastllama.serve.metrics import CONTENT_TYPE, ROUTES
from fastllama.serve.model import ServedModel
from fastllama.serve.responses import JSON, check_json, header_of, read_body, respond, while_connected
from fastllama.serve.service import Service

logger = logging.getLogger("fastllama")

KEYLESS = {"/health", "/ready", *page.FILES}  # probes have no key, and the page asks the user for one
EXPOSED = ("x-request-id", "retry-after", *(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
))  # fmt: skip
BUG = "this is a bug in fastllama; please report it with these lines:\n%s"
_ID = re.compile(r"[!-~]{1,128}")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")


def create_app(
    service: Service, *, hosts: Collection[str] | None = None, cors_origins: Collection[str] = ()
) -> ASGIApp:
    """Returns the ASGI application with all endpoints.

    hosts: legal names in the Host header if there are no keys; None for any. cors_origins: origins whose pages may send
    requests, "*" for all.
    """
    app: ASGIApp = Guard(service, hosts)
    if cors_origins:
        app = Cors(
            app,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            allow_private_network=True,
            max_age=3600,
        )
    return Door(service, app)


class Cors(CORSMiddleware):
    """Starlette's CORS middleware, with refusals in OpenAI's form."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Returns the response to a browser's preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        message = f"{bytes(response.body).decode()}; legal: origins given by --cors-origin, methods GET and POST"
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(ApiError(400, "cors_refused", message).body, 400, headers, JSON)


class Door:
    """The outermost layer: gives each request an id, records it, and catches disconnects."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        self._service, self._app = service, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = header_of(scope, b"x-request-id")
        exchange = Exchange(given if given and _ID.fullmatch(given) else uuid4().hex, _route(scope["path"]))
        scope.setdefault("state", {})["exchange"] = exchange

        is_gone = False

        async def heard() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "http.disconnect"
            return message

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", exchange.request_id.encode())]
            await send(message)
            if is_gone:  # found while sending, which the server does not report
                raise ClientGoneError

        try:
            await self._app(scope, heard, named)
        except ClientGoneError:
            exchange.client_left = True
        except asyncio.CancelledError:  # the server shuts down and drops its open connections
            exchange.client_left = True
            raise
        finally:
            self._service.note(exchange)


class Guard:
    """Checks the Host header and the API key, then calls the endpoint; exceptions become error responses."""

    def __init__(self, service: Service, hosts: Collection[str] | None) -> None:
        self._service, self._hosts = service, hosts
        self._router = _router(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        scope["app"] = self  # as in Starlette: with it, the router raises 404 and 405
        try:
            self._check_host(scope)
            if scope["path"] not in KEYLESS and scope["method"] != "OPTIONS":
                exchange.key = self._service.keyring.find(header_of(scope, b"authorization"))
            await self._router(scope, receive, send)
        except ClientGoneError:
            raise
        except Exception as error:
            if exchange.status is not None:  # part of a response was sent: too late for an error
                logger.error(BUG, "".join(format_exception(error)))
                raise
            refusal = self._refusal(scope, error)
            exchange.error = refusal.code
            await respond(send, refusal.status, refusal.body, refusal.headers | _closing(scope))

    def _check_host(self, scope: Scope) -> None:
        """Reject foreign Host headers: without keys, a site could resolve its name to this machine (DNS rebinding)."""
        given = header_of(scope, b"host")
        if self._hosts is None or given is None:
            return
        name = _HOST.fullmatch(given.strip())
        if name is None or name[1].lower() not in self._hosts:
            legal = ", ".join(sorted(self._hosts))
            raise ApiError(403, "host_not_allowed", f"the Host header is {brief(given)}; legal without keys: {legal}")

    def _refusal(self, scope: Scope, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, HTTPException) and error.status_code == 405:
            legal = sorted(scope["route"].methods)
            message = f"method {brief(scope['method'])} of {brief(scope['path'])}; legal: {', '.join(legal)}"
            return ApiError(405, "method_not_allowed", message, headers={"allow": ", ".join(legal)})
        if isinstance(error, HTTPException):
            there = ", ".join(f"{methods} {path}" for path, methods in ENDPOINTS.items())
            asked = f"{scope['method']} {scope['path']}"
            return ApiError(404, "unknown_url", f"there is no endpoint {brief(asked)}; legal: {there}")
        logger.error(BUG, "".join(format_exception(error)))
        return ApiError(500, "internal_error", "internal error, a bug in fastllama; the server's log has its traceback")


def _closing(scope: Scope) -> dict[str, str]:
    """Headers that close the connection if the client sent Expect: it may or may not send its body after a refusal."""
    return {"connection": "close"} if header_of(scope, b"expect") is not None else {}


ENDPOINTS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": "GET",
    "/v1/models/{id}": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/version": "GET",
    "/health": "GET",
    "/ready": "GET",
    "/metrics": "GET",
    "/": "GET",
}


def _route(path: str) -> str:
    """Returns the route of a path, for logs and metrics."""
    if path in ROUTES:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


def _router(service: Service) -> Router:
    def get(path: str, endpoint: Callable[[Scope], Reply]) -> Route:
        return Route(path, _Get(endpoint), methods=["GET"])

    def post(path: str, endpoint: ASGIApp) -> Route:
        return Route(path, endpoint, methods=["POST"])

    return Router(
        [
            post("/v1/chat/completions", Completions(service, translate.chat_job)),
            post("/v1/completions", Completions(service, translate.completion_job)),
            post("/tokenize", _InThread(service, translate.tokenize)),
            post("/detokenize", _InThread(service, translate.detokenize)),
            get("/v1/models", lambda scope: _json(wire.ModelList(data=_cards(service.model)))),
            get("/v1/models/{id:path}", lambda scope: _json(_card(service.model, scope["path_params"]["id"]))),
            get("/version", lambda scope: _json({"version": fastllama.__version__})),
            get("/health", lambda scope: _health(service)),
            get("/ready", lambda scope: _ready(service)),
            get("/metrics", lambda scope: Reply(service.metrics.render(), content_type=CONTENT_TYPE)),
            *(get(path, partial(_page_file, path)) for path in page.FILES),
        ],
        redirect_slashes=False,
    )


class Reply(NamedTuple):
    """A complete response."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = {}


class _Get:
    """An endpoint that reads no body and does not wait."""

    def __init__(self, endpoint: Callable[[Scope], Reply]) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._endpoint(scope)
        work = respond(send, reply.status, reply.body, reply.headers, reply.content_type)
        await while_connected(receive, work)


class _InThread:
    """An endpoint that converts one JSON to another with the tokenizer, on a thread."""

    def __init__(self, service: Service, function: Callable[[bytes, ServedModel], bytes]) -> None:
        self._service, self._function = service, function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        check_json(scope, service.limits)
        service.check_open()
        ticket = scope["state"]["exchange"].key.admit()
        try:
            body = await read_body(receive, service)
            await while_connected(receive, self._answer(body, ticket, send))
        finally:
            ticket.close()

    async def _answer(self, body: bytes, ticket: Ticket, send: Send) -> None:
        service = self._service
        with service.running():
            answer = await service.in_thread(partial(self._function, body, service.model))
        await respond(send, 200, answer, ticket.headers())


def _json(value: Any) -> Reply:
    return Reply(msgspec.json.encode(value))


def _cards(model: ServedModel) -> list[wire.ModelCard]:
    return [
        wire.ModelCard(id=name, created=model.created, owned_by="fastllama", max_model_len=model.max_model_len)
        for name in model.names
    ]


def _card(model: ServedModel, name: str) -> wire.ModelCard:
    for card in _cards(model):
        if card.id == name:
            card.notice = model.notice
            return card
    message = f"there is no model {brief(name)}; there are: {', '.join(model.names)}"
    raise ApiError(404, "model_not_found", message, param="model")


def _page_file(path: str, scope: Scope) -> Reply:
    body, content_type = page.FILES[path]
    return Reply(body, content_type=content_type, headers=page.HEADERS)


def _health(service: Service) -> Reply:
    status, body = service.verdict()
    return Reply(body, status)


def _ready(service: Service) -> Reply:
    service.check_open()
    return _json({"status": "ready"})
