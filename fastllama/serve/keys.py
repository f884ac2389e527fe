"""API keys, stored as SHA-256 only, and their limits.

A request counts from before its body is read, as one of max_concurrent until its prompts and n are known, then as
prompts times n.

Used by one event loop; not thread-safe.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastllama.errors import brief, counted, nearest
from fastllama.serve.errors import ApiError, invalid

logger = logging.getLogger("fastllama")

SINGLE = "env"  # the name of the key in FASTLLAMA_API_KEY
LONGEST_WAIT = 120  # seconds of Retry-After: OpenAI's clients do not retry at all above it
_MINUTE = 60.0
_MOST = 10**12  # largest legal limit: far above any machine, and exact in a bucket's arithmetic
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class KeyLimits:
    """Limits of a key; None is no limit.

    tokens_per_minute: of prompts and answers together. max_concurrent: samples (prompts times n) that run or wait at
    the same time. max_tokens: generated tokens of each sample of a request.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class KeyEntry:
    """A key as listed in the file; digest: the 32 bytes of its SHA-256."""

    name: str
    digest: bytes
    limits: KeyLimits


_LIMITS = tuple(each.name for each in fields(KeyLimits))
_FIELDS = ("name", "sha256", *_LIMITS)


class TokenBucket:
    """A rate limit that refills continuously, by per_minute a minute, up to per_minute.

    Its level may fall below zero, a debt that refills first. clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """The amount available now."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
        self._at = now
        return self._level

    def spend(self, amount: float) -> None:
        """Subtract an amount, even if it is not available."""
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """Seconds until the bucket reaches this level, if nothing more is spent."""
        return max(0.0, level - self.level) * _MINUTE / self.per_minute

    def resize(self, per_minute: int) -> None:
        """Change the rate from now on. The level stays, capped at the new rate."""
        self._level = self.level  # refilled so far at the old rate
        self.per_minute = per_minute


class Key:
    """An API key and its usage. Without limits, and with an empty name, if the server has no keys."""

    def __init__(self, name: str, digest: bytes, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self.name, self.digest, self.limits = name, digest, limits
        self.num_running = 0
        self._clock = clock
        self._requests = _bucket(None, limits.requests_per_minute, clock)
        self._tokens = _bucket(None, limits.tokens_per_minute, clock)

    @property
    def max_tokens(self) -> int | None:
        """Most generated tokens of each sample of a request; None for no limit."""
        return self.limits.max_tokens

    def change(self, digest: bytes, limits: KeyLimits) -> None:
        """Replace digest and limits; the usage is kept."""
        self.digest, self.limits = digest, limits
        self._requests = _bucket(self._requests, limits.requests_per_minute, self._clock)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, self._clock)

    def admit(self) -> Ticket:
        """Count one request, and one running sample. Raises ApiError 429, and counts nothing, at a limit.

        A request is admitted while one token is left, however many it will use: the excess is a debt.
        """
        limits = self.limits
        waits = {  # limit that is reached -> seconds until it allows one more
            f"{kind}_per_minute is {bucket.per_minute}, and used up": bucket.seconds_until(1)
            for kind, bucket in self._buckets()
            if bucket.level < 1
        }
        if limits.max_concurrent is not None and self.num_running >= limits.max_concurrent:
            waits[self._full()] = 1.0
        if waits:
            raise self._refused(waits)
        if self._requests is not None:
            self._requests.spend(1)
        self.num_running += 1
        return Ticket(self)

    def widen(self, before: int, now: int) -> None:
        """Change the number of samples that a running request counts as, from `before` to `now`.

        Raises ApiError, and changes nothing: 429 if too many others run, 400 if it has too many itself.
        """
        most = self.limits.max_concurrent
        if most is not None and now > most:
            raise invalid(
                f"the request has {counted(now, 'sample')}, prompts times n; "
                f"legal: at most {most}, max_concurrent of key {self.name!r}"
            )
        if most is not None and self.num_running - before + now > most:
            raise self._refused({self._full(): 1.0})
        self.num_running += now - before

    def _full(self) -> str:
        return f"max_concurrent is {self.limits.max_concurrent}, and {self.num_running} of its samples run or wait"

    def charge(self, tokens: int) -> None:
        """Count tokens of a prompt or an answer."""
        if self._tokens is not None:
            self._tokens.spend(tokens)

    def headers(self) -> dict[str, str]:
        """Returns OpenAI's x-ratelimit-* headers of the existing limits; reset: seconds until the bucket is full."""
        found = {}
        for kind, bucket in self._buckets():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            found[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.per_minute))
        return found

    def _buckets(self) -> list[tuple[str, TokenBucket]]:
        """Returns the existing buckets by the kind that they count."""
        both = (("requests", self._requests), ("tokens", self._tokens))
        return [(kind, bucket) for kind, bucket in both if bucket is not None]

    def _refused(self, waits: Mapping[str, float]) -> ApiError:
        why = max(waits, key=waits.__getitem__)
        wait = min(LONGEST_WAIT, max(1, math.ceil(waits[why])))
        message = f"key {self.name!r} has reached a limit: {why}; try again in {counted(wait, 'second')}"
        headers = {"retry-after": str(wait)} | self.headers()
        return ApiError(429, "rate_limit_exceeded", message, headers=headers)


class Ticket:
    """One admitted request of a key, until it is closed."""

    def __init__(self, key: Key) -> None:
        self._key, self._num_samples = key, 1

    def widen(self, num_samples: int) -> None:
        """Set its number of samples, of all prompts. Raises what Key.widen raises, and then still counts as one."""
        self._key.widen(self._num_samples, num_samples)
        self._num_samples = num_samples

    def charge(self, tokens: int) -> None:
        """Count tokens of its prompt or its answer, also after it was closed."""
        self._key.charge(tokens)

    def close(self) -> None:
        """Stop counting it as running. May be called twice."""
        self._key.num_running -= self._num_samples
        self._num_samples = 0

    def headers(self) -> dict[str, str]:
        """Returns the x-ratelimit headers of its response; empty without such limits."""
        return self._key.headers()


class Keyring:
    """The API keys of a server. False if it has none: then every request is allowed."""

    def __init__(self, single: KeyEntry | None, file: Path | None, clock: Callable[[], float]) -> None:
        self._single, self._file, self._clock = single, file, clock
        self._anonymous = Key("", b"", KeyLimits(), clock)
        self._keys: list[Key] = []
        self._take(self._read())

    @classmethod
    def open(cls, single: str | None, file: Path | None, *, clock: Callable[[], float] = time.monotonic) -> Keyring:
        """Reads the key of FASTLLAMA_API_KEY, named "env" and without limits, and a file of JSON lines.

        Raises ValueError for a key that no header can carry, and for errors in the file, with line and field; OSError
        if the file cannot be read.
        """
        return cls(None if single is None else KeyEntry(SINGLE, _digest(_checked(single)), KeyLimits()), file, clock)

    def reload(self) -> None:
        """Read the file again. Keys of the same name keep their usage; an illegal file changes nothing."""
        try:
            entries = self._read()
        except (OSError, ValueError) as error:
            logger.error("the API keys are unchanged: %s", error)
            return
        self._take(entries)
        logger.info("%s read again: %s", self._file, counted(len(entries), "API key"))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, authorization: str | None) -> Key:
        """Returns the key in an Authorization header. Raises ApiError 401 if it is unknown."""
        if not self._keys:
            return self._anonymous
        scheme, _, secret = (authorization or "").strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            message = "this server requires an API key in the header 'Authorization: Bearer KEY'"
            raise _unauthorized("missing_api_key", message)
        digest, found = _digest(secret), None
        for key in self._keys:  # all of them, so that the time does not depend on which matches
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _unauthorized("invalid_api_key", "the API key is unknown to this server")
        return found

    def _read(self) -> list[KeyEntry]:
        entries = [] if self._single is None else [self._single]
        return entries if self._file is None else _parsed(self._file, entries)

    def _take(self, entries: list[KeyEntry]) -> None:
        before = {key.name: key for key in self._keys}
        self._keys = []
        for entry in entries:
            key = before.get(entry.name)
            if key is None:
                key = Key(entry.name, entry.digest, entry.limits, self._clock)
            else:
                key.change(entry.digest, entry.limits)
            self._keys.append(key)


def new_key(name: str) -> tuple[str, str]:
    """Returns a random key of 256 bits, and its line for the file of keys. Raises ValueError for an illegal name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name is {brief(name)}; {_LEGAL['name']}")
    secret = f"fl-{secrets.token_urlsafe(32)}"
    return secret, json.dumps({"name": name, "sha256": _digest(secret).hex()})


def _bucket(bucket: TokenBucket | None, per_minute: int | None, clock: Callable[[], float]) -> TokenBucket | None:
    """Returns a bucket for this limit: the existing one, resized, or a full one; None without a limit."""
    if bucket is None or per_minute is None:
        return None if per_minute is None else TokenBucket(per_minute, clock)
    bucket.resize(per_minute)
    return bucket


def _duration(seconds: float) -> str:
    """Formats whole seconds as OpenAI does, in Go's form: "1s", "6m0s", "1h0m0s"."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}s"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers={"www-authenticate": "Bearer"})


def _checked(secret: str) -> str:
    """Checks a key from the environment. Error messages do not contain it, because they are logged."""
    if not secret or any(not "!" <= each <= "~" for each in secret):
        wrong = "holds a blank or a character that is not visible ASCII" if secret.strip() else "is empty or blank"
        raise ValueError(f"FASTLLAMA_API_KEY {wrong}; legal: visible ASCII characters, as a header carries them")
    return secret


_LEGAL = {
    "name": "legal: 1 to 64 of the characters A-Z a-z 0-9 . _ @ -, the first a letter or digit",
    "sha256": "legal: 64 hexadecimal digits",
}


def _parsed(file: Path, entries: list[KeyEntry]) -> list[KeyEntry]:
    """Returns these entries and those of a file, with unique names and keys. Raises ValueError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    places = {entry.name: "FASTLLAMA_API_KEY" for entry in entries}
    digests = {entry.digest: entry.name for entry in entries}
    found = list(entries)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _entry(line)
            if entry.name in places:
                raise ValueError(f"name {entry.name!r} is also that of {places[entry.name]}; legal: a unique name")
            if entry.digest in digests:
                raise ValueError(f"sha256 is also that of {digests[entry.digest]!r}; legal: a unique key")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        places[entry.name], digests[entry.digest] = f"line {number}", entry.name
        found.append(entry)
    if len(found) == len(entries):
        raise ValueError(f"{file} has no key; legal: at least one line, as `fastllama serve --new-key NAME` writes it")
    return found


def _entry(line: str) -> KeyEntry:
    """Parses the key in a line. Raises ValueError, which names the field."""
    values = json.loads(line, object_pairs_hook=_object)
    if not isinstance(values, dict):
        raise ValueError(f"the line is {brief(values)}; legal: a JSON object")
    for name in values:
        if name not in _FIELDS:
            meant = nearest(name, _FIELDS)
            hint = f" (did you mean {meant!r}?)" if meant else ""
            raise ValueError(f"unknown field {brief(name)}{hint}; legal: {', '.join(_FIELDS)}")
    for name, pattern in (("name", _NAME), ("sha256", _SHA256)):
        value = values.get(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            said = (
                "is missing" if name not in values else f"is {brief(value)}" if name == "name" else "is something else"
            )
            raise ValueError(f"{name} {said}; {_LEGAL[name]}")  # sha256's value may be the key itself
    limits = KeyLimits(**{name: values.get(name) for name in _LIMITS})
    for name, value in asdict(limits).items():
        if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
            raise ValueError(f"{name} is {brief(value)}; legal: an integer from 1 to {_MOST}, or null for no limit")
    return KeyEntry(values["name"], bytes.fromhex(values["sha256"]), limits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; raises ValueError for duplicate fields, which would be ambiguous."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {brief(next(name for name in names if names.count(name) > 1))} occurs twice")
    return values
