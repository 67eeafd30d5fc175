"""HTTP connections with bounds that uvicorn does not have: how many, and how long a head may take.

Also: what is not HTTP is answered in the shape of every other error, and a reader that has stalled can be
cut off, since closing politely would wait for it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from puna.serve.errors import ApiError
from puna.serve.settings import ServerSettings

_CONNECTION = "connection"


def bounded_protocol(settings: ServerSettings) -> type[H11Protocol]:
    """The protocol class of a server with these settings."""

    class Bounded(_BoundedProtocol):
        bounds = settings

    return Bounded


class _BoundedProtocol(H11Protocol):
    bounds: ServerSettings
    _head_timer: asyncio.TimerHandle | None = None
    refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # What an endpoint gets at as scope["state"]: every connection has its own.
        self.app_state = {**self.app_state, _CONNECTION: self}
        if len(self.connections) > self.bounds.max_connections:
            self.refused = True
            self._refuse(
                ApiError(429, "too many connections; try again", code="too_many_connections", retry_after=1)
            )
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unwatch_head()  # from here on uvicorn's own timer for idle connections runs

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way: another one in the middle of it helps nobody
            return
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def cut(self) -> None:
        """Close at once, what was not read yet being lost."""
        self.transport.abort()

    def _watch_head(self) -> None:
        """A head that began must end in time; once a request runs, other bounds hold."""
        waits = self.cycle is None or self.cycle.response_complete
        if not waits or self.transport.is_closing():
            self._unwatch_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.head_seconds, self._head_is_late)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(ApiError(408, "the request did not come in time", code="head_timeout"))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        lines = [f"HTTP/1.1 {error.status} {STATUS_PHRASES[error.status].decode()}"]
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


def cut_connection(scope: Scope) -> None:
    """Cut the connection of a request; nothing to do where another server runs the application."""
    connection: Any = scope.get("state", {}).get(_CONNECTION)
    if connection is not None:
        connection.cut()
