"""Options of a server, checked before a model is loaded."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from fastllama.errors import brief, check_range
from fastllama.serve.keys import Keyring
from fastllama.serve.service import ServiceLimits
from fastllama.serve.sockets import is_loopback

PORT = 8229


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server. Raises ValueError for illegal values, OSError for files that cannot be read.

    names: the only names of the model; none: its own name, and any other. drain_seconds: grace for running requests at
    shutdown. cors_origins: origins whose pages may send requests. canary_seconds: between two canary requests, None for
    none. max_n: most samples of a request. max_queue_size: requests that may wait. traits: what changes answers besides
    model, dtype and quantization; part of the fingerprint.
    """

    keyring: Keyring
    host: str = "127.0.0.1"
    port: int = PORT
    names: tuple[str, ...] = ()
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    max_queue_size: int = 1024
    drain_seconds: float = 25.0
    cors_origins: tuple[str, ...] = ()
    canary_seconds: float | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    max_n: int = 16
    traits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)
        check_range("--max-queue-size", self.max_queue_size, 1)
        check_range("--request-timeout", self.limits.request_seconds, 0.001)
        check_range("--max-body-bytes", self.limits.body_bytes, 1)
        check_range("--drain-timeout", self.drain_seconds, 0)
        check_range("--max-n", self.max_n, 1)
        if self.canary_seconds is not None:
            check_range("--canary", self.canary_seconds, 1)
        for origin in self.cors_origins:
            if origin != "*" and (origin.count("/") != 2 or not origin.startswith(("http://", "https://"))):
                raise ValueError(f"--cors-origin is {brief(origin)}; legal: as 'https://example.org', or '*'")
        if not self.keyring and not is_loopback(self.host):
            raise ValueError(
                f"--host is {self.host!r}, which other machines reach, and there is no API key; set FASTLLAMA_API_KEY "
                "or give --api-keys FILE (fastllama serve --new-key NAME makes a line of it), or serve on 127.0.0.1"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile go together; legal: both, or neither")
        if self.ssl_certfile is not None:
            self._check_certificate()

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.ssl_certfile is not None

    @property
    def hosts(self) -> frozenset[str] | None:
        """Legal names in Host headers, for a loopback address without keys; None if any is legal."""
        if self.keyring or not is_loopback(self.host):
            return None
        given = self.host.lower()
        return frozenset({"localhost", "127.0.0.1", "[::1]", f"[{given}]" if ":" in given else given})

    def _check_certificate(self) -> None:
        assert self.ssl_certfile is not None
        for path in (self.ssl_certfile, self.ssl_keyfile):
            assert path is not None
            path.open("rb").close()  # OpenSSL's error does not name the missing file
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except ssl.SSLError as error:
            where = f"--ssl-certfile {self.ssl_certfile} and --ssl-keyfile {self.ssl_keyfile}"
            raise ValueError(f"{where} are not a certificate with its key in PEM: {error.reason or error}") from None
