"""Who may speak to the server: checked before anything of a request is read.

- Host: a page of another site, whose name an attacker lets point to 127.0.0.1 (DNS rebinding), sends its own name.
- Origin: a page of another site may send requests to 127.0.0.1, too; browsers say where they come from.
- Token: compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from latentflow.studio.refusals import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/docs", "/openapi.json")
"""Paths that need no token: they say nothing of the model."""
SAFE = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Guard:
    """Refuses requests by their headers.

    Attributes:
        app: what is guarded.
        host: the address that the server listens on.
        token: None: none is needed.
        origins: other sites whose pages may send requests.
        hosts: names of the server.
    """

    app: App
    host: str
    token: str | None = None
    origins: frozenset[str] = field(default_factory=frozenset)
    hosts: frozenset[str] = field(default_factory=frozenset)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        allowed = self._allowed_origin(headers)
        extra = [*SAFE, *(_cors(allowed) if allowed else ())]

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            self._check(scope, headers)
        except Refused as refused:
            await answer(send_more, refused)
            return
        if allowed and scope["method"] == "OPTIONS":
            await send_more({"type": "http.response.start", "status": 204, "headers": []})
            await send_more({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send_more)

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "")
        if not self._is_own(_name_of(host)):
            raise Refused(403, f"the host {host!r:.80} is not this server; add it with --hosts")
        origin = headers.get(b"origin")
        if origin is not None and not self._allowed_origin(headers) and not _is_same(origin, host):
            raise Refused(403, f"pages of {origin!r:.80} may not send requests; allow them with --origins")
        if origin is None and headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
            raise Refused(403, "pages of other sites may not send requests; allow them with --origins")
        is_preflight = scope["method"] == "OPTIONS" and origin is not None
        if self.token is not None and scope["path"] not in OPEN and not is_preflight:
            kind, _, given = headers.get(b"authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), _digest(self.token)):
                raise Refused(401, "a token is needed: 'Authorization: Bearer SECRET'", www_authenticate="Bearer")

    def _is_own(self, name: str) -> bool:
        if name in self.hosts or name == self.host.lower():
            return True
        if is_loopback(name):
            return True
        try:  # an address is no name that could point elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not is_loopback(self.host)

    def _allowed_origin(self, headers: dict[bytes, str]) -> str | None:
        origin = headers.get(b"origin", "").lower()
        return origin if origin in self.origins else None


async def answer(send: Send, refused: Refused) -> None:
    """Send a refusal as JSON."""
    body = json.dumps({"error": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode("latin-1")) for name, value in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-expose-headers", b"retry-after"),
        (b"vary", b"origin"),
    ]


def _name_of(host: str) -> str:
    """The name in a Host header, without its port; empty where there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same(origin: str, host: str) -> bool:
    """Whether a page is one of this server's own."""
    scheme, _, place = origin.lower().partition("://")
    return scheme in ("http", "https") and place == host.lower()


def _digest(text: str) -> bytes:
    """Of one length for all texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
